"""What a DATA frame carries: the records of an agent and of its jobs.

Lane 0 has the tags 1-15, lane 1 16-23, lane 2 24-31. A record of a job names no job: its stream does.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from protocol.failures import Failure
from protocol.fields import Name, Number, Prose, Values, Word
from protocol.worker import Estimate, Parameters


class Record(msgspec.Struct, frozen=True, array_like=True):
    """Base of every record. ``time`` is when it happened, in Unix seconds by the agent's clock."""


class JobStatus(Record, frozen=True, array_like=True, tag=1):
    """The job has come to ``state``."""

    time: float
    attempt: int
    state: Name
    observed: int = 0
    by: Name = ""
    """Who caused it: user, owner, agent, disk, memory, power, schedule."""
    detail: Prose = ""
    phase: Name = ""
    step: int = 0
    failure: Failure | None = None


class JobFacts(Record, frozen=True, array_like=True, tag=2):
    """What is known once the job is ready to step."""

    time: float
    attempt: int
    total_steps: int
    total_epochs: float
    start_step: int
    train_rows: int
    eval_rows: int
    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    device: Word = ""
    resumed_from: Word = ""
    trainable_parameters: int = 0
    all_parameters: int = 0
    facts: Annotated[dict[Name, Word], Meta(max_length=64)] = {}


class Schema(Record, frozen=True, array_like=True, tag=3):
    """Names for the values of points: sent before any point that uses ``schema_id``."""

    schema_id: int
    names: Annotated[list[Name], Meta(max_length=512)]


class Result(Record, frozen=True, array_like=True, tag=4):
    """The job is complete, and what it left."""

    time: float
    attempt: int
    model_path: Word
    merged_path: Word
    weights_hash: Word
    step: int
    values: Values = {}
    samples: Annotated[list[dict[Name, Prose | float]], Meta(max_length=16)] = []


class Checkpoint(Record, frozen=True, array_like=True, tag=5):
    """A checkpoint is complete on the agent's disk."""

    time: float
    attempt: int
    name: Word
    step: int
    epoch: float
    size: int
    seconds: float
    reason: Name
    eval_loss: Number | None = None
    train_loss: Number | None = None
    is_best: bool = False
    stall: float = 0.0
    """Seconds that training stood still for it."""


class CommandDone(Record, frozen=True, array_like=True, tag=6):
    """The answer to a command: done, refused, expired or unknown (a crash fell between)."""

    time: float
    command_id: Name
    status: Literal["done", "refused", "expired", "unknown"]
    detail: Prose = ""


class Snapshot(Record, frozen=True, array_like=True, tag=7):
    """How the job stands now; after an outage it goes before history, so that the page is current at once."""

    time: float
    attempt: int
    state: Name
    step: int
    epoch: float
    values: Values = {}


class Notice(Record, frozen=True, array_like=True, tag=8):
    """A sentence the user should read."""

    time: float
    level: Literal["info", "warning"]
    text: Prose
    attempt: int = 0


class ParametersApplied(Record, frozen=True, array_like=True, tag=9):
    """Live parameters are in force from ``step`` on."""

    time: float
    attempt: int
    step: int
    parameters: Parameters
    refused: Prose = ""


class JobEstimate(Record, frozen=True, array_like=True, tag=10):
    """What the job will need, said before its first step."""

    time: float
    attempt: int
    estimate: Estimate


class ResumeCheck(Record, frozen=True, array_like=True, tag=11):
    """Steps ``first`` to ``last`` were replayed in a fresh process: equal bit for bit, or by how much not."""

    time: float
    attempt: int
    first: int
    last: int
    equal: bool
    difference: Number = 0.0
    detail: Prose = ""


class Point(Record, frozen=True, array_like=True, tag=16):
    """One point of the curve; the newest attempt's point of a step is the current one."""

    time: float
    attempt: int
    step: int
    epoch: float
    schema_id: int
    values: Annotated[list[Number | None], Meta(max_length=512)]
    trend: Name = ""


class Figures(Record, frozen=True, array_like=True, tag=17):
    """The machine's figures (agent scope)."""

    time: float
    values: Values


class LogChunk(Record, frozen=True, array_like=True, tag=24):
    """Lines of the job's log, from byte ``offset`` of its file on."""

    time: float
    attempt: int
    offset: int
    lines: Annotated[list[Prose], Meta(max_length=4096)]
    dropped: int = 0
    """Lines left out just before these."""

    @property
    def gap(self) -> list[str]:
        """What a reader of the log sees in the place of lines that were left out: one line, or none."""
        return [f"[{self.dropped} lines dropped here]"] if self.dropped > 0 else []


AnyRecord = (
    JobStatus
    | JobFacts
    | Schema
    | Result
    | Checkpoint
    | CommandDone
    | Snapshot
    | Notice
    | ParametersApplied
    | JobEstimate
    | ResumeCheck
    | Point
    | Figures
    | LogChunk
)
