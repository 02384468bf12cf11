"""Writing to disks that fill up, vanish or refuse."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from agent.trainer.errors import TrainerError
from protocol.failures import FailureReason

MB = 1_000_000
SLACK = 16 * MB
"""Left free by a write: other programs write too."""

PROBE = ".probe-"
DOOMED = ".doomed-"
"""Before the name of a folder that is being deleted."""


class NoRoom(TrainerError):
    """A disk is full. What was on it is untouched, and the job can wait for room."""

    def __init__(self, folder: Path, what: str, needed: int = 0) -> None:
        self.needed = needed
        self.free = free_bytes(folder)
        wanted = f"about {_mb(needed)} are needed and " if needed else ""
        super().__init__(
            FailureReason.DISK_FULL,
            f"There is no room for {what}: {wanted}{_mb(self.free)} are free on the disk of {folder}. "
            "What was saved before is untouched; free some space there, and the job can go on.",
        )


def need_room(folder: Path, what: str, needed: int) -> None:
    """Raise NoRoom unless so many bytes can be written."""
    if not has_room(folder, needed):
        raise NoRoom(folder, what, needed + SLACK)


def has_room(folder: Path, needed: int) -> bool:
    """Tell whether so many bytes can be written."""
    return free_bytes(folder) >= needed + SLACK


def free_bytes(folder: Path) -> int:
    """Return the free space where ``folder`` is, or would be."""
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    return shutil.disk_usage(there).free


def check_writable(folder: Path, what: str) -> None:
    """Make ``folder`` and a file in it; raises TrainerError with a sentence, so that nobody trains in vain."""
    probe = folder / f"{PROBE}{os.getpid()}"
    with refusals_told(folder, what):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_small(probe, b"Can be deleted.")
        finally:
            probe.unlink(missing_ok=True)


@contextlib.contextmanager
def refusals_told(folder: Path, what: str, needed: int = 0) -> Iterator[None]:
    """Turn a full disk into NoRoom, and any other refusal to write into a sentence with the folder."""
    try:
        yield
    except TrainerError:
        raise
    except Exception as error:  # libraries wrap a full disk in errors of their own
        if is_disk_full(error, folder):
            raise NoRoom(folder, what, needed) from error
        if not isinstance(error, OSError):
            raise
        why = error.strerror or str(error)
        raise TrainerError(
            FailureReason.PERMISSION,
            f"{what[0].upper()}{what[1:]} cannot be written to {folder}: {why}. "
            "Let the user whom the agent runs as write there, or mount the disk again.",
            advice="Once the agent can write there again, retry the job: it goes on from its last good checkpoint.",
        ) from error


def is_disk_full(error: BaseException | None, folder: Path) -> bool:
    """Tell whether ``error`` comes of a disk with no room; safetensors and torch say so in words only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error)
        if "No space left" in text or "os error 28" in text:
            return True
        if "inline_container" in text or "PytorchStreamWriter" in text:
            return folder.exists() and free_bytes(folder) <= 1 << 20
        error = error.__cause__ or error.__context__
    return False


def write_small(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or as before."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder, or a file's contents, survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(staging: Path, final: Path) -> None:
    """Put a finished folder in the place of ``final``; at each moment one of the two is whole on disk."""
    if final.exists():
        grave = final.with_name(f"{DOOMED}{final.name}")
        shutil.rmtree(grave, ignore_errors=True)
        final.rename(grave)
        staging.replace(final)
        shutil.rmtree(grave, ignore_errors=True)
    else:
        staging.replace(final)
    sync_folder(final.parent)


def _mb(size: int) -> str:
    return f"{size / MB:.0f} MB"
