"""The embedded model and corpus: honest, whole, and built once."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from agent.trainer import demo
from agent.trainer.data import prepare
from protocol.jobspec import DataSpec, JobSpec, ModelSpec, TrainingSpec
from protocol.worker import Limits, Workspace


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def card(home: Path) -> dict[str, Any]:
    return demo.build(home)


def rows_of(card: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(card["data"]).read_text(encoding="utf-8").splitlines()]


def test_what_is_printed_is_one_line_of_json(
    home: Path, card: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    demo.main(["--home", str(home)])
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    assert said == card
    assert Path(said["model"]) == home / "models" / "demo-llama"
    assert Path(said["data"]) == home / "datasets" / "demo.jsonl"
    assert said["rows"] == len(rows_of(card)) > 400
    assert said["parameters"] > 1_000_000
    assert said["training"]["max_steps"] > 0


def test_model_and_tokenizer_load_and_fit(card: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(card["model"])
    model = AutoModelForCausalLM.from_pretrained(card["model"])
    assert model.num_parameters() == card["parameters"]
    assert len(tokenizer) == model.config.vocab_size
    assert (tokenizer.eos_token, tokenizer.pad_token) == (demo.END, demo.PAD)
    text = 'for i in range(3):\n    print("\N{GREEK SMALL LETTER PI}")'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_no_passage_is_in_two_rows_and_the_sample_is_in_none(card: dict[str, Any]) -> None:
    answers = [row["messages"][1]["content"] for row in rows_of(card)]
    questions = [row["messages"][0]["content"] for row in rows_of(card)]
    assert len(set(answers)) == len(answers)
    assert card["answer"] not in answers
    assert card["prompt"] not in questions
    # Whatever is held out, hardly a run of eight words of it is in any other row.
    runs = Counter(run for answer in [*answers, card["answer"]] for run in demo.word_runs(answer))
    assert sum(count for count in runs.values() if count > 1) < 0.05 * sum(runs.values())


def test_its_rows_train_on_the_answers_alone(card: dict[str, Any], tmp_path: Path) -> None:
    spec = JobSpec(
        job_id="demo",
        model=ModelSpec(name="demo"),
        data=DataSpec(path=card["data"], eval_fraction=card["eval_split"]),
        training=TrainingSpec(max_length=card["training"]["max_length"], packing=True),
    )
    folder = str(tmp_path)
    workspace = Workspace(
        checkpoints=folder, output=folder, cache=folder, model=card["model"], data=card["data"]
    )
    notes: list[str] = []
    prepared = prepare(
        spec,
        workspace,
        AutoTokenizer.from_pretrained(card["model"]),
        Limits(hub=False),
        lambda _, text: notes.append(text),
    )
    assert prepared.assistant_only
    assert notes == []
    assert prepared.eval is not None
    assert len(prepared.train) + len(prepared.eval) == card["rows"]


def test_a_whole_demo_is_kept_and_a_broken_one_built_again(home: Path, card: dict[str, Any]) -> None:
    weights = Path(card["model"]) / "model.safetensors"
    before = weights.stat().st_mtime_ns
    demo.build(home)
    assert weights.stat().st_mtime_ns == before
    content = weights.read_bytes()
    weights.unlink()
    assert demo.build(home) == card
    assert weights.read_bytes() == content, "the same seed gives the same model"
