"""What must be the same for a checkpoint to be gone on from exactly. The libraries check none of it."""

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import msgspec

from agent.trainer.checkpoint import Found
from agent.trainer.errors import TrainerError
from protocol.failures import FailureReason
from protocol.jobspec import JobSpec, TrainingSpec

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
MUST_MATCH = (
    "batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "packing",
    "group_by_length",
    "assistant_only_loss",
    "seed",
    "optim",
)
"""Settings without which a checkpoint's place in the data, or its optimizer, makes no sense."""


def fingerprints(spec: JobSpec, data: str) -> dict[str, str]:
    """Return what is written into each checkpoint's manifest; ``data`` is the data set's fingerprint."""
    core = (spec.method, spec.model, spec.tokenizer, spec.lora)
    return {
        "data": data,
        "model": hashlib.sha256(msgspec.json.encode(core)).hexdigest()[:32],
        "training": msgspec.json.encode(spec.training).decode(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return {name: version(name) for name in PACKAGES}


def check(found: Found, spec: JobSpec, inputs: dict[str, str], note: Callable[[str, str], None]) -> None:
    """Raise TrainerError if the job is no longer the one that was saved; note what changed harmlessly."""
    saved, name = found.manifest.inputs, found.path.name
    if saved.get("model") != inputs["model"]:
        raise _refuse(
            f"The checkpoint {name} was made with another model, method or adapter than the job names now. "
            "Put the job's settings back, or submit it as a new job."
        )
    if saved.get("data") != inputs["data"]:
        raise _refuse(
            f"The data set is not the one that the checkpoint {name} was trained on, so training cannot go on "
            "where it stood. Put the old data back, or submit the job as a new one."
        )
    before = msgspec.json.decode(saved.get("training", "{}"), type=TrainingSpec)
    for field in TrainingSpec.__struct_fields__:
        old: Any = getattr(before, field)
        new: Any = getattr(spec.training, field)
        if old == new:
            continue
        if field in MUST_MATCH:
            raise _refuse(
                f"training.{field} is {new} but was {old} when the checkpoint {name} was saved, and training "
                f"cannot go on exactly with another. Set it back to {old}, or submit the job as a new one."
            )
        note("warning", f"training.{field} was {old} when the checkpoint was saved and is {new} now.")
    now = versions()
    other = [
        f"{key} {old} then, {now[key]} now"
        for key, old in found.manifest.versions.items()
        if now.get(key) != old
    ]
    if other:
        note(
            "warning",
            f"The checkpoint {name} was saved by other versions ({'; '.join(other)}); "
            "results may differ in their last digits.",
        )


def _refuse(sentence: str) -> TrainerError:
    return TrainerError(FailureReason.CHECKPOINT, sentence)
