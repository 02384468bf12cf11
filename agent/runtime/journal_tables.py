"""What stands in the journal and how it is asked and changed. All of it runs on the journal's thread."""

import sqlite3
import zlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from agent.runtime.journal_schema import JournalError, JournalFull

MAX_COMMANDS = 10_000
"""How many commands the ledger remembers. A repeat of an older one would run again."""

_SEQ_BITS = 40
_AT_ONCE = 64
"""Rows in one statement."""
_RECORD = "INSERT INTO records VALUES (?, ?, ?)"
_POINT = "INSERT INTO points VALUES (?, ?, ?, ?, ?)"


class Stream(NamedTuple):
    """The unacknowledged part of a stream. Empty: ``first`` is ``last + 1``."""

    epoch: int
    scope: str
    lane: int
    first: int
    last: int


class Point(NamedTuple):
    """One stored point of a job's metrics."""

    step: int
    attempt: int
    body: bytes


class Reader:
    """What can be asked of the journal."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    def get_meta(self, key: str) -> str | None:
        value: str | None = self._one("SELECT value FROM meta WHERE key = ?", key)
        return value

    def metas(self, prefix: str) -> dict[str, str]:
        """Return the values of all keys that begin with ``prefix``, by what follows it."""
        rows = self._db.execute(
            "SELECT key, value FROM meta WHERE substr(key, 1, ?) = ?", (len(prefix), prefix)
        )
        return {key[len(prefix) :]: value for key, value in rows}

    def epoch(self) -> int:
        """Return the current epoch; `set_epoch` must have been called once in the journal's life."""
        value = self.get_meta("epoch")
        assert value is not None, "set_epoch comes before any use of the outbox"
        return int(value, 16)

    def get_job(self, job_id: str) -> bytes | None:
        body: bytes | None = self._one("SELECT body FROM jobs WHERE job_id = ?", job_id)
        return body

    def all_jobs(self) -> list[tuple[str, bytes]]:
        """Return each job's id and body, by position."""
        return self._db.execute("SELECT job_id, body FROM jobs ORDER BY position, rowid").fetchall()

    def get_secret(self, job_id: str, name: str) -> str | None:
        value: str | None = self._one("SELECT value FROM secrets WHERE job_id = ? AND name = ?", job_id, name)
        return value

    def events_seen(self, job_id: str, attempt: int) -> int:
        """Return the highest trainer event of this attempt that is committed; 0 if none."""
        return self._one("SELECT seen FROM attempts WHERE job_id = ? AND attempt = ?", job_id, attempt) or 0

    def streams(self) -> list[Stream]:
        """Return the streams with unacknowledged records and all of the current epoch, oldest first."""
        rows = self._db.execute(
            """SELECT epoch, scope, lane, acked + 1, last FROM streams
            WHERE last > acked OR epoch = (SELECT value FROM meta WHERE key = 'epoch') ORDER BY id"""
        )
        return [Stream(int(epoch, 16), scope, lane, first, last) for epoch, scope, lane, first, last in rows]

    def records(
        self, epoch: int, scope: str, lane: int, after_seq: int, limit: int, max_bytes: int
    ) -> list[tuple[int, bytes | None]]:
        """Return unacknowledged records after ``after_seq``, dense, at least one if there is one.

        A record that was dropped, or whose bytes are not those that were stored, has the body None.
        """
        found = self._stream(epoch, scope, lane)
        if found is None:
            return []
        stream, last, acked = found
        seq = max(after_seq, acked)
        end = min(last, seq + limit)
        rows = self._db.execute(
            "SELECT id, crc, body FROM records WHERE id > ? AND id <= ? ORDER BY id",
            ((stream << _SEQ_BITS) + seq, (stream << _SEQ_BITS) + end),
        )
        result: list[tuple[int, bytes | None]] = []
        size = 0
        for row_id, crc, body in rows:
            size += len(body)
            if result and size > max_bytes:
                return result
            stored = row_id - (stream << _SEQ_BITS)
            result.extend((missing, None) for missing in range(seq + 1, stored))
            result.append((stored, body if zlib.crc32(body) == crc else None))
            seq = stored
        result.extend((missing, None) for missing in range(seq + 1, end + 1))
        return result

    def backlog(self) -> dict[int, tuple[int, int]]:
        """Return for each lane how many records are stored unacknowledged, and their bytes."""
        rows = self._db.execute("SELECT lane, SUM(records), SUM(bytes) FROM streams GROUP BY lane")
        return {lane: (records, size) for lane, records, size in rows}

    def points(self, job_id: str, after_step: int, limit: int) -> list[Point]:
        """Return the points of the next ``limit`` steps; for each step those of its newest attempt."""
        rows = self._db.execute(
            """SELECT step, attempt, body FROM points AS p WHERE job_id = ?1
            AND step IN (SELECT DISTINCT step FROM points WHERE job_id = ?1 AND step > ?2 ORDER BY step LIMIT ?3)
            AND attempt = (SELECT MAX(attempt) FROM points WHERE job_id = ?1 AND step = p.step)
            ORDER BY step, part""",
            (job_id, after_step, limit),
        )
        return [Point(*row) for row in rows]

    def _stream(self, epoch: int, scope: str, lane: int) -> tuple[int, int, int] | None:
        row: tuple[int, int, int] | None = self._db.execute(
            "SELECT id, last, acked FROM streams WHERE epoch = ? AND scope = ? AND lane = ?",
            (f"{epoch:016x}", scope, lane),
        ).fetchone()
        return row

    def _one(self, sql: str, *parameters: object) -> Any:
        row = self._db.execute(sql, parameters).fetchone()
        return None if row is None else row[0]


class Tx(Reader):
    """What can be changed. One change is applied as a whole or not at all."""

    def __init__(self, connection: sqlite3.Connection, path: Path, *, full: bool = False) -> None:
        super().__init__(connection)
        self._path = path
        self._full = full
        self._epoch: str | None = None
        self.scrubbed = False

    def set_meta(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def next_boot(self) -> int:
        """Count this start of the agent and return its number, from 1."""
        boot = int(self.get_meta("boot") or 0) + 1
        self.set_meta("boot", str(boot))
        return boot

    def put_job(self, job_id: str, state: str, order: int, body: bytes) -> None:
        self._db.execute(
            """INSERT INTO jobs VALUES (?, ?, ?, ?) ON CONFLICT (job_id) DO UPDATE
            SET position = excluded.position, state = excluded.state, body = excluded.body""",
            (job_id, order, state, body),
        )

    def delete_job(self, job_id: str) -> None:
        """Forget the job with its secrets, events and points. What the outbox holds of it stays."""
        self.scrub_secrets(job_id)
        for table in ("jobs", "attempts", "points"):
            self._db.execute(f"DELETE FROM {table} WHERE job_id = ?", (job_id,))  # noqa: S608 - our names

    def put_secret(self, job_id: str, name: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO secrets VALUES (?, ?, ?)", (job_id, name, value))

    def scrub_secrets(self, job_id: str) -> None:
        """Delete the job's secrets so that their bytes are in no file of the journal afterwards."""
        self._db.execute("PRAGMA secure_delete = ON")
        try:
            gone = self._db.execute("DELETE FROM secrets WHERE job_id = ?", (job_id,)).rowcount
        finally:
            self._db.execute("PRAGMA secure_delete = OFF")
        self.scrubbed = self.scrubbed or gone > 0

    def mark_event(self, job_id: str, attempt: int, number: int) -> None:
        """Remember that the attempt's events up to ``number`` are in the journal."""
        self._db.execute(
            """INSERT INTO attempts VALUES (?, ?, ?) ON CONFLICT (job_id, attempt)
            DO UPDATE SET seen = MAX(seen, excluded.seen)""",
            (job_id, attempt, number),
        )

    def command_begin(self, command_id: str) -> bytes | None:
        """Enter a command before its effect. None: go on. Otherwise it was begun before, and this is its
        result, or b"" if how it ended is not known: answer that, and do not run it again."""
        row = self._db.execute("SELECT result FROM commands WHERE command_id = ?", (command_id,)).fetchone()
        if row is not None:
            return row[0] or b""
        number = self._db.execute("INSERT INTO commands (command_id) VALUES (?)", (command_id,)).lastrowid
        assert number is not None
        self._db.execute("DELETE FROM commands WHERE number <= ?", (number - MAX_COMMANDS,))
        return None

    def command_end(self, command_id: str, result: bytes) -> None:
        self._db.execute("UPDATE commands SET result = ? WHERE command_id = ?", (result, command_id))

    def set_epoch(self, epoch: int) -> None:
        """Begin the streams of this boot. Streams of older ones stay until they are acknowledged."""
        self.set_meta("epoch", f"{epoch:016x}")
        self._epoch = None
        self._db.execute("DELETE FROM streams WHERE last = acked AND epoch != ?", (f"{epoch:016x}",))

    def append(self, scope: str, lane: int, body: bytes) -> int:
        """Store a record at the end of its stream and return its number, dense from 1.

        On a full disk only lane 0 is still taken: `JournalFull` for the others.
        """
        return self.append_all(scope, lane, [body])

    def append_all(self, scope: str, lane: int, bodies: list[bytes]) -> int:
        """Store records at the end of one stream, in order; return the number of the last. See `append`."""
        if self._full and lane > 0:
            raise JournalFull(self._path)
        if self._epoch is None:
            self._epoch = f"{self.epoch():016x}"
        stream, last = self._db.execute(
            """INSERT INTO streams (epoch, scope, lane, last, records, bytes) VALUES (?1, ?2, ?3, ?4, ?4, ?5)
            ON CONFLICT (epoch, scope, lane) DO UPDATE
            SET last = last + ?4, records = records + ?4, bytes = bytes + ?5 RETURNING id, last""",
            (self._epoch, scope, lane, len(bodies), sum(map(len, bodies))),
        ).fetchone()
        first = (stream << _SEQ_BITS) + last - len(bodies) + 1
        self._insert(_RECORD, [(first + at, zlib.crc32(body), body) for at, body in enumerate(bodies)])
        return int(last)

    def trim(self, epoch: int, scope: str, lane: int, acked: int) -> int:
        """Delete what the backend has stored, and return how many records. An older ack changes nothing."""
        found = self._stream(epoch, scope, lane)
        if found is None or acked <= found[2]:
            return 0
        stream, last, _ = found
        if acked > last:
            raise JournalError(
                f"stream {epoch:016x}/{scope}/{lane} ends at {last}, but {acked} is acknowledged"
            )
        gone = self._delete(stream, acked)
        self._db.execute("UPDATE streams SET acked = ? WHERE id = ?", (acked, stream))
        return gone

    def drop(self, epoch: int, scope: str, lane: int, upto: int) -> int:
        """Give up unacknowledged records up to ``upto`` for want of space; they read as None until acked."""
        found = self._stream(epoch, scope, lane)
        return 0 if found is None else self._delete(found[0], min(upto, found[1]))

    def put_points(self, rows: Sequence[tuple[str, int, int, bytes]]) -> None:
        """Add points (job, attempt, step, body); a step may have several, such as one of training and one of
        evaluation."""
        if self._full:
            raise JournalFull(self._path)
        steps: dict[tuple[str, int], list[int]] = {}
        for job_id, attempt, step, _ in rows:
            steps.setdefault((job_id, attempt), []).append(step)
        parts: dict[tuple[str, int, int], int] = {}
        for (job_id, attempt), among in steps.items():
            stored = self._db.execute(
                """SELECT step, COUNT(*) FROM points WHERE job_id = ? AND step BETWEEN ? AND ? AND attempt = ?
                GROUP BY step""",
                (job_id, min(among), max(among), attempt),
            )
            parts |= {(job_id, attempt, step): count for step, count in stored}
        numbered = []
        for job_id, attempt, step, body in rows:
            part = parts.get((job_id, attempt, step), 0)
            parts[job_id, attempt, step] = part + 1
            numbered.append((job_id, step, attempt, part, body))
        self._insert(_POINT, numbered)

    def _insert(self, one: str, rows: list[tuple[Any, ...]]) -> None:
        """Insert rows, many with one statement: after each the interpreter's lock is fought for with the loop.

        ``one``: the statement that inserts one row.
        """
        whole = len(rows) - len(rows) % _AT_ONCE
        many = one + (", " + one[one.index("(") :]) * (_AT_ONCE - 1)
        for at in range(0, whole, _AT_ONCE):
            self._db.execute(many, list(chain.from_iterable(rows[at : at + _AT_ONCE])))
        self._db.executemany(one, rows[whole:])

    def _delete(self, stream: int, upto: int) -> int:
        bounds = (stream << _SEQ_BITS, (stream << _SEQ_BITS) + upto)
        count, size = self._db.execute(
            "SELECT COUNT(*), COALESCE(SUM(LENGTH(body)), 0) FROM records WHERE id > ? AND id <= ?", bounds
        ).fetchone()
        self._db.execute("DELETE FROM records WHERE id > ? AND id <= ?", bounds)
        self._db.execute(
            "UPDATE streams SET records = records - ?, bytes = bytes - ? WHERE id = ?", (count, size, stream)
        )
        return int(count)
