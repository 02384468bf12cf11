"""How a job's row follows what its agent reports."""

import math

from agent.hub.model import Job
from agent.hub.points import Dot, refresh
from protocol.codec import number
from protocol.lifecycle import TERMINAL, JobState
from protocol.records import JobFacts, JobStatus, Result, ResumeCheck, Snapshot


def moved(job: Job, record: JobStatus) -> None:
    """Follow a reported state. One of an older attempt changes nothing, nor does one after the end.

    The agent is the authority on its job, and its reports come in order: it is followed even
    where a report between was lost on its disk. What has ended is left only by a retry.
    """
    job.observed = max(job.observed, record.observed)
    if record.attempt < job.attempt or record.state not in set(JobState):
        return
    state = JobState(record.state)
    job.taken = True
    if job.before_retry is state and job.state is JobState.QUEUED:
        return  # said before the command to retry had reached it; its answer comes
    if job.state in TERMINAL:
        if state is job.state and job.failure is None and record.failure is not None:
            job.failure = record.failure
            job.error = record.failure.sentence
        if state is not JobState.QUEUED or job.state is JobState.COMPLETED:
            return
    job.state = state
    job.attempt = record.attempt
    job.by, job.detail, job.phase = record.by, record.detail, record.phase
    job.before_retry = None
    _reached(job, record, state)
    if state in (JobState.PREPARING, JobState.RUNNING) and job.started_at is None:
        job.started_at = record.time
    if state in TERMINAL:
        job.completed_at = record.time
        job.failure = record.failure if state is JobState.FAILED else None
        job.error = job.failure.sentence if job.failure else ""
        if state is JobState.FAILED and not job.error:
            job.error = record.detail or "Training failed"
    else:
        job.completed_at = None
        job.failure = None
        job.error = ""


def _reached(job: Job, record: JobStatus, state: JobState) -> None:
    """Follow the step that a state was reported at: the points themselves may still be on their way."""
    if state in (JobState.QUEUED, JobState.PREPARING):
        return  # where the next attempt begins is known when it runs
    if (record.attempt, record.step) >= (job.step_attempt, job.step):
        job.step_attempt, job.step = record.attempt, record.step


def take_facts(job: Job, facts: JobFacts) -> None:
    """Note what is known once the job is ready to step."""
    if facts.attempt < job.attempt:
        return
    job.attempt = facts.attempt
    job.total_steps = facts.total_steps
    job.total_epochs = facts.total_epochs
    job.train_samples, job.val_samples = facts.train_rows, facts.eval_rows
    job.total_samples = facts.train_rows + facts.eval_rows
    job.batch_size = facts.batch_size
    job.gradient_accumulation_steps = facts.gradient_accumulation_steps
    job.max_learning_rate = facts.learning_rate
    job.device = facts.device
    job.resumed_from = facts.resumed_from
    job.facts = dict(facts.facts)
    if facts.trainable_parameters:
        job.facts["trainable_parameters"] = str(facts.trainable_parameters)
        job.facts["all_parameters"] = str(facts.all_parameters)


def take_result(job: Job, result: Result) -> None:
    """Note what a complete job left."""
    job.model_path, job.merged_path = result.model_path, result.merged_path
    job.weights_hash = result.weights_hash
    job.final_step = result.step
    job.results = {name: number(value) for name, value in result.values.items()}
    job.samples = [dict(sample) for sample in result.samples]


def take_resume_check(job: Job, check: ResumeCheck) -> None:
    """Note whether the steps before a resume came out equal when they were replayed."""
    difference = number(check.difference)
    found = "equal bit for bit" if check.equal else f"they differ by {difference:.3g}"
    job.resume_check = {
        "attempt": check.attempt,
        "first": check.first,
        "last": check.last,
        "equal": check.equal,
        "difference": difference if difference is None or math.isfinite(difference) else None,
        "detail": check.detail,
        "text": f"Steps {check.first} to {check.last} replayed: {found}. {check.detail}".strip(),
    }


def take_snapshot(job: Job, snapshot: Snapshot) -> None:
    """Bring the figures up to date ahead of the history that follows."""
    values = {name: number(value) for name, value in snapshot.values.items()}
    refresh(job, [Dot(snapshot.attempt, snapshot.step, snapshot.epoch, snapshot.time, "", values)])
