"""Checkpoints that are being read: no process deletes them meanwhile."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

LOCKED = "manifest.json"
"""The file of a checkpoint that is locked: its manifest."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Keep a checkpoint from being deleted meanwhile, by whatever process; the end of this one lets it go too."""
    with contextlib.ExitStack() as stack:
        if sys.platform != "win32":
            # A folder that is not there, or a disk without locks: whoever reads on will say what is wrong.
            with contextlib.suppress(OSError):
                file = stack.enter_context((path / LOCKED).open("rb"))
                fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def alone(path: Path) -> Iterator[bool]:
    """Tell whether no process is reading a checkpoint, and keep others from beginning to."""
    with contextlib.ExitStack() as stack:
        unread = True
        if sys.platform != "win32":
            try:
                file = stack.enter_context((path / LOCKED).open("rb"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                unread = False
            except OSError:  # never finished, or a disk without locks
                pass
        yield unread
