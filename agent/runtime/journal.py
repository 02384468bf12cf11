"""The journal: what must survive a restart. Jobs, commands, trainer events, the outbox, local history.

One thread owns the SQLite connection; whatever is queued while it commits shares the next commit.
"""

import asyncio
import os
import queue
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from agent.runtime.journal_room import ROOM, attempt, is_full, not_written, says_full
from agent.runtime.journal_schema import (
    JournalError,
    JournalFull,
    JournalInUse,
    JournalRefused,
    JournalTooNew,
    connect,
    told,
)
from agent.runtime.journal_tables import Point, Reader, Stream, Tx

__all__ = [
    "Journal",
    "JournalError",
    "JournalFull",
    "JournalInUse",
    "JournalRefused",
    "JournalTooNew",
    "Point",
    "Reader",
    "Stream",
    "Tx",
]

T = TypeVar("T")

BALLAST_BYTES = 512 << 10
MAX_BATCH = 512
ROOM_EVERY = 2.0
"""Seconds between two tries for room that fail: each writes `ROOM` bytes, which a busy agent would otherwise do with
each change for as long as a quota is full; and whoever has made room sees the jobs go on at once."""
SHRINK_PAGES = 4096
"""Free pages inside the file beyond which they are given back to the disk."""


class _Task(NamedTuple):
    run: Callable[[Any], Any]
    writes: bool
    future: asyncio.Future[Any]


class Journal:
    """The journal of one agent. Open it once; close it last."""

    def __init__(self, path: Path, connection: sqlite3.Connection, was_corrupt: Path | None) -> None:
        self.path = path
        self.was_corrupt = was_corrupt
        """Where a damaged journal was moved at the start; None if it was sound."""
        self.full = False
        """True while the disk is full and only lane 0, small changes and deletes are taken."""
        self._db = connection
        self._ballast = path.with_name(path.name + ".ballast")
        self._scrub = False
        self._try_at = 0.0
        """When the next try for room is due, by the monotonic clock."""
        self._closed = False
        self._queue: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="journal", daemon=True)

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """Open or make the journal. Blocks: for the agent's start. Raises `JournalError`."""
        journal = cls(path, *connect(path))
        journal._tidy()
        journal._thread.start()
        return journal

    async def write(self, change: Callable[[Tx], T]) -> T:
        """Apply ``change`` and return its result once it is on the disk.

        ``change`` runs on the journal's thread, must only use its argument, and may run twice. When
        the caller is cancelled it is applied all the same. What it raises is raised here, undone.
        """
        return await self._ask(change, writes=True)

    async def read(self, query: Callable[[Reader], T]) -> T:
        """Return the answer of ``query``, which sees what is committed."""
        return await self._ask(query, writes=False)

    async def close(self) -> None:
        """Finish what is queued and close the file."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _ask(self, run: Callable[[Any], T], *, writes: bool) -> T:
        if self._closed:
            raise JournalError(f"{self.path} is closed")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.put(_Task(run, writes, future))
        return await future

    # From here on: on the journal's thread.

    def _work(self) -> None:
        open_ = True
        while open_:
            batch = [self._queue.get()]
            while len(batch) < MAX_BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            open_ = None not in batch
            tasks = [task for task in batch if task is not None]
            writes = [task for task in tasks if task.writes]
            try:
                outcomes = self._commit(writes)
            except (sqlite3.Error, OSError) as exc:
                outcomes = [(task, None, exc) for task in writes]
            if self._scrub:
                self._tidy()
            outcomes += [self._read(task) for task in tasks if not task.writes]
            for task, result, error in outcomes:
                _deliver(task.future, result, error)
            self._tidy()
        self._db.close()

    def _commit(self, tasks: list[_Task]) -> "list[_Outcome]":
        if not tasks:
            return []
        try:
            return self._transaction(tasks)
        except sqlite3.Error as exc:
            self._roll_back()
            error = self._judge(exc)
            elsewhere = isinstance(error, JournalRefused) and error.elsewhere
            if not (elsewhere or isinstance(error, JournalFull)):
                return [(task, None, error) for task in tasks]
        # One by one, so that what does not fit, or lies on a bad block, does not take the rest with it.
        outcomes: list[_Outcome] = []
        for task in tasks:
            try:
                outcomes += self._transaction([task])
            except sqlite3.Error as exc:
                self._roll_back()
                outcomes.append((task, None, self._judge(exc)))
        return outcomes

    def _judge(self, exc: sqlite3.Error) -> sqlite3.Error | JournalError:
        """Return what the caller is told of an error; a full disk begins the full state."""
        if not not_written(exc):
            return exc
        # Once it is full, each try for room judges it anew.
        error = JournalFull(self.path) if self.full or is_full(exc) else told(exc, self.path)
        error.__cause__ = exc
        if isinstance(error, JournalFull) and not self.full:
            # The ballast makes room for deletes and for the little that tells of the trouble.
            self.full = True
            self._ballast.unlink(missing_ok=True)
        return error

    def _transaction(self, tasks: list[_Task]) -> "list[_Outcome]":
        """Apply ``tasks`` in one commit. Raises for what spoils all of them."""
        outcomes: list[_Outcome] = []
        tx = Tx(self._db, self.path, full=self.full)
        self._db.execute("BEGIN IMMEDIATE")
        for task in tasks:
            self._db.execute("SAVEPOINT change")
            try:
                outcomes.append((task, task.run(tx), None))
            except Exception as exc:  # the caller's, and raised there
                if isinstance(exc, sqlite3.Error) and not_written(exc):
                    raise
                self._db.execute("ROLLBACK TO change")
                outcomes.append((task, None, exc))
            self._db.execute("RELEASE change")
        self._db.execute("COMMIT")
        self._scrub = self._scrub or tx.scrubbed
        return outcomes

    def _read(self, task: _Task) -> "_Outcome":
        try:
            return task, task.run(Reader(self._db)), None
        except Exception as exc:  # noqa: BLE001 - it is the caller's, and is raised there
            return task, None, exc

    def _roll_back(self) -> None:
        # Some errors have rolled back already.
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _tidy(self) -> None:
        """Give free pages back when they are many or the disk is full; leave the full state once it is over."""
        # Where there is no room even for this, nothing depends on it, and it is tried again after the next change.
        with suppress(sqlite3.Error):
            free = self._db.execute("PRAGMA freelist_count").fetchone()[0]
            if free > (0 if self.full else SHRINK_PAGES):
                # execute() would stop after one page.
                self._db.executescript("PRAGMA incremental_vacuum(1024)")
            # A deleted secret still stands in the write-ahead log; on a full disk its room is wanted.
            if self._scrub or self.full:
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                self._scrub = False
        with suppress(OSError):
            if self.full or not self._ballast.exists():
                self._fill_ballast()

    def _fill_ballast(self) -> None:
        """Make the ballast if the disk has room for it several times over; that also ends the full state."""
        if time.monotonic() < self._try_at or shutil.disk_usage(self.path.parent).free < ROOM:
            return
        if not self._ballast.exists():
            part = self.path.with_name(self.path.name + ".part")
            try:
                attempt(self.path, part, ROOM if self.full else BALLAST_BYTES)
                os.truncate(part, BALLAST_BYTES)
                part.rename(self._ballast)
            except OSError as refused:
                self._try_at = time.monotonic() + ROOM_EVERY
                # A disk that broke meanwhile is not told as full: the next change that it refuses says what it is.
                self.full = self.full and says_full(refused)
                part.unlink(missing_ok=True)
                raise
        self.full = False


_Outcome = tuple[_Task, Any, Exception | None]


def _deliver(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    def settle() -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    # A closed loop has nobody left to tell; its last change is committed all the same.
    with suppress(RuntimeError):
        future.get_loop().call_soon_threadsafe(settle)
