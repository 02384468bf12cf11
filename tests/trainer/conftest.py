"""A tiny model, its tokenizer and small data sets, built from configurations: nothing is downloaded."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Marks the assistant's turns, so that the loss can be taken on them alone."""

PLAIN_TEMPLATE = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
"""The same without the marks."""

WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "cat",
    "dog",
    "bird",
    "sun",
    "moon",
    "star",
    "runs",
    "sleeps",
    "sings",
    "under",
    "over",
    "the",
    "a",
]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def chat_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows in the messages format, of uneven length."""
    rng = random.Random(seed)
    return [
        {
            "messages": [
                {"role": "user", "content": sentence(rng, rng.randint(2, 6))},
                {"role": "assistant", "content": sentence(rng, rng.randint(2, 12))},
            ]
        }
        for _ in range(count)
    ]


def text_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"text": sentence(rng, rng.randint(4, 16))} for _ in range(count)]


def pair_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return preference pairs of uneven length."""
    rng = random.Random(seed)
    return [
        {
            "prompt": sentence(rng, rng.randint(2, 6)),
            "chosen": sentence(rng, rng.randint(2, 9)),
            "rejected": sentence(rng, rng.randint(2, 9)),
        }
        for _ in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build_tokenizer(template: str | None = CHAT_TEMPLATE) -> Any:
    """Return a byte-level tokenizer with some merges and the given chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([sentence(random.Random(n), 12) for n in range(200)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def build_model(folder: Path, vocabulary: int, **changes: Any) -> Path:
    """Save a random two-layer Llama to ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 64,  # bitsandbytes packs rows in blocks of 64
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
            **changes,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Folder of a two-layer Llama with its tokenizer and a template that marks the assistant's turns."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_model(folder, len(tiny_tokenizer))
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows in the messages format."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", chat_rows(48))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows of plain text."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "text.jsonl", text_rows(48))


@pytest.fixture(scope="session")
def pair_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 preference pairs."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", pair_rows(48))


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    """Writes rows to a file of this test's own."""

    def write(rows: list[dict[str, Any]], name: str = "data.jsonl") -> Path:
        return write_jsonl(tmp_path / name, rows)

    return write


class RecordingLine:
    """The trainer's end of the queues without queues: keeps what was said, answers with scripted orders."""

    def __init__(self, script: dict[int, list[Any]], delay: int = 0) -> None:
        self.events: list[Any] = []
        self.parent_gone = False
        self._script = script
        """Orders that come when the point of that step is said, ``delay`` looks later."""
        self._delay = delay
        self._waiting: list[Any] = []
        self._looks = 0

    def say(self, event: Any) -> None:
        self.events.append(event)
        step = getattr(event, "step", None) if type(event).__name__ == "Metrics" else None
        if step in self._script:
            self._waiting = self._script.pop(step)
            self._looks = self._delay

    def orders(self) -> list[Any]:
        if not self._waiting or self._looks > 0:
            self._looks -= 1
            return []
        taken, self._waiting = self._waiting, []
        if "gone" in taken:
            self.parent_gone = True
        return [order for order in taken if order != "gone"]

    def flush(self, timeout: float) -> bool:
        return True

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def last(self) -> Any:
        return self.events[-1]

    @property
    def points(self) -> dict[int, dict[str, float]]:
        """The curve: step -> values; the newest point of a step counts."""
        from protocol.worker import Metrics

        return {event.step: event.values for event in self.of(Metrics)}


LOSSES = ("train_loss", "eval_loss", "learning_rate", "grad_norm", "tokens_seen", "best_eval_loss")


def curve(*lines: RecordingLine) -> dict[int, dict[str, float]]:
    """Return what must be the same for an untouched job and for one in several attempts."""
    merged: dict[int, dict[str, float]] = {}
    for line in lines:
        merged |= line.points
    return {step: {k: v for k, v in values.items() if k in LOSSES} for step, values in merged.items()}


class Jobs:
    """Runs jobs on the tiny model, in this process, through `run.train`."""

    def __init__(self, folder: Path, model: Path, data: Path) -> None:
        self.folder, self.model, self.data = folder, model, data

    def start(self, name: str = "job", **changes: Any) -> Any:
        """Return a Start; ``training`` and the fields of JobSpec, Start and Limits can be changed."""
        from protocol.jobspec import DataSpec, JobSpec, ModelSpec, TrainingSpec
        from protocol.worker import Limits, Start, Workspace

        training = {"max_steps": 8, "batch_size": 4, "learning_rate": 1e-2, "max_length": 64}
        spec = JobSpec(
            **{
                "job_id": name,
                "model": ModelSpec(name="tiny", quantization=changes.pop("quantization", None)),
                "data": DataSpec(
                    path="data",
                    eval_fraction=changes.pop("eval_fraction", 0.0),
                    streaming=changes.pop("streaming", False),
                ),
                "training": TrainingSpec(**{**training, **changes.pop("training", {})}),
                **{key: changes.pop(key) for key in list(changes) if key in JobSpec.__struct_fields__},
            }
        )
        limits = Limits(
            hub=False, **{key: changes.pop(key) for key in list(changes) if key in Limits.__struct_fields__}
        )
        place = self.folder / name
        workspace = Workspace(
            checkpoints=str(place / "checkpoints"),
            output=str(place / "model"),
            cache=str(place / "cache"),
            model=str(changes.pop("base", self.model)),
            data=str(changes.pop("rows", self.data)),
        )
        return Start(spec=spec, workspace=workspace, limits=limits, **{"attempt": 1, **changes})

    def run(
        self,
        name: str = "job",
        script: dict[int, list[Any]] | None = None,
        delay: int = 0,
        beside: bool = False,
        **changes: Any,
    ) -> RecordingLine:
        """Run an attempt to its end and return what it said. Raises what the trainer raises."""
        from agent.trainer import run

        line = RecordingLine(dict(script or {}), delay)
        self.line = line
        assert run.train(self.start(name, **changes), line, reports_beside=beside) == 0
        return line

    def checkpoints(self, name: str = "job") -> Path:
        return self.folder / name / "checkpoints"

    def output(self, name: str = "job") -> Path:
        return self.folder / name / "model"


@pytest.fixture
def jobs(tmp_path: Path, tiny_model: Path, chat_file: Path) -> Jobs:
    return Jobs(tmp_path, tiny_model, chat_file)
