"""The real hub, with a record of what it stored: every record that gets past its check for repeats, as it comes.

The record is a table of the hub's database, written in the transaction that stores the record. Nothing keeps a
record out of it that comes twice.
"""

import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from agent.hub import ingest, store
from agent.hub.__main__ import main
from agent.hub.model import Job
from agent.hub.store import Db
from protocol.codec import Codec
from protocol.session import Key
from tests.link.agent_main import digest

TABLE = """
CREATE TABLE IF NOT EXISTS link_took (
    n INTEGER PRIMARY KEY AUTOINCREMENT, epoch TEXT, scope TEXT, lane INTEGER, digest BLOB, body BLOB, buried INTEGER
);
"""


def record() -> None:
    """Have the hub write down what it stores."""
    apply, jobs, agents_own, bury = ingest.apply, ingest._jobs, ingest._agents_own, ingest.bury
    # One thread writes, one change after the other.
    current: list[Key] = []

    def note(db: Db, records: Sequence[msgspec.Raw], buried: int = 0) -> None:
        key = current[-1]
        name = (f"{key.epoch:016x}", key.scope, key.lane)
        for raw in records:
            body = bytes(raw)
            row = (*name, digest(body), body if key.lane == 0 else None, 0)
            db.execute(
                "INSERT INTO link_took (epoch, scope, lane, digest, body, buried) VALUES (?,?,?,?,?,?)", row
            )
        if buried:
            db.execute("INSERT INTO link_took (epoch, scope, lane, buried) VALUES (?,?,?,?)", (*name, buried))

    def noted_apply(db: Db, agent_id: str, key: Key, *rest: Any) -> ingest.Applied:
        current[:] = [key]
        return apply(db, agent_id, key, *rest)

    def noted_jobs(
        db: Db, job: Job, key: Key, records: Sequence[msgspec.Raw], codec: Codec, now: float
    ) -> ingest.Applied:
        note(db, records)
        return jobs(db, job, key, records, codec, now)

    def noted_own(
        db: Db, agent_id: str, records: Sequence[msgspec.Raw], codec: Codec, now: float
    ) -> ingest.Applied:
        note(db, records)
        return agents_own(db, agent_id, records, codec, now)

    def noted_bury(
        db: Db, agent_id: str, key: Key, lo: int, hi: int, reason: str, now: float
    ) -> ingest.Applied:
        current[:] = [key]
        have = ingest.position(db, agent_id, key)
        done = bury(db, agent_id, key, lo, hi, reason, now)
        note(db, [], max(0, hi - max(have, lo - 1)))
        return done

    ingest.apply = noted_apply  # type: ignore[assignment]
    ingest._jobs, ingest._agents_own, ingest.bury = noted_jobs, noted_own, noted_bury
    store.SCHEMA += TABLE  # type: ignore[attr-defined]


if __name__ == "__main__":
    record()
    sys.exit(main())
