"""What users do to jobs: submit, control, live parameters; each is one write."""

import json
import secrets
import uuid
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from agent.hub.errors import Refusal
from agent.hub.model import Agent, Job
from agent.hub.store import Db
from agent.hub.tables import (
    add_job,
    find_agent,
    find_job,
    get_job,
    live_jobs_of,
    save_job,
    unassigned_jobs,
)
from protocol.branching import branched
from protocol.jobspec import BadSpec, Natural, Positive
from protocol.lifecycle import TERMINAL, JobState, Trigger, Want, advance, cannot, pursue
from protocol.messages import Command, CommandKind, DatasetRef, Desired, Offer
from protocol.rest import Branch, SubmitJob
from protocol.trainingconfig import job_spec

MOST_CONFIG = 114_688
"""Bytes of a config as JSON: one DESIRED frame must hold it, also where each quote in it is escaped once more."""
MOST_PATH = 4096
MOST_NAME = 256


class Live(msgspec.Struct, kw_only=True):
    """The parameters that can change while a job runs, with their limits."""

    learning_rate: Annotated[float, Meta(gt=0, le=100)] | None = None
    batch_size: Annotated[int, Meta(ge=1, le=65536)] | None = None
    gradient_accumulation_steps: Annotated[int, Meta(ge=1, le=65536)] | None = None
    eval_steps: Positive | None = None
    save_steps: Positive | None = None
    logging_steps: Positive | None = None
    early_stopping_patience: Positive | None = None


class Totals(msgspec.Struct, kw_only=True):
    """The columns of a job that its agent may set through `POST /api/training/local/jobs`."""

    total_epochs: float | None = None
    total_steps: Natural | None = None
    total_samples: Natural | None = None
    train_samples: Natural | None = None
    val_samples: Natural | None = None
    total_tokens_processed: Natural | None = None
    batch_size: Natural | None = None
    gradient_accumulation_steps: Natural | None = None
    max_learning_rate: float | None = None
    num_gpus: Natural | None = None
    distributed_strategy: Annotated[str, Meta(max_length=256)] | None = None


def new_token() -> str:
    return secrets.token_urlsafe(32)


def submit(db: Db, body: SubmitJob, now: float) -> Job:
    """Store a job, or return the one that was submitted before with the same id and config."""
    if body.config is None:
        raise Refusal(400, "config: give the job's TrainingConfig as an object.")
    if body.status not in ("pending", "queued"):
        raise Refusal(400, f'status: a new job is "pending", not "{body.status}".')
    job_id = body.job_id or str(uuid.uuid4())
    try:
        spec = job_spec(job_id, body.config, body.dataset_path, body.name)
    except BadSpec as wrong:
        raise Refusal(400, str(wrong)) from None
    text = json.dumps(body.config, separators=(",", ":"), sort_keys=True)
    if len(text.encode()) > MOST_CONFIG:
        raise Refusal(413, f"config: {len(text.encode())} bytes of JSON; at most {MOST_CONFIG} are allowed.")
    found = find_job(db, job_id)
    if found is not None:
        if found.config != text or found.dataset_path != body.dataset_path:
            raise Refusal(409, f"There is already a job {job_id} with another config. Choose another job_id.")
        return found
    job = Job(
        id=job_id,
        created_at=now,
        updated_at=now,
        token=new_token(),
        config=text,
        name=spec.name,
        model_name=body.model_name or spec.model.name,
        method=spec.method,
        dataset_path=body.dataset_path,
    )
    if spec.branch is not None:
        job.branched_from = spec.branch.job_id
        parent = find_job(db, spec.branch.job_id)
        # Its checkpoints lie on that agent's disk, so no other can begin with them.
        job.agent_id = parent.agent_id if parent is not None else None
    path = body.dataset_path or spec.data.path
    row = db.execute("SELECT id, name, sha256, size FROM datasets WHERE storage_path=?", (path,)).fetchone()
    if row is not None:
        job.dataset_id = row[0]
        job.dataset = DatasetRef(row[2], row[3], row[1])
    add_job(db, job)
    return job


def branch(db: Db, job_id: str, body: Branch, now: float) -> Job:
    """Store a job that begins with a checkpoint of this one."""
    parent = get_job(db, job_id)
    if not parent.taken:
        raise Refusal(409, "No agent has taken this job yet, so it has no checkpoint to branch from.")
    try:
        whole = body.config is not None
        config = branched(
            body.config if body.config is not None else msgspec.json.decode(parent.config),
            {} if whole else body.config_adjustments,
            job_id,
            body.checkpoint,
        )
    except BadSpec as wrong:
        raise Refusal(400, str(wrong)) from None
    new_id = body.job_id or str(uuid.uuid4())
    if find_job(db, new_id) is not None:
        raise Refusal(409, f"There is already a job {new_id}. Choose another job_id.")
    wanted = SubmitJob(
        job_id=new_id,
        config=config,
        dataset_path=parent.dataset_path,
        model_name="" if whole else parent.model_name,
        name=body.name or f"{parent.name or parent.model_name} (branch)"[:MOST_NAME],
    )
    return submit(db, wanted, now)


def amend(db: Db, job_id: str, fields: Mapping[str, Any], now: float) -> Job:
    """Set the totals that an agent knows of an existing job."""
    job = get_job(db, job_id)
    try:
        totals = msgspec.convert(dict(fields), Totals)
    except msgspec.ValidationError as wrong:
        raise Refusal(400, f"{wrong}.") from None
    for name, value in msgspec.structs.asdict(totals).items():
        if value is not None:
            setattr(job, name, value)
    job.updated_at = now
    save_job(db, job)
    return job


_WANTS = {"pause": Want.PAUSE, "resume": Want.RUN, "cancel": Want.CANCEL, "stop": Want.STOP}


def control(
    db: Db, job_id: str, action: str, checkpoint: str, now: float, accept_changes: bool = False
) -> Job:
    """Write down what is wanted of a job. Asking twice changes nothing but the version."""
    if len(checkpoint) > MOST_PATH:
        raise Refusal(400, f"checkpoint_path: more than {MOST_PATH} characters.")
    job = get_job(db, job_id)
    if action == "retry":
        _retry(db, job, now, checkpoint, accept_changes)
    else:
        want = _WANTS[action]
        refused = cannot(job.state, want)
        if refused is not None:
            raise Refusal(409, refused)
        job.want = want
        if job.agent_id is None and job.live:
            # Nobody else holds it: what is wanted is so at once.
            trigger = pursue(job.state, want)
            if trigger is not None:
                job.state = advance(job.state, trigger)
                job.by = "user"
                job.completed_at = now if job.state in TERMINAL else None
    job.version = _next_version(job)
    job.checkpoint = checkpoint
    job.accept_changes = accept_changes and action in ("resume", "retry", "stop")
    job.updated_at = now
    save_job(db, job)
    return job


def _next_version(job: Job) -> int:
    """Return a version that the agent has not seen, also where this hub comes from a backup."""
    return max(job.version, job.observed) + 1


def _retry(db: Db, job: Job, now: float, checkpoint: str, accept_changes: bool) -> None:
    if job.state not in (JobState.FAILED, JobState.CANCELLED):
        raise Refusal(
            409, f"The job is {job.state}; only a job that has failed or was cancelled can be retried."
        )
    job.before_retry = job.state
    job.state = advance(job.state, Trigger.RETRY)
    job.want = Want.RUN
    job.by, job.detail, job.phase = "user", "", ""
    job.completed_at, job.failure, job.error = None, None, ""
    if job.agent_id is not None:
        args: dict[str, str | int | float] = {"checkpoint": checkpoint} if checkpoint else {}
        if accept_changes:
            args["accept_changes"] = 1
        # Not counted: a hub that comes from a backup would use a number again, and the agent would repeat its answer.
        command = Command(f"{job.id}/retry/{secrets.token_hex(8)}", CommandKind.RETRY, job.id, args=args)
        db.execute(
            "INSERT OR REPLACE INTO commands (id, agent_id, job, kind, created_at, body) VALUES (?,?,?,?,?,?)",
            (command.command_id, job.agent_id, job.id, command.kind, now, msgspec.msgpack.encode(command)),
        )


def update_parameters(db: Db, job_id: str, body: Mapping[str, Any], now: float) -> Job:
    """Ask for live parameters; those asked for before stay asked for."""
    known = {
        name: value for name, value in body.items() if name in Live.__struct_fields__ and value is not None
    }
    strange = sorted(set(body) - set(Live.__struct_fields__))
    if strange:
        raise Refusal(
            400,
            f"{strange[0]}: this cannot be changed while a job runs.",
            allowed_params=list(Live.__struct_fields__),
        )
    if not known:
        raise Refusal(400, "No parameters specified", allowed_params=list(Live.__struct_fields__))
    try:
        live = msgspec.convert(known, Live)
    except msgspec.ValidationError as wrong:
        text, _, where = str(wrong).partition(" - at `$.")
        raise Refusal(400, f"{where.rstrip('`')}: {text}.") from None
    job = get_job(db, job_id)
    if not job.live:
        raise Refusal(400, "Can only update parameters for running jobs", current_status=job.status)
    asked = {name: value for name, value in msgspec.structs.asdict(live).items() if value is not None}
    job.parameters = msgspec.structs.replace(job.parameters, **asked)
    job.parameter_updates = [*job.parameter_updates, {**asked, "requested_at": now}]
    job.last_parameter_update_at = now
    job.version = _next_version(job)
    job.updated_at = now
    save_job(db, job)
    return job


def desired(job: Job) -> Desired:
    """Return what is wanted of a job, as it is told to its agent."""
    offer = Offer(job.config, job.dataset_path, job.token, job.dataset, job.name[:MOST_NAME], job.attempt)
    return Desired(
        job.id,
        job.version,
        job.want.value,
        offer,
        job.parameters,
        job.checkpoint,
        job.reason,
        job.accept_changes,
    )


def assign(db: Db, connected: list[str], now: float) -> list[Job]:
    """Give the jobs that wait, oldest first, to connected agents with room; return those given."""
    waiting = [job for job in unassigned_jobs(db) if job.state is JobState.QUEUED]
    if not waiting or not connected:
        return []
    agents: dict[str, Agent] = {}
    room: dict[str, int] = {}
    for agent_id in connected:
        agent = find_agent(db, agent_id)
        if agent is not None:
            agents[agent_id] = agent
            held = [job for job in live_jobs_of(db, agent_id) if job.state is not JobState.PAUSED]
            room[agent_id] = agent.capacity - len(held)
    given = []
    for job in waiting:
        able = [name for name, agent in agents.items() if room[name] > 0 and agent.can_run(job.method)]
        if not able:
            continue
        best = max(able, key=lambda name: room[name])
        room[best] -= 1
        job.agent_id = best
        job.updated_at = now
        save_job(db, job)
        given.append(job)
    return given


def open_commands(db: Db, agent_id: str) -> list[Command]:
    """Return the commands that the agent has not answered, oldest first."""
    rows = db.execute(
        "SELECT body FROM commands WHERE agent_id=? AND status='' ORDER BY created_at", (agent_id,)
    )
    return [msgspec.msgpack.decode(row[0], type=Command) for row in rows]
