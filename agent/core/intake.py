"""What a trainer says, and what its end means, to the job."""

from collections.abc import Sequence
from typing import assert_never

import msgspec

from agent.core.control import parsed
from agent.core.effects import Effect, Report
from agent.core.explain import without_effect
from agent.core.job import Job, fresh, lost, note, react, report, rest
from protocol.failures import Evidence, Failure, FailureReason
from protocol.lifecycle import HAS_WORKER, TERMINAL, JobState, Trigger
from protocol.messages import Lane
from protocol.records import (
    AnyRecord,
    Checkpoint,
    JobEstimate,
    JobFacts,
    ParametersApplied,
    Result,
    ResumeCheck,
)
from protocol.worker import (
    AnyEvent,
    Estimated,
    Failed,
    Finished,
    Left,
    Metrics,
    Note,
    Numbered,
    Parameters,
    ParametersSet,
    Preparing,
    Ready,
    Saved,
    Trained,
    Verified,
    Warm,
)

APPLIED_KEPT = 256
"""Changes of live parameters that can be replayed."""


def hear(job: Job, numbered: Numbered, *, now: float) -> tuple[Job, list[Effect]] | None:
    """Return the job after an event of its trainer, or None for one that is old news.

    Old: of an earlier attempt, or already committed. A trainer repeats what it has no answer to.
    """
    if numbered.attempt != job.attempt or numbered.number <= job.heard:
        return None
    job = msgspec.structs.replace(job, heard=numbered.number)
    if job.state not in HAS_WORKER and job.state not in TERMINAL:
        # Queued again or paused while an attempt's process still talked: its word is over.
        return job, []
    return _heard(job, numbered.event, now)


def hear_points(job: Job, points: Sequence[Numbered]) -> tuple[Job, list[Metrics]] | None:
    """Return the job after points that came in a row, and those of them that are news; None where none is.

    As `hear` for each, but the job is made anew once: thousands may come between two looks.
    """
    fresh = [
        one.event
        for one in points
        if one.attempt == job.attempt and one.number > job.heard and isinstance(one.event, Metrics)
    ]
    if not fresh:
        return None
    heard = max(one.number for one in points)
    if job.state not in HAS_WORKER and job.state not in TERMINAL:
        # Its word on the job is over; what it measured was measured.
        return msgspec.structs.replace(job, heard=heard), fresh
    values, trend = dict(job.values), job.trend
    for event in fresh:
        values.update(event.values)
        trend = event.trend or trend
    last = fresh[-1]
    job = msgspec.structs.replace(
        job, heard=heard, step=last.step, epoch=last.epoch, values=values, trend=trend
    )
    return job, fresh


def _control(job: Job, record: AnyRecord) -> Report:
    return Report(job.job_id, Lane.CONTROL, record)


def _heard(job: Job, event: AnyEvent, now: float) -> tuple[Job, list[Effect]]:
    match event:
        case Metrics():
            # The point itself is made where its schema is known to be sent or not.
            values = {**job.values, **event.values}
            return msgspec.structs.replace(
                job, step=event.step, epoch=event.epoch, values=values, trend=event.trend or job.trend
            ), []
        case Preparing():
            if job.state is not JobState.PREPARING:
                return job, []
            job = msgspec.structs.replace(job, phase=event.phase, detail=event.detail)
            return job, [report(job, now)]
        case Ready():
            return _ready(job, event, now)
        case Saved():
            job = msgspec.structs.replace(
                job,
                saved_step=event.step,
                saved_bytes=event.size,
                losses=0,
                exits=[],
                # The word of one who resumes a job that is still pausing is for the start after this save.
                accept_changes=job.accept_changes and job.state is JobState.PAUSING,
            )
            name = event.path.replace("\\", "/").rstrip("/").rpartition("/")[2]
            record = Checkpoint(
                now,
                job.attempt,
                name,
                event.step,
                event.epoch,
                event.size,
                event.seconds,
                event.reason,
                event.eval_loss,
                event.train_loss,
                event.is_best,
                event.stall,
            )
            return job, [_control(job, record)]
        case Trained():
            job = msgspec.structs.replace(job, step=event.step)
            return react(job, Trigger.TRAINED, now=now, detail=event.why)
        case Finished():
            return _finished(job, event, now)
        case Failed(failure=failure):
            return react(job, Trigger.FAULT, now=now, by="agent", failure=failure)
        case Note(level=level, text=text):
            job, notice = note(job, "warning" if level == "warning" else "info", text, now=now)
            return job, [notice]
        case ParametersSet(step=at, parameters=parameters, refused=refused, replayed=replayed):
            job = msgspec.structs.replace(
                job,
                batch_size=parameters.batch_size or job.batch_size,
                gradient_accumulation_steps=parameters.gradient_accumulation_steps
                or job.gradient_accumulation_steps,
                applied=job.applied if replayed else applied(job.applied, at, parameters),
                parameters=_followed(job.parameters, parameters),
            )
            return job, [_control(job, ParametersApplied(now, job.attempt, at, parameters, refused))]
        case Estimated(estimate=estimate):
            job = msgspec.structs.replace(job, estimate=estimate)
            return job, [_control(job, JobEstimate(now, job.attempt, estimate))]
        case Verified():
            job = msgspec.structs.replace(job, resume_check=event)
            told = ResumeCheck(
                now, job.attempt, event.first, event.last, event.equal, event.difference, event.detail
            )
            return job, [_control(job, told)]
        case Left() | Warm():
            # What leaving means is known when the process is gone.
            return job, []
        case _:
            assert_never(event)


def applied(
    before: list[tuple[int, Parameters]], step: int, parameters: Parameters
) -> list[tuple[int, Parameters]]:
    """Return what was put in force at which step, with ``parameters`` from ``step`` on."""
    if parameters == Parameters():
        return before
    # Stable: what was set later at the same step stays the later one.
    return sorted([*before, (step, parameters)], key=lambda entry: entry[0])[-APPLIED_KEPT:]


def _followed(wanted: Parameters, parameters: Parameters) -> Parameters:
    """Return what is wanted, with the micro-batch that a trainer found to fit: the next attempt begins with it."""
    return msgspec.structs.replace(
        wanted,
        batch_size=parameters.batch_size or wanted.batch_size,
        gradient_accumulation_steps=parameters.gradient_accumulation_steps
        or wanted.gradient_accumulation_steps,
    )


def _ready(job: Job, event: Ready, now: float) -> tuple[Job, list[Effect]]:
    first = not job.facts
    job = msgspec.structs.replace(
        job,
        step=event.start_step,
        saved_step=event.start_step,
        total_steps=event.total_steps,
        total_epochs=event.total_epochs,
        train_rows=event.train_rows,
        eval_rows=event.eval_rows,
        batch_size=event.batch_size,
        gradient_accumulation_steps=event.gradient_accumulation_steps,
        facts=event.facts,
        resumed_from=event.resumed_from,
        checkpoint="",
    )
    facts = JobFacts(
        now,
        job.attempt,
        event.total_steps,
        event.total_epochs,
        event.start_step,
        event.train_rows,
        event.eval_rows,
        event.batch_size,
        event.gradient_accumulation_steps,
        job.parameters.learning_rate or job.learning_rate,
        event.device,
        event.resumed_from,
        event.trainable_parameters,
        event.all_parameters,
        event.facts,
    )
    job, effects = react(job, Trigger.WORKER_READY, now=now)
    if first and (text := without_effect(parsed(job.config))):
        job, told = note(job, "warning", text, now=now)
        effects = [*effects, told]
    return job, [_control(job, facts), *effects]


def _finished(job: Job, event: Finished, now: float) -> tuple[Job, list[Effect]]:
    if job.state in TERMINAL or job.state is JobState.CANCELLING:
        # It was quicker than the cancel, and what was wanted is not a model.
        return job, []
    job = msgspec.structs.replace(
        job,
        model_path=event.model_path,
        merged_path=event.merged_path,
        weights_hash=event.weights_hash,
        results=event.values,
        samples=event.samples,
        step=event.step,
    )
    result = Result(
        now,
        job.attempt,
        event.model_path,
        event.merged_path,
        event.weights_hash,
        event.step,
        dict(event.values),
        list(event.samples),
    )
    job, effects = react(job, Trigger.FINISHED, now=now)
    return job, [_control(job, result), *effects]


def gone(
    job: Job,
    attempt: int,
    *,
    left: str,
    why: str,
    now: float,
    failure: Failure | None = None,
    reason: FailureReason = FailureReason.LOST,
    evidence: Evidence | None = None,
    room: int = 0,
) -> tuple[Job, list[Effect]]:
    """Return the job after its process has ended, all its events heard and its memory free.

    ``left`` is what the process said it left for, "" where it said nothing; ``why`` describes its
    end, ``reason`` and ``evidence`` are what was found out about it; ``failure`` is set when it had to be
    ended for what it did; ``room`` is what must be free before one that left for a full disk can go on.
    """
    if attempt != job.attempt or job.state not in HAS_WORKER:
        return job, []
    if job.state is JobState.CANCELLING:
        return react(job, Trigger.RELEASED, now=now)
    if failure is not None:
        return react(job, Trigger.FAULT, now=now, by="agent", failure=failure)
    match left:
        case "paused" if job.state is JobState.PAUSING:
            return react(job, Trigger.RELEASED, now=now, detail=job.detail)
        case "disk_full":
            return rest(job, "disk", why, room=room, now=now)
        case "fresh_process":
            return fresh(job, now=now)
        case _:
            counts = left not in ("parent_lost", "paused", "cancelled")
            return lost(job, now=now, why=why, counts=counts, reason=reason, evidence=evidence)
