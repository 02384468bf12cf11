"""Out of memory, and what can be done about it without losing a step."""

import errno
import gc
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch

from agent.trainer import memory
from protocol.codec import UNREADABLE
from protocol.failures import FailureReason

WORDS = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""How an allocator says it, where it has no exception of its own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether there was no memory for what was tried; a lost device is another matter."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in WORDS)


def reason_of(error: BaseException) -> FailureReason:
    """Return whose memory it was: the device's, or the machine's."""
    on_device = isinstance(error, torch.OutOfMemoryError) or "CU" in str(error)
    return FailureReason.DEVICE_MEMORY if on_device else FailureReason.HOST_MEMORY


def words_of(error: BaseException) -> str:
    """Return the first line of what the allocator said."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def make_room() -> None:
    """Give back what nothing holds any more. Call where the failed pass's exception is no longer held either."""
    sys.last_exc = None  # type: ignore[attr-defined]  # an interactive hook may have kept the frames, and their tensors
    gc.collect()
    memory.give_back_freed()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_unscaled(scaler: Any) -> None:
    """Let a gradient scaler (or None) divide the gradients of this step again, where its clipping was given up."""
    if scaler is not None:
        # It says itself that it takes two calls in a step for a mistake, and only `update` would make it forget,
        # which also moves the scale.
        scaler._per_optimizer_states.clear()


class RandomStates:
    """Where the random numbers of training stand, and back to there."""

    def __init__(self) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)


def draws_noise(model: Any) -> bool:
    """Tell whether the model drops out: then another cut of a step has other masks."""
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()) or bool(
        getattr(model.config, "attention_dropout", 0.0)
    )


class Asked:
    """At which steps this job has asked for a fresh process, over all its attempts: each step may once."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "fresh-processes.json"

    def for_fresh_process(self, step: int) -> bool:
        """Tell whether ``step`` may have one, and remember that it had."""
        try:
            steps = msgspec.json.decode(self._path.read_bytes(), type=list[int])
        except (FileNotFoundError, *UNREADABLE):
            steps = []
        if step in steps:
            return False
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(f"{self._path.name}.partial")
        with partial.open("wb") as file:
            file.write(msgspec.json.encode([*steps, step]))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)
        return True
