"""The journal's file: its tables, how it is opened, and how an old or damaged one is treated."""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path

from agent.errors import AgentError, Exit
from agent.runtime.journal_room import attempt, code_of, is_full, not_written, says_full

BUSY_SECONDS = 1.0

# One tuple of statements per schema version, applied in order and never edited once released.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE jobs (
            job_id TEXT PRIMARY KEY, position INTEGER NOT NULL, state TEXT NOT NULL, body BLOB NOT NULL)""",
        "CREATE INDEX jobs_by_position ON jobs (position)",
        """CREATE TABLE secrets (
            job_id TEXT, name TEXT, value TEXT NOT NULL, PRIMARY KEY (job_id, name)) WITHOUT ROWID""",
        """CREATE TABLE attempts (
            job_id TEXT, attempt INTEGER, seen INTEGER NOT NULL, PRIMARY KEY (job_id, attempt)) WITHOUT ROWID""",
        # result NULL: begun, and nobody knows how it ended.
        "CREATE TABLE commands (number INTEGER PRIMARY KEY, command_id TEXT NOT NULL UNIQUE, result BLOB)",
        # An epoch is an unsigned 64-bit number and SQLite's integers are signed, so it is kept as hex.
        # records and bytes count what is stored now; a dropped record is in neither.
        """CREATE TABLE streams (
            id INTEGER PRIMARY KEY, epoch TEXT NOT NULL, scope TEXT NOT NULL, lane INTEGER NOT NULL,
            last INTEGER NOT NULL DEFAULT 0, acked INTEGER NOT NULL DEFAULT 0,
            records INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0,
            UNIQUE (epoch, scope, lane))""",
        # id is stream id * 2**40 + seq: one B-tree holds each stream's records side by side.
        "CREATE TABLE records (id INTEGER PRIMARY KEY, crc INTEGER NOT NULL, body BLOB NOT NULL)",
        """CREATE TABLE points (
            job_id TEXT, step INTEGER, attempt INTEGER, part INTEGER, body BLOB NOT NULL,
            PRIMARY KEY (job_id, step, attempt, part)) WITHOUT ROWID""",
    ),
)

VERSION = len(MIGRATIONS)


class JournalError(AgentError):
    """Base of what can be wrong with the journal."""


class JournalInUse(JournalError):
    """Another process holds the journal."""

    exit_code = Exit.ALREADY_RUNNING

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} is in use by another training agent. "
            "Stop that one first, or give this one a folder of its own with AGENT_HOME."
        )
        self.path = path


class JournalTooNew(JournalError):
    """The journal was written by a later version of this program."""

    def __init__(self, path: Path, found: int) -> None:
        super().__init__(
            f"{path} has schema version {found} and this version of the agent knows up to "
            f"{VERSION}. Install the newer agent again, or move the file away to start without its jobs."
        )
        self.path = path
        self.found = found


class JournalFull(JournalError):
    """The disk under the journal is full; what was to be written was not."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"no space left on the disk of {path}, or a quota or another limit on it is reached. "
            "Free some; nothing stored so far is lost."
        )
        self.path = path


class JournalRefused(JournalError):
    """The disk under the journal takes no writes, for a reason that room does not cure."""

    def __init__(self, path: Path, refused: OSError | None) -> None:
        why = (
            refused.strerror
            if refused is not None
            else "it took as much beside the journal, and nothing there"
        )
        super().__init__(
            f"the disk of {path} refuses writes: {why}. It may be failing, mounted read-only or gone. "
            "Look into the system's log (dmesg), mend or replace it, and start the agent again; what is stored "
            "there was left as it is."
        )
        self.path = path
        self.elsewhere = refused is None
        """The folder takes writes, only the journal's own files do not: another try may do."""


def told(exc: sqlite3.Error, path: Path) -> "JournalFull | JournalRefused":
    """Say what a write that failed means. For SQLite a broken disk and a full quota are one, so it is tried here.

    Only what an attempt is refused for tells them apart: under a quota the file system shows free space. Where it is
    not refused, a limit is no reason any more, and calling the disk full would have the agent wait for ever.
    """
    if is_full(exc):
        return JournalFull(path)
    part = path.with_name(path.name + ".part")
    try:
        attempt(path, part)
    except OSError as refused:
        return JournalFull(path) if says_full(refused) else JournalRefused(path, refused)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return JournalRefused(path, None)


def connect(path: Path) -> tuple[sqlite3.Connection, Path | None]:
    """Open the journal at ``path`` and bring it to `VERSION`.

    A damaged file is moved aside and a fresh one made; the second item is then where the old one went.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        return _connect(path), None
    except sqlite3.DatabaseError as exc:
        if not _is_damage(exc):
            raise
    aside = _move_aside(path)
    return _connect(path), aside


def _connect(path: Path) -> sqlite3.Connection:
    # SQLite gives its -wal file the permissions of the main one. An existing file is not opened here:
    # closing it again would take away the locks this process may have on it.
    if path.exists():
        path.chmod(0o600)
    else:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        # Only before the first table does this have an effect; it lets a journal that was large shrink.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
        # One process owns the journal. It also spares the -shm file, which a full disk would break.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        # On macOS a plain fsync leaves the data in the drive's cache; elsewhere this is ignored.
        connection.execute("PRAGMA fullfsync = 1")
        # Small, so that deleting the whole backlog on a full disk fits into the ballast.
        connection.execute("PRAGMA wal_autocheckpoint = 64")
        # Takes the lock now: a second agent must be refused at its start, not at its first job.
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("COMMIT")
        _migrate(connection, path)
        # After the migration, since a journal of a later version must be refused, not judged.
        answers = connection.execute("PRAGMA quick_check(1)").fetchall()
        if answers != [("ok",)]:
            raise _Damaged(f"{path}: {answers[0][0]}")
    except sqlite3.DatabaseError as exc:
        connection.close()
        if code_of(exc) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise JournalInUse(path) from exc
        if not_written(exc):
            raise told(exc, path) from exc
        raise
    except JournalError:
        connection.close()
        raise
    return connection


class _Damaged(sqlite3.DatabaseError):
    """What quick_check found."""


def _is_damage(exc: sqlite3.DatabaseError) -> bool:
    return isinstance(exc, _Damaged) or code_of(exc) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    found: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if found > VERSION:
        raise JournalTooNew(path, found)
    for version in range(found, VERSION):
        connection.execute("BEGIN IMMEDIATE")
        for statement in MIGRATIONS[version]:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {version + 1}")
        connection.execute("COMMIT")


def _move_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    # A log that is left behind does no harm: SQLite deletes one that it finds beside an empty file.
    path.rename(aside)
    return aside
