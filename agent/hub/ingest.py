"""Records of an agent's streams into the database: the one way in, for the socket and for REST."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from agent.hub import logs
from agent.hub.errors import StreamRefused
from agent.hub.model import Agent, Job
from agent.hub.points import Named, Shapes, store_points
from agent.hub.progress import moved, take_facts, take_result, take_resume_check, take_snapshot
from agent.hub.store import Db
from agent.hub.tables import find_agent, find_job, save_agent, save_job
from protocol.codec import BadMessage, Codec, Unknown, encode_record, number
from protocol.records import (
    AnyRecord,
    Checkpoint,
    CommandDone,
    Figures,
    JobEstimate,
    JobFacts,
    JobStatus,
    LogChunk,
    Notice,
    ParametersApplied,
    Point,
    Result,
    ResumeCheck,
    Schema,
    Snapshot,
)
from protocol.session import Key

WHOLE = 2**53
"""Above this a number of a step, an attempt, a version or an offset is a defect of the sender."""
SIZES = ("step", "attempt", "offset", "size", "schema_id", "observed")


class Gap(Exception):
    """Records before these are missing: the stream is durable up to ``ack`` only."""

    def __init__(self, ack: int) -> None:
        super().__init__(ack)
        self.ack = ack


@dataclass
class Applied:
    """What a commit brought."""

    ack: int
    job: Job | None = None
    points: list[Named] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    ended: bool = False
    """The job has come to an end or to a rest: its agent may have room for another."""


def position(db: Db, agent_id: str, key: Key) -> int:
    """Return up to where the stream is durable."""
    row = db.execute(
        "SELECT acked FROM streams WHERE agent_id=? AND epoch=? AND scope=? AND lane=?",
        (agent_id, key.epoch, key.scope, key.lane),
    ).fetchone()
    return int(row[0]) if row else 0


def advance_to(db: Db, agent_id: str, key: Key, seq: int) -> None:
    """Note that the stream is durable up to ``seq``; part of the transaction that stores its records."""
    db.execute(
        "INSERT INTO streams (agent_id, epoch, scope, lane, acked) VALUES (?,?,?,?,?) "
        "ON CONFLICT DO UPDATE SET acked=excluded.acked",
        (agent_id, key.epoch, key.scope, key.lane, seq),
    )


def owned(db: Db, agent_id: str, scope: str) -> Job | None:
    """Return the job of a stream (None for the agent's own); raises StreamRefused where it may not append."""
    if scope == "":
        return None
    job = find_job(db, scope)
    if job is None:
        raise StreamRefused(f"there is no job {scope} at this hub")
    if job.agent_id != agent_id:
        raise StreamRefused(f"job {scope} is not a job of {agent_id}")
    return job


def apply(
    db: Db, agent_id: str, key: Key, lo: int, records: Sequence[msgspec.Raw], codec: Codec, now: float
) -> Applied:
    """Store the records that the stream lacks. Raises Gap or StreamRefused, and then nothing is stored."""
    have = position(db, agent_id, key)
    hi = lo + len(records) - 1
    if lo > have + 1:
        raise Gap(have)
    if hi <= have:
        return Applied(have)
    fresh = records[have + 1 - lo :]
    job = owned(db, agent_id, key.scope)
    if job is None:
        done = _agents_own(db, agent_id, fresh, codec, now)
    else:
        done = _jobs(db, job, key, fresh, codec, now)
    done.ack = hi
    advance_to(db, agent_id, key, hi)
    return done


def bury(db: Db, agent_id: str, key: Key, lo: int, hi: int, reason: str, now: float) -> Applied:
    """Note that records will never come, where the user can read it."""
    have = position(db, agent_id, key)
    if lo > have + 1:
        raise Gap(have)
    if hi <= have:
        return Applied(have)
    job = owned(db, agent_id, key.scope)
    if job is not None:
        lost = hi - max(lo, have + 1) + 1
        what = ("reports", "points of the curve", "pieces of the log")[key.lane]
        job.buried_records += lost
        job.note(now, "warning", f"{lost} {what} were lost on the agent's machine ({reason}).")
        job.updated_at = now
        save_job(db, job)
    advance_to(db, agent_id, key, hi)
    return Applied(hi, job)


def _sound(record: AnyRecord) -> bool:
    """Tell whether a record's numbers can be stored."""
    if isinstance(record, Point):
        return (
            -WHOLE <= record.step <= WHOLE and -WHOLE <= record.attempt <= WHOLE and record.schema_id <= WHOLE
        )
    numbers = [getattr(record, name, 0) for name in SIZES]
    return all(-WHOLE <= value <= WHOLE for value in numbers)


def _read(raw: msgspec.Raw, codec: Codec) -> AnyRecord | Unknown | None:
    """Return the record, or None for one that cannot be read: it must not block those behind it."""
    try:
        record = codec.decode_record(raw)
    except BadMessage:
        return None
    return record if isinstance(record, Unknown) or _sound(record) else None


def _agents_own(db: Db, agent_id: str, records: Sequence[msgspec.Raw], codec: Codec, now: float) -> Applied:
    agent = find_agent(db, agent_id) or Agent(id=agent_id, registered_at=now, last_seen=now)
    agent.last_seen = now
    for raw in records:
        match _read(raw, codec):
            case Figures(time=time, values=values):
                agent.figures = {name: number(value) for name, value in values.items()}
                agent.figures_time = time
            case Notice(time=time, level=level, text=text):
                agent.note(time, level, text)
            case CommandDone() as done:
                answered(db, agent_id, done, now)
            case _:
                pass
    save_agent(db, agent)
    return Applied(0)


def _jobs(db: Db, job: Job, key: Key, records: Sequence[msgspec.Raw], codec: Codec, now: float) -> Applied:
    done = Applied(0, job)
    shapes: Shapes | None = None
    points: list[tuple[Point, bytes]] = []
    was_busy = job.live and job.state != "paused"
    for raw in records:
        record = _read(raw, codec)
        if isinstance(record, Point):
            points.append((record, bytes(raw)))
        elif isinstance(record, Schema):
            shapes = shapes or Shapes(db, job.id)
            shapes.define(key.epoch, record.schema_id, record.names)
        elif isinstance(record, LogChunk):
            done.lines += logs.append(db, job, record.attempt, [*record.gap, *record.lines], now)
        elif record is None:
            job.unreadable_records += 1
            job.note(now, "warning", "A report of the agent could not be read by this hub and was left out.")
        elif isinstance(record, Unknown):
            job.unknown_records += 1
        else:
            _take(db, job, record, now)
    if points:
        if codec.as_json:
            points = [(point, encode_record(point)) for point, _ in points]
        done.points = store_points(db, job, shapes or Shapes(db, job.id), key.epoch, points)
    job.updated_at = now
    done.ended = was_busy and not (job.live and job.state != "paused")
    save_job(db, job)
    return done


def _take(db: Db, job: Job, record: AnyRecord, now: float) -> None:
    match record:
        case JobStatus():
            moved(job, record)
        case JobFacts():
            take_facts(job, record)
        case Result():
            take_result(job, record)
        case Snapshot():
            take_snapshot(job, record)
        case Checkpoint():
            db.execute(
                "INSERT OR REPLACE INTO checkpoints (job, attempt, name, body) VALUES (?,?,?,?)",
                (job.id, record.attempt, record.name, encode_record(record)),
            )
            if record.reason != "pause":  # the word may be that of one who resumes a job still pausing
                job.accept_changes = False
            if record.is_best:
                job.best_checkpoint_path = record.name
        case Notice(time=time, level=level, text=text):
            job.note(time, level, text)
        case JobEstimate(estimate=estimate):
            job.estimate = estimate
        case ResumeCheck():
            take_resume_check(job, record)
        case ParametersApplied(time=time, step=step, parameters=parameters, refused=refused):
            asked = {
                name: value for name, value in msgspec.structs.asdict(parameters).items() if value is not None
            }
            job.applied = msgspec.structs.replace(job.applied, **asked)
            if refused:
                job.note(time, "warning", f"Parameters at step {step}: {refused}")
        case CommandDone():
            answered(db, job.agent_id or "", record, now, job)
        case _:
            pass


def answered(db: Db, agent_id: str, done: CommandDone, now: float, job: Job | None = None) -> None:
    """Close a command of this agent; a retry that was not carried out leaves the job as it was.

    Where it was after all and only the answer was lost, the job's own reports say so next.
    """
    row = db.execute(
        "SELECT job, kind FROM commands WHERE id=? AND agent_id=? AND status=''", (done.command_id, agent_id)
    ).fetchone()
    if row is None or (job is not None and row[0] != job.id):
        # A job's token opens that job alone: the stream of one answers no command of another.
        return
    db.execute(
        "UPDATE commands SET status=?, detail=? WHERE id=?", (done.status, done.detail, done.command_id)
    )
    owner = job or find_job(db, row[0])
    if owner is None or done.status == "done":
        return
    words = {"refused": "was refused", "expired": "came too late", "unknown": "may not have been carried out"}
    owner.note(done.time, "warning", f"The command {row[1]} {words[done.status]}. {done.detail}".strip())
    if row[1] == "retry" and owner.before_retry and owner.state == "queued":
        owner.state = owner.before_retry
        owner.before_retry = None
        owner.error = owner.error or done.detail
        owner.completed_at = now
    if owner is not job:
        save_job(db, owner)
