"""The hub's database: SQLite, one writer thread, many writes in one commit.

`write` returns after the commit and not before, so what it returned may be acknowledged.
"""

import asyncio
import itertools
import queue
import sqlite3
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import anyio.to_thread

from agent.hub.errors import CannotStart, StoreFailed
from agent.hub.schema import SCHEMA, SCHEMA_VERSION

T = TypeVar("T")
Db = sqlite3.Connection

MOST_IN_A_COMMIT = 512
RECORDS_IN_A_COMMIT = 500
"""Of those that others overtake: whoever waits for a word of theirs waits for the commit that runs, too."""
READERS = 3


@dataclass
class _Write:
    op: Callable[[Db], Any]
    future: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop
    records: int
    number: int
    """Of all writes, in the order in which they were asked for."""


def _settle(done: list[tuple["asyncio.Future[Any]", Any, BaseException | None]]) -> None:
    for future, value, error in done:
        if future.cancelled():
            continue
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)


class Store:
    """The one owner of the database file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bell: queue.SimpleQueue[bool] = queue.SimpleQueue()
        """Rung for each write that is queued; False ends the thread."""
        self._urgent: deque[_Write] = deque()
        self._behind: deque[_Write] = deque()
        self._was_urgent = False
        self._numbers = itertools.count()
        self._readers: queue.SimpleQueue[Db] = queue.SimpleQueue()
        self._limit = anyio.CapacityLimiter(READERS)
        self._db = self._open()
        self._prepare(self._db)
        for _ in range(READERS):
            self._readers.put(self._open(read_only=True))
        self._thread = threading.Thread(target=self._work, name="hub-store", daemon=True)
        self._thread.start()
        self.commits = 0

    def _open(self, read_only: bool = False) -> Db:
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=30)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("PRAGMA cache_size=-8192")
        if sys.platform == "darwin":
            db.execute("PRAGMA fullfsync=1")
        if read_only:
            db.execute("PRAGMA query_only=1")
        return db

    def _prepare(self, db: Db) -> None:
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found > SCHEMA_VERSION:
            raise CannotStart(
                f"{self.path} was written by a newer hub (schema {found}, this one knows {SCHEMA_VERSION}). "
                "Use the newer version, or another --data-dir."
            )
        db.executescript(SCHEMA)

    async def write(self, op: Callable[[Db], T], *, behind: bool = False, records: int = 1) -> T:
        """Run ``op`` in the writer's transaction; return what it returned once that is durable. See `submit`."""
        return await self.submit(op, behind=behind, records=records)

    def submit(self, op: Callable[[Db], T], *, behind: bool = False, records: int = 1) -> "asyncio.Future[T]":
        """Queue ``op``, which stores so many ``records``.

        With ``behind`` it comes after all earlier writes, and all that are not overtake it.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        write = _Write(op, future, loop, records, next(self._numbers))
        (self._behind if behind else self._urgent).append(write)
        self._bell.put(True)
        return future

    async def read(self, op: Callable[[Db], T]) -> T:
        """Run ``op`` on a reading connection, on another thread."""
        return await anyio.to_thread.run_sync(self._read, op, limiter=self._limit)

    def _read(self, op: Callable[[Db], T]) -> T:
        db = self._readers.get()
        try:
            return op(db)
        finally:
            self._readers.put(db)

    def close(self) -> None:
        """Commit what waits and close the file."""
        self._bell.put(False)
        self._thread.join()
        for _ in range(READERS):
            self._readers.get().close()
        self._db.close()

    def _work(self) -> None:
        while self._bell.get():
            if batch := self._next():
                self._commit(batch)
        while batch := self._next():
            self._commit(batch)

    def _next(self) -> list[_Write]:
        """Take what goes into one commit; empty where an earlier one took it all."""
        batch: list[_Write] = []
        if self._was_urgent or not self._urgent:
            room = RECORDS_IN_A_COMMIT
            while self._behind and len(batch) < MOST_IN_A_COMMIT and room > 0:
                # Not before an urgent write that was asked for earlier and waits for its turn.
                if self._urgent and self._urgent[0].number < self._behind[0].number:
                    break
                batch.append(self._behind.popleft())
                room -= batch[-1].records
            self._was_urgent = False
        if not batch:
            # By themselves, so that none waits for a batch of points; and those have every second commit at least.
            while self._urgent and len(batch) < MOST_IN_A_COMMIT:
                batch.append(self._urgent.popleft())
            self._was_urgent = bool(self._behind)
        return batch

    def _commit(self, batch: list[_Write]) -> None:
        db = self._db
        done: list[tuple[asyncio.Future[Any], Any, BaseException | None]] = []
        try:
            db.execute("BEGIN IMMEDIATE")
            for write in batch:
                db.execute("SAVEPOINT one")
                value: Any = None
                error: BaseException | None = None
                try:
                    value = write.op(db)
                except Exception as raised:
                    # An edge: whatever it is, it belongs to whoever asked for this write.
                    if not db.in_transaction:
                        # A full disk or a bad block: SQLite has rolled everything back by itself.
                        raise sqlite3.OperationalError(str(raised)) from raised
                    error = self._failed(raised) if isinstance(raised, sqlite3.Error) else raised
                    db.execute("ROLLBACK TO one")
                db.execute("RELEASE one")
                done.append((write.future, value, error))
            db.execute("COMMIT")
            self.commits += 1
        except sqlite3.Error as raised:
            if db.in_transaction:
                db.execute("ROLLBACK")
            done = [(write.future, None, self._failed(raised)) for write in batch]
        loops = {id(write.loop): write.loop for write in batch}
        for loop in loops.values():
            mine = [entry for entry, write in zip(done, batch, strict=True) if write.loop is loop]
            if not loop.is_closed():
                loop.call_soon_threadsafe(_settle, mine)

    def _failed(self, error: sqlite3.Error) -> StoreFailed:
        return StoreFailed(f"the hub's database at {self.path} could not be written: {error}")
