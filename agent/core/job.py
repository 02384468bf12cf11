"""One job: what is remembered of it, and what each trigger makes of it."""

import msgspec

from agent.core.effects import Ask, Effect, EndWorker, Report, StartWorker
from protocol.failures import Failure, FailureReason
from protocol.failures import failure as failed_for
from protocol.lifecycle import (
    HAS_WORKER,
    TERMINAL,
    JobState,
    Trigger,
    Want,
    advance,
    pursue,
)
from protocol.messages import Lane
from protocol.records import JobStatus
from protocol.worker import Cancel, Estimate, Parameters, Pause, Stop, Verified

LOSSES_ALLOWED = 3
"""Lost workers in a row without a new good checkpoint, before the job fails."""
CANCEL_GRACE = 5.0
"""Seconds a worker has to leave by itself after a cancel; it has nothing to save."""
FAULT_GRACE = 10.0
PREPARING_GRACE = 10.0
"""Seconds a worker that has not stepped yet has to leave by itself when it is paused."""


class Job(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A job as the journal keeps it. Only `step` and its helpers here make a new one."""

    job_id: str
    config: str
    """JSON text of the platform's TrainingConfig."""
    dataset_path: str = ""
    dataset_sha256: str = ""
    """Of a data set that the backend serves; empty: `dataset_path` is a place on this machine."""
    dataset_size: int = 0
    name: str = ""
    order: int = 0
    from_backend: bool = False
    created_at: float = 0.0
    started_at: float | None = None
    completed_at: float | None = None
    state: JobState = JobState.QUEUED
    want: Want = Want.RUN
    want_by: str = "user"
    observed: int = 0
    """Newest desired version acted on."""
    by: str = "user"
    held: str = ""
    """Why the agent itself paused the job (shutdown, disk); it goes on when that has passed."""
    detail: str = ""
    phase: str = ""
    attempt: int = 0
    heard: int = 0
    """Newest event of this attempt that is committed."""
    losses: int = 0
    stop_asked: int = 0
    """The attempt whose worker was asked to stop early."""
    checkpoint: str = ""
    """Where the next attempt starts: "" = newest good, "best", or a path."""
    device: str = ""
    worker_pid: int = 0
    worker_created: float = 0.0
    parameters: Parameters = Parameters()
    asked: Parameters = Parameters()
    """Those that the backend last asked for: what it repeats is no news."""
    model_name: str = ""
    method: str = ""
    learning_rate: float = 0.0
    """The highest of the schedule."""
    step: int = 0
    saved_step: int = 0
    epoch: float = 0.0
    total_steps: int = 0
    total_epochs: float = 0.0
    train_rows: int = 0
    eval_rows: int = 0
    batch_size: int = 0
    gradient_accumulation_steps: int = 0
    values: dict[str, float] = {}
    trend: str = ""
    facts: dict[str, str] = {}
    estimate: Estimate | None = None
    resume_check: Verified | None = None
    resumed_from: str = ""
    failure: Failure | None = None
    model_path: str = ""
    merged_path: str = ""
    weights_hash: str = ""
    results: dict[str, float] = {}
    samples: list[dict[str, str | float]] = []
    notes: list[str] = []

    def __repr__(self) -> str:
        return f"<Job {self.job_id} {self.state} want={self.want} attempt={self.attempt} step={self.step}>"


def status(job: Job, now: float) -> JobStatus:
    """Return the record that tells the backend where the job stands."""
    return JobStatus(
        now,
        job.attempt,
        job.state,
        job.observed,
        job.by,
        job.detail,
        job.phase,
        job.step,
        job.failure,
    )


def report(job: Job, now: float) -> Report:
    """Return the effect that does so."""
    return Report(job.job_id, Lane.CONTROL, status(job, now))


def step(
    job: Job,
    trigger: Trigger,
    *,
    now: float,
    by: str = "",
    detail: str = "",
    failure: Failure | None = None,
) -> tuple[Job, list[Effect]]:
    """Return the job after ``trigger``, and what must be done. Late news returns the same job and nothing.

    Raises IllegalTransition for a trigger that the table does not know in this state.
    """
    state = advance(job.state, trigger)
    if state is job.state:
        return job, []
    held = job.state in HAS_WORKER
    change: dict[str, object] = {"state": state, "detail": detail, "phase": ""}
    if by:
        change["by"] = by
    effects: list[Effect] = []
    match state:
        case JobState.PREPARING:
            change |= {
                "attempt": job.attempt + 1,
                "heard": 0,
                "failure": None,
                "started_at": job.started_at or now,
            }
            effects.append(StartWorker(job.job_id))
        case JobState.PAUSING:
            effects.append(Ask(job.job_id, Pause()))
            if job.state is JobState.PREPARING:
                # Nothing is done yet that would have to be saved, and a download would be waited for.
                effects.append(EndWorker(job.job_id, PREPARING_GRACE))
        case JobState.CANCELLING:
            effects += [Ask(job.job_id, Cancel()), EndWorker(job.job_id, CANCEL_GRACE)]
        case JobState.QUEUED:
            change |= {"completed_at": None, "held": ""}
            if trigger is Trigger.RETRY:
                change |= {"want": Want.RUN, "failure": None, "losses": 0}
        case JobState.FAILED:
            change |= {"failure": failure, "detail": detail or (failure.sentence if failure else "")}
            if held:
                effects.append(EndWorker(job.job_id, FAULT_GRACE))
        case _:
            pass
    if state in TERMINAL:
        change |= {"completed_at": now, "held": ""}
    new = msgspec.structs.replace(job, **change)
    return new, [report(new, now), *effects]


def settle(job: Job, *, now: float, by: str = "") -> tuple[Job, list[Effect]]:
    """Bring a job as near to what is wanted of it as one moment allows."""
    effects: list[Effect] = []
    while (trigger := pursue(job.state, job.want)) is not None:
        if job.held and trigger is Trigger.RESUME:
            break
        job, more = step(job, trigger, now=now, by=by or job.want_by)
        effects += more
    if job.want is Want.STOP and job.state is JobState.RUNNING and job.stop_asked != job.attempt:
        job = msgspec.structs.replace(job, stop_asked=job.attempt)
        effects.append(Ask(job.job_id, Stop()))
    return job, effects


def react(
    job: Job,
    trigger: Trigger,
    *,
    now: float,
    by: str = "",
    detail: str = "",
    failure: Failure | None = None,
) -> tuple[Job, list[Effect]]:
    """`step`, then `settle`: what happened, and then what is wanted."""
    job, effects = step(job, trigger, now=now, by=by, detail=detail, failure=failure)
    job, more = settle(job, now=now)
    return job, effects + more


def hold(job: Job, why: str, *, now: float) -> tuple[Job, list[Effect]]:
    """Pause a job for a reason of the agent's own; what the user wants of it stays as it is."""
    if job.state not in (JobState.PREPARING, JobState.RUNNING, JobState.PAUSING):
        return job, []
    job = msgspec.structs.replace(job, held=why)
    return step(job, Trigger.PAUSE, now=now, by="agent", detail=why)


def unhold(job: Job, *, now: float) -> tuple[Job, list[Effect]]:
    """Let a job go on that the agent itself had paused."""
    return settle(msgspec.structs.replace(job, held=""), now=now, by="agent")


def lost(job: Job, *, now: float, why: str, counts: bool = True) -> tuple[Job, list[Effect]]:
    """Return the job after its worker ended without a word: another attempt, or the end of patience.

    ``counts`` is False when the loss is no sign against the job: the agent itself was restarted.
    """
    losses = job.losses + 1 if counts else job.losses
    behind = job.step - job.saved_step
    job = msgspec.structs.replace(job, losses=losses)
    if losses >= LOSSES_ALLOWED and job.state in (JobState.PREPARING, JobState.RUNNING, JobState.FINISHING):
        reason = FailureReason.LOST
        sentence = f"The trainer was lost {losses} times without a new checkpoint; the last time: {why}"
        return react(job, Trigger.FAULT, now=now, by="agent", failure=failed_for(reason, sentence))
    detail = why
    if job.state is JobState.PAUSING and behind > 0:
        detail = f"{why} Paused at the last good checkpoint, {behind} steps back."
    elif job.state in HAS_WORKER and behind > 0 and job.state is not JobState.CANCELLING:
        detail = f"{why} Going on from the last good checkpoint, {behind} steps back."
    return react(job, Trigger.WORKER_LOST, now=now, by="agent", detail=detail)
