"""The counters of a job. They lie in each checkpoint, so that a resumed job counts on as if never touched."""

import math
from pathlib import Path

import msgspec

from protocol.jobspec import TrainingSpec
from protocol.worker import Limits, Parameters

FILE = "progress.msgpack"
WINDOW = 10
"""Train losses that the trend is read from."""
FEWEST = 5
TOLERANCE = 0.05


class Progress(msgspec.Struct, kw_only=True):
    """What has been counted so far."""

    tokens_seen: int = 0
    elapsed: float = 0.0
    """Seconds of all attempts."""
    window_loss: float = 0.0
    """Sum of the step losses since the last point of the curve."""
    window_steps: int = 0
    window_tokens: int = 0
    window_samples: int = 0
    window_seconds: float = 0.0
    recent: list[float] = []
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_step: int = -1
    """Step of the last evaluation."""
    initial_eval_loss: float | None = None
    best_eval_loss: float | None = None
    best_step: int = 0
    best_epoch: float = 0.0
    without_improvement: int = 0
    owed: dict[str, float] | None = None
    """An evaluation that a pause put off, with the train values of that step; done first after the resume."""
    ended: str = ""
    """Why training ended before its last step, if it did: stop or early_stopping."""
    parameters: Parameters = Parameters()
    """Live parameters in force."""
    samples: list[dict[str, str | float]] = []
    """The samples before training."""

    def save(self, folder: Path) -> None:
        (folder / FILE).write_bytes(msgspec.msgpack.encode(self))

    @classmethod
    def load(cls, folder: Path) -> "Progress":
        return msgspec.msgpack.decode((folder / FILE).read_bytes(), type=cls)

    def add_train_loss(self, loss: float) -> None:
        self.train_loss = loss
        self.recent = [*self.recent, loss][-WINDOW:]

    def add_eval_loss(self, loss: float, step: int, epoch: float, threshold: float) -> bool:
        """Count an evaluation; return whether it is the best so far."""
        self.eval_loss, self.eval_step = loss, step
        before = self.best_eval_loss
        improved = before is None or before - loss > threshold
        self.without_improvement = 0 if improved else self.without_improvement + 1
        if not math.isfinite(loss) or (before is not None and loss >= before):
            return False
        self.best_eval_loss, self.best_step, self.best_epoch = loss, step, epoch
        return True

    def trend(self) -> str:
        """Return improving, degrading, stable or insufficient_data: the newer half of the losses against the older."""
        if len(self.recent) < FEWEST:
            return "insufficient_data"
        middle = len(self.recent) // 2
        older = sum(self.recent[:middle]) / middle
        newer = sum(self.recent[middle:]) / (len(self.recent) - middle)
        if abs(newer - older) <= TOLERANCE * abs(older):
            return "stable"
        return "improving" if newer < older else "degrading"


class Schedule(msgspec.Struct, kw_only=True):
    """When to log, evaluate and save. Live parameters change it."""

    logging_steps: int
    save_steps: int
    save_total_limit: int
    eval_strategy: str
    eval_steps: int
    patience: int | None
    threshold: float

    @classmethod
    def of(cls, training: TrainingSpec, limits: Limits) -> "Schedule":
        """Return the schedule that a job asks for; the owner's settings stand in for what it does not name."""
        return cls(
            logging_steps=training.logging_steps or limits.logging_steps,
            save_steps=training.save_steps or limits.save_steps,
            save_total_limit=training.save_total_limit,
            eval_strategy=training.eval_strategy,
            eval_steps=training.eval_steps,
            patience=training.early_stopping_patience,
            threshold=training.early_stopping_threshold,
        )

    def evaluates(self, step: int, epoch: float) -> bool:
        if self.eval_strategy == "epoch":
            return epoch.is_integer()  # the share of the last step of an epoch is exactly one
        return self.eval_strategy == "steps" and step % self.eval_steps == 0


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity where that is no number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
