"""A job's log: numbered lines, kept in the chunks they came in."""

import msgspec

from agent.hub.model import Job
from agent.hub.store import Db


def append(db: Db, job: Job, attempt: int, lines: list[str], now: float) -> list[str]:
    """Store lines behind those the job has; return what was stored."""
    if lines:
        db.execute(
            "INSERT INTO logs (job, first, count, attempt, lines) VALUES (?,?,?,?,?)",
            (job.id, job.log_lines, len(lines), attempt, msgspec.msgpack.encode(lines)),
        )
        job.log_lines += len(lines)
        job.last_log_update = now
    return lines


def read(db: Db, job_id: str, limit: int, offset: int) -> tuple[list[str], int]:
    """Return lines from ``offset`` on (negative: from the end), and how many there are."""
    row = db.execute(
        "SELECT first + count FROM logs WHERE job=? ORDER BY first DESC LIMIT 1", (job_id,)
    ).fetchone()
    total = int(row[0]) if row else 0
    start = max(0, total + offset) if offset < 0 else offset
    first = db.execute(
        "SELECT first FROM logs WHERE job=? AND first<=? ORDER BY first DESC LIMIT 1", (job_id, start)
    ).fetchone()
    if first is None:
        return [], total
    lines: list[str] = []
    at = int(first[0])
    skip = start - at
    rows = db.execute(
        "SELECT lines FROM logs WHERE job=? AND first>=? AND first<? ORDER BY first",
        (job_id, at, start + limit),
    )
    for (body,) in rows:
        lines += msgspec.msgpack.decode(body)
    return lines[skip : skip + limit], total
