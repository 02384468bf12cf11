"""What the core can ask the shell to do."""

from dataclasses import dataclass

from protocol.messages import Lane
from protocol.records import AnyRecord
from protocol.worker import AnyOrder


@dataclass(frozen=True)
class Report:
    """Append a record to the job's stream."""

    job_id: str
    lane: Lane
    record: AnyRecord


@dataclass(frozen=True)
class StartWorker:
    """Start the job's next attempt on its device."""

    job_id: str


@dataclass(frozen=True)
class Ask:
    """Send an order to the job's worker."""

    job_id: str
    order: AnyOrder


@dataclass(frozen=True)
class EndWorker:
    """See the job's worker out: after ``grace`` seconds by force."""

    job_id: str
    grace: float


Effect = Report | StartWorker | Ask | EndWorker
