"""What the hub holds of a job and of an agent. Stored as one MessagePack document each."""

from typing import Any

import msgspec

from protocol.failures import Failure
from protocol.lifecycle import TERMINAL, JobState, Want
from protocol.messages import DatasetRef, Machine
from protocol.rest import STATUS
from protocol.worker import Estimate, Parameters

KEPT_NOTES = 100


class Note(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A sentence the user should read."""

    time: float
    level: str
    text: str


class Job(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A job as the hub knows it. Times in Unix seconds; those of events by the agent's clock."""

    id: str
    created_at: float
    updated_at: float
    token: str
    config: str
    """The submitted TrainingConfig as JSON text."""
    name: str = ""
    model_name: str = ""
    method: str = "sft"
    dataset_path: str = ""
    dataset: DatasetRef | None = None
    dataset_id: str = ""

    agent_id: str | None = None
    taken: bool = False
    """The agent has shown that it holds the job."""
    claimed_at: float | None = None

    state: JobState = JobState.QUEUED
    attempt: int = 0
    by: str = ""
    detail: str = ""
    phase: str = ""
    started_at: float | None = None
    completed_at: float | None = None
    failure: Failure | None = None
    error: str = ""
    before_retry: JobState | None = None

    want: Want = Want.RUN
    version: int = 1
    """Of what is wanted: grows with every control message."""
    observed: int = 0
    reason: str = ""
    checkpoint: str = ""
    accept_changes: bool = False
    """The user's word for the next start; spent with the next checkpoint."""
    branched_from: str = ""
    """The job that this one begins with a checkpoint of."""
    parameters: Parameters = Parameters()
    applied: Parameters = Parameters()
    parameter_updates: list[dict[str, Any]] = []
    last_parameter_update_at: float | None = None

    total_steps: int | None = None
    total_epochs: float | None = None
    total_samples: int | None = None
    train_samples: int | None = None
    val_samples: int | None = None
    total_tokens_processed: int | None = None
    batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    max_learning_rate: float | None = None
    num_gpus: int | None = None
    distributed_strategy: str | None = None
    device: str = ""
    facts: dict[str, str] = {}
    resumed_from: str = ""
    estimate: Estimate | None = None
    resume_check: dict[str, Any] | None = None
    """What the replay after the last resume found."""

    step: int = 0
    step_attempt: int = 0
    """The attempt that reached `step`; a state may say so ahead of its points."""
    epoch: float = 0.0
    figures_attempt: int = 0
    figures_step: int = 0
    """Of the newest point, whose values are in `figures`."""
    figures_time: float | None = None
    figures: dict[str, float | None] = {}
    """The newest value of each name."""
    trend: str = ""
    best_checkpoint_path: str = ""

    results: dict[str, float | None] = {}
    samples: list[dict[str, Any]] = []
    model_path: str = ""
    merged_path: str = ""
    weights_hash: str = ""
    final_step: int | None = None

    notes: list[Note] = []
    log_lines: int = 0
    last_log_update: float | None = None
    unknown_records: int = 0
    unreadable_records: int = 0
    buried_records: int = 0

    @property
    def live(self) -> bool:
        return self.state not in TERMINAL

    @property
    def status(self) -> str:
        """The platform's word; a job that no agent has taken is pending there."""
        if self.state is JobState.QUEUED and not self.taken:
            return "pending"
        return STATUS[self.state]

    def note(self, time: float, level: str, text: str) -> None:
        self.notes = [*self.notes, Note(time=time, level=level, text=text)][-KEPT_NOTES:]


class Agent(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A training agent as the hub knows it."""

    id: str
    registered_at: float
    last_seen: float
    install_id: str = ""
    boot: int = 0
    attempt: int = 0
    """The highest (boot, attempt) that said hello: it owns the id."""
    hostname: str | None = None
    platform: str | None = None
    version: str | None = None
    machine: Machine | None = None
    features: list[str] = []
    figures: dict[str, float | None] = {}
    figures_time: float | None = None
    last_poll_at: float | None = None
    disconnected_at: float | None = None
    bye: str = ""
    bye_until: float = 0.0
    notes: list[Note] = []

    @property
    def capacity(self) -> int:
        """Jobs it may hold at a time: what it runs, and one that waits."""
        return (self.machine.max_concurrent_jobs if self.machine else 1) + 1

    def can_run(self, method: str) -> bool:
        return self.machine is None or not self.machine.methods or method in self.machine.methods

    def note(self, time: float, level: str, text: str) -> None:
        self.notes = [*self.notes, Note(time=time, level=level, text=text)][-KEPT_NOTES:]
