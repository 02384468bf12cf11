"""What the doors (socket, local API, command line) ask of the agent; `app.py` wires it."""

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from protocol.failures import Failure
from protocol.lifecycle import JobState, Want
from protocol.messages import Command, CommandKind, Desired, Hello
from protocol.session import Key
from protocol.worker import Estimate, Parameters, Verified


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it is shown. Times in Unix seconds; ``values`` are the newest of each metric."""

    job_id: str
    name: str
    state: JobState
    want: Want
    by: str
    """Who caused the state: user, owner, agent, disk, ..."""
    detail: str
    phase: str
    attempt: int
    model_name: str
    dataset_path: str
    method: str
    created_at: float
    started_at: float | None = None
    completed_at: float | None = None
    queue_position: int | None = None
    device: str = ""
    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    total_epochs: float = 0.0
    train_rows: int = 0
    eval_rows: int = 0
    batch_size: int = 0
    gradient_accumulation_steps: int = 0
    values: dict[str, float] = {}
    trend: str = ""
    facts: dict[str, str] = {}
    resumed_from: str = ""
    branched_from: str = ""
    estimate: Estimate | None = None
    resume_check: Verified | None = None
    model_path: str = ""
    merged_path: str = ""
    weights_hash: str = ""
    failure: Failure | None = None
    notes: list[str] = []
    results: dict[str, float] = {}
    samples: list[dict[str, str | float]] = []


class PointView(msgspec.Struct, frozen=True, kw_only=True):
    """One point of the curve, of the newest attempt that reached its step."""

    step: int
    epoch: float
    time: float
    attempt: int
    values: dict[str, float]
    trend: str = ""


class CheckpointView(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint on disk, in the platform's field names."""

    path: str
    epoch: float
    step: int
    eval_loss: float | None
    train_loss: float | None
    size_bytes: int
    created_at: str
    is_best: bool
    is_latest: bool
    is_pinned: bool = False


class LogPage(msgspec.Struct, frozen=True, kw_only=True):
    """Lines of a job's log from line ``offset`` on."""

    logs: list[str]
    total_lines: int
    offset: int
    limit: int


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """How the agent is. ``link``: connected, connecting, refused, or off where no backend is set."""

    status: str
    version: str
    agent_id: str
    link: str
    link_detail: str
    active_jobs: int
    queued_jobs: int
    gpu_available: bool
    gpu_info: dict[str, Any]
    backlog: list[int]
    """Records not yet acknowledged, per lane."""
    uptime_seconds: float
    draining: bool


class Desk(Protocol):
    """The one meaning behind both doors. Raises UnknownJob, NotPossible and BadJob, with sentences."""

    async def submit(
        self,
        config: Mapping[str, Any],
        *,
        job_id: str = "",
        dataset_path: str = "",
        name: str = "",
        dataset_content: str | None = None,
        by: str = "owner",
    ) -> str:
        """Take a job in the platform's TrainingConfig; return its id. The same id again changes nothing."""
        ...

    def job(self, job_id: str) -> JobView: ...

    def jobs(self) -> list[JobView]: ...

    async def want(
        self,
        job_id: str,
        want: Want,
        *,
        checkpoint: str = "",
        accept_changes: bool = False,
        by: str = "owner",
    ) -> str:
        """Write what is wanted of a job; return a sentence on what happens now. ``checkpoint``: "", "best" or a path."""
        ...

    async def retry(
        self, job_id: str, *, checkpoint: str = "", accept_changes: bool = False, by: str = "owner"
    ) -> str: ...

    async def branch(
        self,
        job_id: str,
        *,
        checkpoint: str = "",
        adjustments: Mapping[str, Any],
        new_id: str = "",
        name: str = "",
        by: str = "owner",
    ) -> str:
        """Take a new job that begins with a checkpoint of this one; return its id."""
        ...

    async def pin(self, job_id: str, checkpoint: str, pinned: bool) -> list[CheckpointView]:
        """Keep a checkpoint from being deleted, or no more; return all of them as they are now."""
        ...

    async def move_to_front(self, job_id: str) -> int:
        """Put a queued job first (a failed or cancelled one is queued again); return its queue position."""
        ...

    async def set_parameters(self, job_id: str, parameters: Parameters, *, by: str = "owner") -> str: ...

    async def command(self, job_id: str, kind: CommandKind, *, by: str = "owner") -> str: ...

    async def logs(self, job_id: str, limit: int, offset: int) -> LogPage: ...

    async def points(self, job_id: str, after_step: int = -1, limit: int = 1000) -> list[PointView]: ...

    async def checkpoints(self, job_id: str) -> list[CheckpointView]: ...

    def health(self) -> Health: ...


class Uplink(Protocol):
    """What the link asks of the agent: its records, and what to do with what the backend says."""

    async def hello(self) -> Hello:
        """Return the first frame of a new connection; counts a dial."""
        ...

    async def outrun(self, boot: int, attempt: int) -> None:
        """Say more than this pair in the next HELLO: it owns the agent's id, and this disk has forgotten it."""
        ...

    async def read(self, key: Key, after: int, max_bytes: int) -> list[tuple[int, bytes | None]]:
        """Return (number, body) of stored records in order; a body of None cannot be read any more."""
        ...

    def heads(self) -> Mapping[Key, int]:
        """Return the last number of every stream that has something to send."""
        ...

    def backlog(self) -> list[int]:
        """Return how many records of each lane are not acknowledged."""
        ...

    async def acked(self, key: Key, seq: int) -> None: ...

    async def dropped(self, key: Key, reason: str) -> None:
        """Delete what is held of a stream that the backend takes no more of.

        On a connection also what is added to it until that ends: there a stream is refused once.
        """
        ...

    def ended(self) -> None:
        """Note that the connection is over for which `hello` was asked."""
        ...

    async def buried(self, key: Key, reason: str) -> None:
        """Take in that the backend will never have some records of a stream: a tombstone went in their place."""
        ...

    async def welcomed(self, server_time: float) -> None: ...

    async def desired(self, message: Desired) -> None: ...

    async def commanded(self, message: Command) -> None: ...
