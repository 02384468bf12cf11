"""The checkpoint of another job that a new one begins with, brought into the new job's own folder.

It is linked, not copied: it costs no disk, and stays when the other job deletes its own.
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from agent.runtime.workspace import WorkspaceError, checkpoints_of, resolve_under
from protocol.codec import UNREADABLE
from protocol.failures import FailureReason
from protocol.jobspec import BranchSpec

if sys.platform != "win32":
    import fcntl

FOLDER = "branched-from"
"""In the job's checkpoints folder: never listed, counted or deleted with its own checkpoints."""
_MANIFEST = "manifest.json"
_STAGING = ".staging-"
_OWN_NAME = re.compile(r"step-[0-9]+")


class _Manifest(msgspec.Struct, frozen=True):
    step: int


class NoCheckpoint(WorkspaceError):
    """There is nothing to branch from."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, FailureReason.CHECKPOINT)


def take(wanted: BranchSpec, checkpoints_dir: Path, job_id: str) -> Path:
    """Return the folder of the checkpoint that the job begins with; linked there at its first start.

    Raises WorkspaceError, OSError.
    """
    place = checkpoints_dir / job_id / FOLDER
    kept = sorted(place.glob("step-*"))
    if kept:
        return kept[0]
    source = _choose(wanted, checkpoints_dir)
    staging = place / f"{_STAGING}{source.name}"
    shutil.rmtree(staging, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with _held(source):
            shutil.copytree(source, staging, copy_function=_link)
    except FileNotFoundError:
        raise NoCheckpoint(
            f"The checkpoint {source.name} of the job {wanted.job_id} was deleted in this very moment. "
            "Branch from another one, and pin it first."
        ) from None
    # One that was put aside has another name; under this one the next start finds it.
    target = place / (source.name if _OWN_NAME.fullmatch(source.name) else f"step-{_step(staging)}")
    staging.replace(target)
    return target


def _choose(wanted: BranchSpec, checkpoints_dir: Path) -> Path:
    folder = checkpoints_dir / wanted.job_id
    found = checkpoints_of(folder)
    if not found:
        raise NoCheckpoint(
            f"The job {wanted.job_id} has no checkpoint on this machine ({folder}), so no job can branch from it."
        )
    if not wanted.checkpoint:
        return Path(found[0]["path"])
    if wanted.checkpoint == "best":
        best = [one for one in found if one["is_best"]]
        if not best:
            raise NoCheckpoint(f"The job {wanted.job_id} has no best checkpoint: it has evaluated at none.")
        return Path(best[0]["path"])
    path = resolve_under(folder, wanted.checkpoint, "checkpoint")
    if not (path / _MANIFEST).is_file():
        names = ", ".join(Path(one["path"]).name for one in found)
        raise NoCheckpoint(
            f'"{wanted.checkpoint}" of the job {wanted.job_id} is no checkpoint; it has {names}.'
        )
    return path


def _step(checkpoint: Path) -> int:
    try:
        return msgspec.json.decode((checkpoint / _MANIFEST).read_bytes(), type=_Manifest).step
    except UNREADABLE as error:
        shutil.rmtree(checkpoint, ignore_errors=True)
        name = checkpoint.name.removeprefix(_STAGING)
        raise NoCheckpoint(
            f"The checkpoint {name} cannot be branched from: its manifest cannot be read ({error}). "
            "Branch from another one."
        ) from error


@contextlib.contextmanager
def _held(checkpoint: Path) -> Iterator[None]:
    """Keep the other job's trainer from deleting it meanwhile: it asks for this lock first."""
    with (checkpoint / _MANIFEST).open("rb") as file:
        if sys.platform != "win32":
            with contextlib.suppress(OSError):  # a disk without locks
                fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
    return target
