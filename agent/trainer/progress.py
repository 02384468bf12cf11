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
GREATER = ("rewards_accuracy", "rewards_margin", "rewards_chosen")
"""Measures of which more is better."""


TRAIL = 64
"""Steps whose losses are kept one by one."""


class Place(msgspec.Struct, kw_only=True):
    """Where in the data training stands, and how many rows it takes at once. Counted in rows, so that the size
    of a batch can change on the way."""

    epoch: int = 0
    rows: int = 0
    """Rows of this epoch's order that are behind."""
    micro: int = 0
    """Rows of a micro-batch; 0: not begun."""
    step_rows: int = 0
    """Rows of an optimizer step: the effective batch."""
    order: int = 0
    """How often the order of rows was begun anew, because the rows or what orders them had changed."""
    stream_rows: int = 0
    """Rows of a stream, once it has been read to its end."""
    digest: str = ""
    """Of a stream: what the rows of this epoch that are behind hash to."""

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return -(-self.step_rows // max(1, self.micro))


class Progress(msgspec.Struct, kw_only=True):
    """What has been counted so far."""

    place: Place = msgspec.field(default_factory=Place)
    trail: list[tuple[int, float]] = []
    """(step, loss) of the last steps, each by itself."""
    eval_batch: int = 0
    """Rows of a held-out batch, where fewer than the job's fitted; 0: the job's."""

    tokens_seen: int = 0
    elapsed: float = 0.0
    """Seconds of all attempts."""
    window_loss: float = 0.0
    """Sum of the step losses since the last point of the curve."""
    window_steps: int = 0
    window_tokens: int = 0
    window_samples: int = 0
    window_measures: list[float] = []
    """Sums of what a method measures beside the loss."""
    window_seconds: float = 0.0
    recent: list[float] = []
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_step: int = -1
    """Step of the last evaluation."""
    initial_eval_loss: float | None = None
    best_value: float | None = None
    """Of the metric that the job names."""
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

    def add_evaluation(
        self, measures: dict[str, float], step: int, epoch: float, schedule: "Schedule"
    ) -> bool:
        """Count an evaluation; return whether it is the best so far, by the job's metric."""
        value = measures[schedule.metric]
        self.eval_loss, self.eval_step = measures["eval_loss"], step
        # What is better is smaller from here on.
        sign = -1.0 if schedule.metric.removeprefix("eval_") in GREATER else 1.0
        before = None if self.best_value is None else sign * self.best_value
        improved = before is None or before - sign * value > schedule.threshold
        self.without_improvement = 0 if improved else self.without_improvement + 1
        if not math.isfinite(value) or (before is not None and sign * value >= before):
            return False
        self.best_value, self.best_eval_loss = value, self.eval_loss
        self.best_step, self.best_epoch = step, epoch
        return True

    def add_steps(self, losses: list[tuple[int, float]]) -> None:
        """Keep the losses of the newest steps."""
        self.trail = [*self.trail, *losses][-TRAIL:]

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
    metric: str = "eval_loss"
    """By which the best checkpoint is chosen and early stopping counts."""
    load_best: bool = False
    """Whether the final model is made of the best checkpoint also after the last step."""
    on_bad_loss: str = "fail"
    spike_factor: float | None = None
    max_rewinds: int = 3

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
            metric=training.metric_for_best,
            load_best=training.load_best_at_end,
            on_bad_loss=training.on_bad_loss,
            spike_factor=training.spike_factor,
            max_rewinds=training.max_rewinds,
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
