"""The hosted platform's words and ours: statuses, points of the curve, and what its job rows take.

Pure: facts in, bodies out. `agent.net.platform` sends them.
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from agent.core.job import Job
from protocol import rest
from protocol.codec import BadMessage, Unknown, decode_record, number
from protocol.lifecycle import TERMINAL, JobState, Want
from protocol.records import AnyRecord, Checkpoint, JobFacts, JobStatus, LogChunk, Point, Result
from protocol.rest import PlatformStatus

# A claimed job is `running` there, and one that waits for another attempt after a lost worker is no failure.
STATUS: dict[JobState, PlatformStatus] = {**rest.STATUS, JobState.QUEUED: "running"}
"""What `PATCH .../status` is told: the only words that it takes."""

COLUMNS = (
    "train_loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "gpu_memory_allocated_gb",
    "gpu_memory_reserved_gb",
    "gpu_utilization_percent",
    "perplexity",
    "train_perplexity",
    "samples_per_second",
    "tokens_per_second",
    "best_eval_loss",
    "best_epoch",
    "best_step",
    "epochs_without_improvement",
)
"""Numbers of a metric point."""
WHOLE = frozenset({"best_epoch", "best_step", "epochs_without_improvement"})
LIVE = {
    "loss": "train_loss",
    **{
        name: name
        for name in (
            "eval_loss",
            "learning_rate",
            "grad_norm",
            "samples_per_second",
            "perplexity",
            "train_perplexity",
            "gpu_memory_allocated_gb",
            "gpu_memory_reserved_gb",
            "gpu_utilization_percent",
            "epochs_without_improvement",
        )
    },
}
"""Figures of a job's row that stand above its chart, and the values of ours that they are."""
CARRIED = (
    "eval_loss",
    "perplexity",
    "best_eval_loss",
    "best_epoch",
    "best_step",
    "epochs_without_improvement",
    "loss_trend",
)
"""The platform takes its summary of a job from a batch's highest step, and what that lacks it sets to null."""


def record_of(body: bytes | None) -> AnyRecord | Unknown | None:
    """Return a stored record, or None for one that cannot be read any more."""
    try:
        return decode_record(body) if body is not None else None
    except BadMessage:
        return None


def plain(body: Any) -> Any:
    """Return a body without the one character that the platform's tables refuse: with it no write ever arrives."""
    match body:
        case str():
            return body.replace("\x00", "")
        case dict():
            return {name: plain(value) for name, value in body.items()}
        case list():
            return [plain(value) for value in body]
        case _:
            return body


def iso(seconds: float) -> str:
    """Return a time as the platform writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def row_of(point: Point, names: list[str]) -> dict[str, Any]:
    """Return a point of ours as one of the platform's; it takes finite numbers and whole epochs only."""
    row: dict[str, Any] = {
        "step": point.step,
        "epoch": int(point.epoch) if math.isfinite(point.epoch) else 0,
        "timestamp": iso(point.time),
    }
    for name, value in zip(names, point.values, strict=False):
        if name not in COLUMNS or value is None:
            continue
        plain = _float(value)
        if math.isfinite(plain):
            row[name] = int(plain) if name in WHOLE else plain
    if point.trend:
        row["loss_trend"] = point.trend
    return row


def _float(value: float | str) -> float:
    found = number(value)
    assert found is not None
    return found


def kind_of(row: Mapping[str, Any]) -> str:
    """Return "eval" for a point of an evaluation alone, else "train". Also for the platform's own rows."""
    return "eval" if row.get("eval_loss") is not None and row.get("learning_rate") is None else "train"


def carry(rows: list[dict[str, Any]], carried: dict[str, Any]) -> dict[str, Any]:
    """Put the newest evaluation's values on the highest step of ``rows``, and return what to carry on.

    On each point of that step: which of two the platform takes is not written anywhere. Only where an evaluation
    has been: nothing is made up.
    """
    highest = max(int(row["step"]) for row in rows)
    for row in rows:
        carried = carried | {name: row[name] for name in CARRIED if name in row}
    for row in rows:
        if row["step"] == highest:
            row |= {name: value for name, value in carried.items() if name not in row}
    return carried


def blank(rows: list[dict[str, Any]]) -> bool:
    """Tell whether the platform's summary is taken from a point without the figures of training: it empties them."""
    highest = max((int(row["step"]) for row in rows), default=0)
    return any(kind_of(row) == "eval" for row in rows if row["step"] == highest)


def live(job: Job) -> dict[str, Any]:
    """Return how a job stands now, for its row; empty before its first step."""
    if not job.step and not job.values:
        return {}
    fields: dict[str, Any] = {"current_step": job.step}
    if math.isfinite(job.epoch):
        fields["current_epoch"] = int(job.epoch)
    for column, name in LIVE.items():
        if name in job.values:
            value = job.values[name]
            # A loss that is no number is shown as none: the one before it would be untrue.
            fields[column] = (int(value) if name in WHOLE else value) if math.isfinite(value) else None
    if job.trend:
        fields["loss_trend"] = job.trend
    if job.total_steps > 0 and job.state not in TERMINAL:
        fields["progress"] = min(100, 100 * job.step // job.total_steps)
    return fields


def lines_of(chunk: LogChunk) -> list[str]:
    """Return a piece of log as lines, with one for those that were left out."""
    return [*chunk.gap, *(line.replace("\x00", "") for line in chunk.lines)]


def fields_of(record: object, newest: Mapping[str, float | str] | None = None) -> dict[str, Any]:
    """Return what a record says that only the jobs route can store; empty where there is nothing.

    ``newest`` are the newest values of the job's curve.
    """
    match record:
        case JobFacts():
            return {
                "total_steps": record.total_steps,
                "total_epochs": math.ceil(record.total_epochs),
                "total_samples": record.train_rows + record.eval_rows,
                "train_samples": record.train_rows,
                "val_samples": record.eval_rows,
                "batch_size": record.batch_size,
                "gradient_accumulation_steps": record.gradient_accumulation_steps,
                "max_learning_rate": record.learning_rate,
                **({"resume_from_checkpoint": record.resumed_from} if record.resumed_from else {}),
            }
        case Checkpoint(is_best=True) if record.eval_loss is not None:
            return _finite(
                {
                    "best_eval_loss": record.eval_loss,
                    "best_step": record.step,
                    "best_epoch": int(record.epoch),
                }
            )
        case Result():
            values = {**(newest or {}), **record.values}
            ends = {"final_loss": values.get("train_loss"), "final_eval_loss": values.get("eval_loss")}
            return {"progress": 100, "current_step": record.step} | _finite(ends)
        case JobStatus(state="failed") if record.failure is not None:
            return {"error_message": record.failure.sentence}
        case JobStatus(state="failed"):
            return {"error_message": record.detail or "Training failed"}
        case _:
            return {}


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: _float(value) for name, value in values.items() if value is not None}
    return {
        name: int(value) if name in WHOLE else value for name, value in found.items() if math.isfinite(value)
    }


def name_of(offered: Mapping[str, Any]) -> str:
    """Return what the platform calls a job: the first of the names that its page looks for."""
    config = offered.get("config")
    config = config if isinstance(config, dict) else {}
    metadata = config.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    training = config.get("training")
    training = training if isinstance(training, dict) else {}
    places = (
        metadata.get("job_name"),
        metadata.get("jobName"),
        config.get("job_name"),
        config.get("jobName"),
        training.get("job_name"),
        training.get("package_name"),
        config.get("name"),
        offered.get("model_name"),
    )
    return next((place for place in places if isinstance(place, str) and place), "")


def obey(job: Job, said: str, before: str) -> Want | None:
    """Return what the platform's status asks of a job; ``before`` is the last status known there.

    What we wrote ourselves asks for nothing. `completed` and `failed` are not the platform's to say of a job
    that lives here: a sweep of its own sets them, and whoever sees them there puts them right.
    """
    if job.state in TERMINAL or said == before:
        return None
    match said:
        case "cancelled":
            return Want.CANCEL
        case "paused":
            return None if job.state is JobState.PAUSED else Want.PAUSE
        case "running" | "queued" | "pending":
            return Want.RUN if before == "paused" else None
        case _:
            return None


class Memo(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What the agent must remember of a job at a platform that numbers nothing. Stored with each acknowledgement."""

    train: int = -1
    """The highest step that it holds a point of."""
    eval: int = -1
    attempt: int = 0
    """The attempt that the newest of them is of."""
    rows: int = 0
    """Points that it holds of ours, at least."""
    lines: int = -1
    """Log lines that it holds; -1 before the first of ours: somebody may have written there before."""
    ahead: int = 0
    """Of the log lines that come next: how many it holds already, stored by an append that nobody answered."""
    status: str = ""
    """The last status known there."""
    started: bool = False
    """Whether it was told when the job began."""
    error: bool = False
    """Whether it shows an error."""
    carried: dict[str, Any] = {}
    refused: str = ""
    """The job's status here, which its table does not store; said again, because it may have been a bad hour."""
    owes: bool = False
    """Whether the figures above its chart are older than the job, or empty."""
    begun: tuple[int, int] = (0, 0)
    """The newest attempt, and from which step it went on."""
    remade: int = 0
    """The attempt of which its user was told that it makes steps again."""
    until: float = 0.0
    """When nothing that was sent may still be stored any more, by the wall clock; 0 where all was answered."""

    def fresh(self, row: Mapping[str, Any]) -> bool:
        """Tell whether the platform lacks this point.

        Steps only rise there: those that are made again after a lost worker are in the chart already.
        """
        return int(row["step"]) > (self.eval if kind_of(row) == "eval" else self.train)

    def holds(self, row: Mapping[str, Any]) -> None:
        """Note that the platform has this point."""
        step = int(row["step"])
        if kind_of(row) == "eval":
            self.eval = max(self.eval, step)
        else:
            self.train = max(self.train, step)

    def knows(self, other: "Memo") -> None:
        """Take over which points the platform has."""
        self.train, self.eval, self.rows = other.train, other.eval, other.rows
        self.attempt, self.carried = other.attempt, other.carried
