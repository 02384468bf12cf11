"""One job: what is remembered of it, and what each trigger makes of it."""

from typing import Literal

import msgspec

from agent.core.effects import Ask, Effect, EndWorker, Report, StartWorker
from agent.core.merging import Merge
from agent.core.outbox import WORD, cut
from protocol.failures import Evidence, Failure, FailureReason
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
from protocol.records import JobStatus, Notice
from protocol.worker import Cancel, Estimate, Parameters, Pause, Stop, Verified

LOSSES_ALLOWED = 3
"""Lost workers in a row without a new good checkpoint, before the job fails."""
FRESH_ALLOWED = 100
"""Times that a worker may ask for a fresh process at one and the same step: it has narrower limits of its own."""
MEMORY_PAUSES = 3
"""Times in a row that a job goes on by itself after it was paused for lack of host memory."""
MEMORY_CALM = 3600.0
"""Seconds between two such pauses after which the first counts no more."""
NOTES_KEPT = 50
BY_HAND = ("user", "owner")
CANCEL_GRACE = 5.0
"""Seconds a worker has to leave by itself after a cancel; it has nothing to save."""
FAULT_GRACE = 10.0
PREPARING_GRACE = 10.0
"""Seconds a worker that has not stepped yet has to leave by itself when it is paused."""


FREE: dict[str, object] = {"held": "", "held_for": "", "room": 0}
UNTRIED: dict[str, object] = {
    "losses": 0,
    "exits": [],
    "stalled_step": -1,
    "fresh_step": -1,
    "fresh_count": 0,
    "full_step": -1,
    "memory_pauses": 0,
}
"""The counts of what went wrong, as they are before an attempt was made."""


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
    held_for: str = ""
    """disk or memory: what the job waits for while it is held. Whoever resumes it by hand goes before that."""
    room: int = 0
    """Bytes of that which must be free before it goes on by itself; 0: never by itself."""
    full_step: int = -1
    """The newest checkpoint's step when a disk was last full."""
    memory_pauses: int = 0
    memory_paused_at: float = 0.0
    detail: str = ""
    phase: str = ""
    attempt: int = 0
    heard: int = 0
    """Newest event of this attempt that is committed."""
    losses: int = 0
    exits: list[str] = []
    """How the workers that count as lost ended."""
    stalled_step: int = -1
    """The step at which a worker last stood still for too long."""
    fresh_step: int = -1
    fresh_count: int = 0
    saved_bytes: int = 0
    """Of the newest checkpoint."""
    stop_asked: int = 0
    """The attempt whose worker was asked to stop early."""
    checkpoint: str = ""
    """Where the next attempt starts: "" = newest good, "best", or a path."""
    accept_changes: bool = False
    """The user's word for the next start: go on although inputs have changed. Spent with the next checkpoint."""
    branched_from: str = ""
    """The job that this one begins with a checkpoint of."""
    device: str = ""
    worker_pid: int = 0
    worker_created: float = 0.0
    parameters: Parameters = Parameters()
    applied: list[tuple[int, Parameters]] = []
    """Those that trainers have put in force, each from its step on: another attempt replays them there."""
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
    merge: Merge | None = None
    """Points that are held back while the outbox is over its quota."""
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
            change |= {"completed_at": None, **FREE}
            if trigger is Trigger.RETRY:
                change |= {"want": Want.RUN, "failure": None, **UNTRIED}
        case JobState.FAILED:
            change |= {"failure": failure, "detail": detail or (failure.sentence if failure else "")}
            if held:
                effects.append(EndWorker(job.job_id, FAULT_GRACE))
        case _:
            pass
    if state in TERMINAL:
        change |= {"completed_at": now, **FREE}
    new = msgspec.structs.replace(job, **change)
    return new, [report(new, now), *effects]


def settle(job: Job, *, now: float, by: str = "") -> tuple[Job, list[Effect]]:
    """Bring a job as near to what is wanted of it as one moment allows."""
    effects: list[Effect] = []
    while (trigger := pursue(job.state, job.want)) is not None:
        if job.held and trigger is Trigger.RESUME:
            if not (job.held_for and by in BY_HAND):
                break
            job = msgspec.structs.replace(job, memory_pauses=0)
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


def note(job: Job, level: Literal["info", "warning"], text: str, *, now: float) -> tuple[Job, Report]:
    """Return the job with a sentence for the user kept, and the effect that tells it."""
    text = cut(text, WORD)
    kept = [*job.notes, text][-NOTES_KEPT:]
    told = Notice(now, level, text, job.attempt)
    return msgspec.structs.replace(job, notes=kept), Report(job.job_id, Lane.CONTROL, told)


# Pausing for reasons of the agent's own


def hold(
    job: Job, why: str, *, now: float, cause: str = "", room: int = 0, by: str = ""
) -> tuple[Job, list[Effect]]:
    """Pause a job for a reason of the agent's own; what the user wants of it stays as it is.

    ``cause`` is disk or memory where it waits until ``room`` bytes of that are free.
    """
    if job.state not in (JobState.PREPARING, JobState.RUNNING, JobState.PAUSING) or job.held_for:
        return job, []
    job = msgspec.structs.replace(job, held=why, held_for=cause, room=room)
    return step(job, Trigger.PAUSE, now=now, by=by or cause or "agent", detail=why)


def unhold(job: Job, *, now: float, why: str = "") -> tuple[Job, list[Effect]]:
    """Let a job go on that the agent itself had paused; ``why`` is told to the user."""
    by = job.held_for or "agent"
    job, effects = settle(msgspec.structs.replace(job, **FREE), now=now, by=by)
    if not why or job.state is JobState.PAUSED:
        return job, effects
    job, told = note(job, "info", why, now=now)
    return job, [*effects, told]


def short_of_memory(job: Job, why: str, *, room: int, now: float) -> tuple[Job, list[Effect]]:
    """Pause a job before the machine runs out of memory; after a few such pauses in a row, for good."""
    calm = now - job.memory_paused_at > MEMORY_CALM
    pauses = 1 if calm else job.memory_pauses + 1
    if pauses > MEMORY_PAUSES:
        room = 0
        why += (
            f" It was paused for this {MEMORY_PAUSES} times before and filled the memory again, so it stays "
            "paused until somebody resumes it."
        )
    else:
        why += f" It goes on by itself when {room / (1 << 30):.1f} GB are free; resume it to try at once."
    new, effects = hold(job, why, now=now, cause="memory", room=room)
    if new is job:
        return job, []
    return msgspec.structs.replace(new, memory_pauses=pauses, memory_paused_at=now), effects


def rest(job: Job, cause: str, why: str, *, room: int, now: float) -> tuple[Job, list[Effect]]:
    """Return a job whose worker has left for lack of ``cause`` (disk): paused until ``room`` bytes are free."""
    behind = job.step - job.saved_step
    job = msgspec.structs.replace(job, full_step=job.saved_step)
    if behind > 0:
        why = f"{why} The last good checkpoint is {behind} steps back."
    if job.state is JobState.PAUSING and job.want is Want.PAUSE:
        # It was to be paused anyway: who asked for that may end it.
        return react(job, Trigger.RELEASED, now=now, detail=why)
    path = {JobState.PAUSING: [], JobState.FINISHING: [Trigger.WORKER_LOST]}.get(job.state, [Trigger.PAUSE])
    effects: list[Effect] = []
    last = Trigger.PAUSE if job.state is JobState.FINISHING else Trigger.RELEASED
    for trigger in [*path, last]:
        job, more = step(job, trigger, now=now, by=cause, detail=why)
        # The worker is gone: there is nobody to be asked for anything.
        effects += [effect for effect in more if isinstance(effect, Report)]
    job = msgspec.structs.replace(job, held=why, held_for=cause, room=room)
    job, more = settle(job, now=now)
    return job, [*effects, *more]


def fresh(job: Job, *, now: float) -> tuple[Job, list[Effect]]:
    """Return a job whose worker has left in order to go on in a fresh process; it has told the user why."""
    count = job.fresh_count + 1 if job.step == job.fresh_step else 1
    job = msgspec.structs.replace(job, fresh_step=job.step, fresh_count=count)
    if count > FRESH_ALLOWED and job.state is not JobState.PAUSING:
        sentence = (
            f"The trainer asked for a fresh process {count} times at step {job.step} and came no further."
        )
        cause = failed_for(FailureReason.LOST, sentence)
        return react(job, Trigger.FAULT, now=now, by="agent", failure=cause)
    trigger = Trigger.RELEASED if job.state is JobState.PAUSING else Trigger.WORKER_LOST
    return react(job, trigger, now=now, by="agent", detail="Training goes on in a fresh process.")


def lost(
    job: Job,
    *,
    now: float,
    why: str,
    counts: bool = True,
    reason: FailureReason = FailureReason.LOST,
    evidence: Evidence | None = None,
) -> tuple[Job, list[Effect]]:
    """Return the job after its worker ended without a word: another attempt, or the end of patience.

    ``counts`` is False when the loss is no sign against the job: the agent itself was restarted. ``reason``
    is what the failure will be called: also killed by a signal, for lack of memory, by the driver, or stalled.
    """
    behind = job.step - job.saved_step
    again = reason is FailureReason.STALLED and job.step <= job.stalled_step
    if counts:
        job = msgspec.structs.replace(job, losses=job.losses + 1, exits=[*job.exits, why][-LOSSES_ALLOWED:])
    if reason is FailureReason.STALLED:
        job = msgspec.structs.replace(job, stalled_step=job.step)
    over = job.losses >= LOSSES_ALLOWED or again
    if over and job.state in (JobState.PREPARING, JobState.RUNNING, JobState.FINISHING):
        if again:
            sentence = f"Training stood still twice without any progress; the last time: {why}"
        else:
            sentence = (
                f"The trainer was lost {job.losses} times without a new checkpoint; the last time: {why}"
            )
        seen = msgspec.structs.replace(evidence or Evidence(), exits=job.exits, step=job.step)
        return react(job, Trigger.FAULT, now=now, by="agent", failure=failed_for(reason, sentence, seen))
    detail = why
    if job.state is JobState.PAUSING and behind > 0:
        detail = f"{why} Paused at the last good checkpoint, {behind} steps back."
    elif job.state in HAS_WORKER and behind > 0 and job.state is not JobState.CANCELLING:
        detail = f"{why} Going on from the last good checkpoint, {behind} steps back."
    return react(job, Trigger.WORKER_LOST, now=now, by="agent", detail=detail)
