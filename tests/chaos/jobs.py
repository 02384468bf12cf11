"""The jobs that are harmed: ours through the trainer's own entry, and the same as a script from TRL's documentation."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from agent.runtime.bytequeue import ByteQueue
from agent.trainer import entry
from agent.trainer import run as _run
from protocol.jobspec import DataSpec, JobSpec, LoraSpec, ModelSpec, TrainingSpec
from protocol.worker import Finished, Limits, Metrics, Numbered, Start, Trained, Workspace, encoder
from tests.chaos.attempt import Attempt, in_a_child
from tests.trainer.conftest import build_model, build_tokenizer, chat_rows, write_jsonl

STEPS, SAVE_EVERY, EVAL_EVERY, KEEP = 30, 2, 10, 3
JOBS = ("lora", "full")
"""An adapter with dropout, accumulation and evaluation; and all weights on packed rows."""

assert _run  # imported before the fork


@dataclass(frozen=True)
class Ground:
    """What every run stands on."""

    model: Path
    rows: Path
    held_out: Path

    @classmethod
    def build(cls, folder: Path) -> "Ground":
        ground = cls(folder / "model", folder / "rows.jsonl", folder / "held-out.jsonl")
        in_a_child(ground._make)
        return ground

    def _make(self) -> None:
        tokenizer = build_tokenizer()
        build_model(self.model, len(tokenizer))
        tokenizer.save_pretrained(self.model)
        write_jsonl(self.rows, chat_rows(48))
        write_jsonl(self.held_out, chat_rows(8, seed=5))


@dataclass(frozen=True)
class Ours:
    """Our trainer; what the agent does for a job is done here: the same job again, with the next attempt."""

    background: bool = True
    """Periodic checkpoints are written while training goes on."""
    prefix = "step-"

    def begin(self, ground: Ground, job: str, folder: Path, checkpoints: Path, attempt: int) -> Attempt:
        process = Attempt(_entry, folder / f"attempt-{attempt}.log")
        process.order(self._start(ground, job, folder, checkpoints, attempt))
        return process

    def saving(self, checkpoints: Path) -> bool:
        """Tell whether a checkpoint is being written at this moment."""
        return any(name.startswith(".staging-") for name in _names(checkpoints))

    def _start(self, ground: Ground, job: str, folder: Path, checkpoints: Path, attempt: int) -> Start:
        lora = job == "lora"
        spec = JobSpec(
            job_id=job,
            model=ModelSpec(name="tiny"),
            data=DataSpec(path="rows", eval_path="held-out"),
            lora=LoraSpec(r=4, alpha=8, dropout=0.1) if lora else None,
            training=TrainingSpec(
                max_steps=STEPS,
                batch_size=2 if lora else 4,
                gradient_accumulation_steps=2 if lora else 1,
                learning_rate=1e-3,
                max_length=64,
                logging_steps=1,
                save_steps=SAVE_EVERY,
                save_total_limit=KEEP,
                eval_strategy="steps",
                eval_steps=EVAL_EVERY,
                packing=not lora,
            ),
        )
        workspace = Workspace(
            checkpoints=str(checkpoints),
            output=str(folder / "model"),
            cache=str(folder / "cache"),
            model=str(ground.model),
            data=str(ground.rows),
            eval_data=str(ground.held_out),
        )
        limits = Limits(hub=False, background_saves=self.background)
        return Start(spec=spec, attempt=attempt, workspace=workspace, limits=limits)


def _entry(orders: ByteQueue, events: ByteQueue) -> int:
    return entry.main(orders, events)


@dataclass(frozen=True)
class Stock:
    """TRL's trainer, saving and resuming as its documentation says."""

    prefix = "checkpoint-"

    def begin(self, ground: Ground, job: str, folder: Path, checkpoints: Path, attempt: int) -> Attempt:
        return Attempt(_script(ground, job, checkpoints), folder / f"attempt-{attempt}.log")

    def saving(self, checkpoints: Path) -> bool:
        """Tell whether a checkpoint is being written: its last file is missing."""
        return any(
            name.startswith(self.prefix) and not (checkpoints / name / "trainer_state.json").exists()
            for name in _names(checkpoints)
        )


def _script(ground: Ground, job: str, checkpoints: Path) -> Callable[[ByteQueue, ByteQueue], int]:
    def body(orders: ByteQueue, events: ByteQueue) -> int:
        torch.set_num_threads(1)
        set_seed(42)
        lora = job == "lora"
        args = SFTConfig(
            output_dir=str(checkpoints),
            max_steps=STEPS,
            per_device_train_batch_size=2 if lora else 4,
            gradient_accumulation_steps=2 if lora else 1,
            learning_rate=1e-3,
            max_length=64,
            packing=not lora,
            packing_strategy="bfd_split",
            logging_steps=1,
            save_strategy="steps",
            save_steps=SAVE_EVERY,
            save_total_limit=KEEP,
            eval_strategy="steps",
            eval_steps=EVAL_EVERY,
            bf16=False,
            use_cpu=True,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
        )
        teller = _Teller(events)
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(ground.model, dtype=torch.float32),
            args=args,
            train_dataset=_dataset(ground.rows),
            eval_dataset=_dataset(ground.held_out),
            processing_class=AutoTokenizer.from_pretrained(ground.model),
            peft_config=LoraConfig(
                r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            if lora
            else None,
            callbacks=[teller],
        )
        # With nothing saved yet, True is an error; the examples of the documentation ask first, like this.
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) is not None or None)
        teller.say(Trained(STEPS, "steps"))
        teller.say(Finished(str(checkpoints), "", _weights_hash(trainer.model), STEPS, {}))
        return 0

    return body


class _Teller(TrainerCallback):  # type: ignore[misc]
    """Says after each step that it is done, so that both sides can be harmed at the same moments."""

    def __init__(self, events: ByteQueue) -> None:
        self._events = events

    def say(self, event: Any) -> None:
        self._events.put(encoder.encode(Numbered(1, 0, event)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.say(Metrics(state.global_step, 0.0, 0.0, {}))


def _dataset(rows: Path) -> Dataset:
    return Dataset.from_list([json.loads(line) for line in rows.read_text().splitlines()])


def _weights_hash(model: Any) -> str:
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.named_parameters()):
        if tensor.requires_grad:
            digest.update(name.encode())
            digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208  asked a thousand times a second
    except FileNotFoundError:
        return []
