"""Whether there is room under the journal: what a write that failed says of the disk."""

import errno
import os
import sqlite3
import sys
from pathlib import Path

ROOM = 2 << 20
"""Bytes that must find room beside the journal: more than a change and the ballast take, so that a quota of which a
little is left counts as full."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WRITING = (
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_DIR_FSYNC,
    sqlite3.SQLITE_IOERR_TRUNCATE,
)


def code_of(exc: sqlite3.Error) -> int:
    """Return SQLite's primary result code; 0 where the error is the Python module's own."""
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF


def is_full(exc: sqlite3.Error) -> bool:
    """Tell whether SQLite itself calls the disk full."""
    return code_of(exc) == sqlite3.SQLITE_FULL


def not_written(exc: sqlite3.Error) -> bool:
    """Tell whether the disk did not take something: it is full, or a quota (EDQUOT) is, or it is broken (EIO).

    SQLite knows only the first by itself and says the same of the others, whether a write or only a sync met it.
    """
    return is_full(exc) or getattr(exc, "sqlite_errorcode", 0) in _WRITING


def says_full(refused: OSError) -> bool:
    """Tell whether what an attempt met is a limit that a person can lift."""
    return refused.errno in _FULL


def attempt(path: Path, part: Path, size: int = ROOM) -> None:
    """Write ``size`` bytes to ``part``, beside the journal at ``path``. Raises OSError: what the disk refuses it for."""
    _check_limit(path, size)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        # Random, since some file systems store no zeros.
        file.write(os.urandom(size))
        file.flush()
        # What a quota leaves is known only by writing it, and over a network by syncing it.
        os.fsync(file.fileno())


def _check_limit(path: Path, size: int) -> None:
    """Raise EFBIG where the journal is about as large as the process may make a file; ``part`` is not yet."""
    if sys.platform == "win32":
        return
    import resource

    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    files = (path, path.with_name(path.name + "-wal"))
    largest = max((file.stat().st_size for file in files if file.exists()), default=0)
    if most != resource.RLIM_INFINITY and largest + size > most:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
