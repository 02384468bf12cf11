"""Jobs and agents in and out of the database; every function runs inside a write or a read."""

import msgspec

from agent.hub.errors import Refusal
from agent.hub.model import Agent, Job
from agent.hub.store import Db

_pack = msgspec.msgpack.Encoder()
_job: msgspec.msgpack.Decoder[Job] = msgspec.msgpack.Decoder(Job)
_agent: msgspec.msgpack.Decoder[Agent] = msgspec.msgpack.Decoder(Agent)


def find_job(db: Db, job_id: str) -> Job | None:
    row = db.execute("SELECT doc FROM jobs WHERE id=?", (job_id,)).fetchone()
    return _job.decode(row[0]) if row else None


def get_job(db: Db, job_id: str) -> Job:
    """Return the job; raises Refusal 404."""
    job = find_job(db, job_id)
    if job is None:
        raise Refusal(404, "Job not found")
    return job


def job_seq(db: Db, job_id: str) -> int:
    """Return the number that stands for the job in the table of points."""
    row = db.execute("SELECT seq FROM jobs WHERE id=?", (job_id,)).fetchone()
    return int(row[0]) if row else -1


def add_job(db: Db, job: Job) -> None:
    db.execute(
        "INSERT INTO jobs (id, agent_id, status, live, doc) VALUES (?,?,?,?,?)",
        (job.id, job.agent_id, job.status, job.live, _pack.encode(job)),
    )


def save_job(db: Db, job: Job) -> None:
    db.execute(
        "UPDATE jobs SET agent_id=?, status=?, live=?, doc=? WHERE id=?",
        (job.agent_id, job.status, job.live, _pack.encode(job), job.id),
    )


def list_jobs(db: Db, status: str | None = None, limit: int = 50, offset: int = 0) -> tuple[list[Job], int]:
    """Return jobs, newest first, and how many there are."""
    if status:
        rows = db.execute(
            "SELECT doc FROM jobs WHERE status=? ORDER BY seq DESC LIMIT ? OFFSET ?", (status, limit, offset)
        )
        total = db.execute("SELECT count(*) FROM jobs WHERE status=?", (status,))
    else:
        rows = db.execute("SELECT doc FROM jobs ORDER BY seq DESC LIMIT ? OFFSET ?", (limit, offset))
        total = db.execute("SELECT count(*) FROM jobs")
    return [_job.decode(row[0]) for row in rows], int(total.fetchone()[0])


def live_jobs_of(db: Db, agent_id: str) -> list[Job]:
    """Return the agent's jobs that have not ended, oldest first."""
    rows = db.execute("SELECT doc FROM jobs WHERE live=1 AND agent_id=? ORDER BY seq", (agent_id,))
    return [_job.decode(row[0]) for row in rows]


def jobs_of(db: Db, agent_id: str) -> list[Job]:
    rows = db.execute("SELECT doc FROM jobs WHERE agent_id=? ORDER BY seq", (agent_id,))
    return [_job.decode(row[0]) for row in rows]


def unassigned_jobs(db: Db) -> list[Job]:
    """Return the live jobs that no agent has, oldest first."""
    rows = db.execute("SELECT doc FROM jobs WHERE live=1 AND agent_id IS NULL ORDER BY seq")
    return [_job.decode(row[0]) for row in rows]


def find_agent(db: Db, agent_id: str) -> Agent | None:
    row = db.execute("SELECT doc FROM agents WHERE id=?", (agent_id,)).fetchone()
    return _agent.decode(row[0]) if row else None


def list_agents(db: Db) -> list[Agent]:
    return [_agent.decode(row[0]) for row in db.execute("SELECT doc FROM agents ORDER BY id")]


def save_agent(db: Db, agent: Agent) -> None:
    db.execute("INSERT OR REPLACE INTO agents (id, doc) VALUES (?,?)", (agent.id, _pack.encode(agent)))
