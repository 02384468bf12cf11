"""One meaning for socket, local API and command line: wants, offers and commands."""

from typing import Any

import msgspec

from agent.core.effects import Ask, Effect, Report
from agent.core.job import Job, react, report, settle
from agent.errors import NotPossible
from protocol.jobspec import BadSpec, not_within
from protocol.lifecycle import HAS_WORKER, TERMINAL, JobState, Trigger, Want, cannot
from protocol.messages import CommandKind, Desired, Lane
from protocol.records import JobStatus, Notice
from protocol.trainingconfig import job_spec
from protocol.worker import EvaluateNow, Parameters, SaveNow, SetParameters

OWNER = "owner"
USER = "user"
_BEFORE_A_START = (JobState.QUEUED, JobState.PAUSING, JobState.PAUSED)


def offered(desired: Desired, *, order: int, now: float) -> Job:
    """Return the job that the backend offers. Raises BadSpec when its config cannot be accepted."""
    assert desired.offer is not None
    offer = desired.offer
    job = new_job(
        desired.job_id,
        offer.config,
        dataset_path=offer.dataset_path,
        name=offer.name,
        order=order,
        now=now,
    )
    return msgspec.structs.replace(
        job,
        from_backend=True,
        attempt=offer.attempt,
        dataset_sha256=offer.dataset.sha256 if offer.dataset else "",
        dataset_size=offer.dataset.size if offer.dataset else 0,
    )


def new_job(job_id: str, config: str, *, dataset_path: str, name: str, order: int, now: float) -> Job:
    """Return a queued job. Raises BadSpec, whose sentence names the path of what is wrong."""
    spec = job_spec(job_id, parsed(config), dataset_path, name)
    return Job(
        job_id=job_id,
        config=config,
        dataset_path=dataset_path,
        name=spec.name or name or job_id,
        order=order,
        created_at=now,
        model_name=spec.model.name,
        method=spec.method,
        learning_rate=spec.training.learning_rate,
        branched_from=spec.branch.job_id if spec.branch is not None else "",
    )


def parsed(config: str) -> dict[str, Any]:
    """Return the object in ``config``; raises BadSpec."""
    try:
        # Stricter than the standard library's: neither NaN nor half a character pair comes in.
        tree = msgspec.json.decode(config)
    except RecursionError:
        raise BadSpec("config", "not JSON that can be read: it is nested too deeply.") from None
    except ValueError as error:
        raise BadSpec("config", f"not JSON: {error}.") from None
    if not isinstance(tree, dict):
        raise BadSpec("config", "expected an object.")
    return tree


def merged(old: Parameters, new: Parameters) -> Parameters:
    """Return ``old`` with every value that ``new`` gives."""
    given = {name: value for name, value in msgspec.structs.asdict(new).items() if value is not None}
    return msgspec.structs.replace(old, **given)


def desire(job: Job, desired: Desired, *, now: float) -> tuple[Job, list[Effect]]:
    """Act on what the backend wants of a job it offered. An older version changes nothing, nor does it an owner's job."""
    if desired.version <= job.observed or not job.from_backend:
        return job, []
    want = Want(desired.want)
    job = msgspec.structs.replace(job, observed=desired.version)
    effects: list[Effect] = []
    fresh, refused = usable(news(job.asked, desired.parameters))
    effects += [_warning(job, now, sentence) for sentence in refused]
    if fresh != Parameters():
        # Also where nothing runs: the next attempt uses them, be it by a retry.
        job = msgspec.structs.replace(job, asked=desired.parameters, parameters=merged(job.parameters, fresh))
        if job.state in HAS_WORKER:
            effects.append(Ask(job.job_id, SetParameters(fresh)))
    more: list[Effect] = []
    if job.want_by == OWNER and job.want is Want.PAUSE and want is not Want.CANCEL:
        if want is not Want.PAUSE:
            more.append(
                _warning(
                    job, now, "The owner of the machine paused this job; it goes on when they resume it."
                )
            )
    else:
        try:
            job, more = wanted(
                job,
                want,
                by=USER,
                now=now,
                checkpoint=desired.checkpoint,
                accept_changes=desired.accept_changes,
            )
        except NotPossible as error:
            # A job wanted to run again is being retried: the command for that comes by itself.
            more = [] if want is Want.RUN else [_warning(job, now, str(error))]
    # The version is observed even where nothing moved, and the backend waits to hear it.
    told = any(isinstance(effect, Report) and isinstance(effect.record, JobStatus) for effect in more)
    return job, [*effects, *more, *([] if told else [report(job, now)])]


def _warning(job: Job, now: float, text: str) -> Report:
    return Report(job.job_id, Lane.CONTROL, Notice(now, "warning", text, job.attempt))


def news(old: Parameters, new: Parameters) -> Parameters:
    """Return those of ``new`` that ``old`` does not say: a repeat must not undo what was set here since."""
    before = msgspec.structs.asdict(old)
    return Parameters(
        **{name: value for name, value in msgspec.structs.asdict(new).items() if value != before[name]}
    )


def usable(parameters: Parameters) -> tuple[Parameters, list[str]]:
    """Return the values that a run can be given, and a sentence on each other one. No door checks them before."""
    given = {name: value for name, value in msgspec.structs.asdict(parameters).items() if value is not None}
    bad = {name: must for name, value in given.items() if (must := _must(name, value))}
    kept = Parameters(**{name: value for name, value in given.items() if name not in bad})
    return kept, [f"{name}: {given[name]} cannot be set; it must be {must}." for name, must in bad.items()]


def _must(name: str, value: float) -> str:
    if name == "step_rows":  # a trainer's own, which no job names
        return "" if value > 0 else "above 0"
    return not_within(name, value)


def wanted(
    job: Job, want: Want, *, by: str, now: float, checkpoint: str = "", accept_changes: bool = False
) -> tuple[Job, list[Effect]]:
    """Write what is wanted of a job, and do what can be done at once.

    Raises NotPossible, with the sentence to answer, for what a terminal state cannot do.
    """
    sentence = cannot(job.state, want)
    if sentence:
        raise NotPossible(sentence)
    change: dict[str, Any] = {"want": want, "want_by": by}
    if checkpoint and want in (Want.RUN, Want.STOP):
        change["checkpoint"] = checkpoint
    if accept_changes and want in (Want.RUN, Want.STOP) and job.state in _BEFORE_A_START:
        # A running job has begun already: the word would stay for a start that it was not meant for.
        change["accept_changes"] = True
    return settle(msgspec.structs.replace(job, **change), now=now, by=by)


def retried(
    job: Job, *, by: str, now: float, checkpoint: str = "", accept_changes: bool = False
) -> tuple[Job, list[Effect]]:
    """Queue a failed or cancelled job again; it goes on from its last good checkpoint."""
    if job.state not in (JobState.FAILED, JobState.CANCELLED):
        raise NotPossible(f"The job is {job.state}; only a failed or cancelled job can be retried.")
    job = msgspec.structs.replace(job, checkpoint=checkpoint, want_by=by, accept_changes=accept_changes)
    return react(job, Trigger.RETRY, now=now, by=by)


def change(job: Job, parameters: Parameters) -> tuple[Job, list[Effect]]:
    """Remember live parameters, and hand them to the worker if there is one."""
    if job.state in TERMINAL:
        raise NotPossible(f"The job is {job.state}; its parameters can no longer change.")
    parameters, refused = usable(parameters)
    if refused:
        raise NotPossible(" ".join(refused))
    job = msgspec.structs.replace(job, parameters=merged(job.parameters, parameters))
    if job.state in HAS_WORKER:
        return job, [Ask(job.job_id, SetParameters(parameters))]
    return job, []


def order_for(kind: CommandKind, command_id: str, job: Job) -> Effect:
    """Return the order that carries out a command; raises NotPossible where there is no running worker."""
    if job.state is not JobState.RUNNING:
        raise NotPossible(f"The job is {job.state}; this needs a running one.")
    match kind:
        case CommandKind.SAVE_NOW:
            return Ask(job.job_id, SaveNow(command_id))
        case CommandKind.EVALUATE_NOW:
            return Ask(job.job_id, EvaluateNow(command_id))
        case _:
            raise NotPossible(f'"{kind}" is not an order to a trainer.')
