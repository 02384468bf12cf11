"""Which checkpoint an attempt goes on from, and from which other jobs the run descends."""

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.trainer.checkpoint import Ancestor, BadCheckpoint, Checkpoints, Found, verify
from agent.trainer.errors import TrainerError
from agent.trainer.progress import Progress
from protocol.failures import FailureReason
from protocol.jobspec import JobSpec
from protocol.worker import Note, Phase, Preparing, Start

REPLAY = ".replay"
"""Folder in the job's checkpoints folder where a resume is checked; see `agent.trainer.replay`."""


def find(
    start: Start, checkpoints: Checkpoints, say: Callable[[Note | Preparing], None]
) -> tuple[Found, Progress] | None:
    """Return the checkpoint to go on from with its counters: the one that was named, else the newest that verifies.

    A job that branches off begins with the other job's, until it has a good one of its own. None: from the
    beginning. Raises TrainerError.
    """
    if start.resume_from:
        path = Path(start.resume_from)
        say(Preparing(Phase.RESTORE, f"Checking the checkpoint {path.name}."))
        found = _verified(path, "Resume from another one, or start the job again.")
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
        checkpoints.note_origin(start.attempt, path)
        return found, _counters(found)
    if checkpoints.folder.is_dir():
        checkpoints.sweep()
        # Of a trainer that was killed while it checked its resume.
        shutil.rmtree(checkpoints.folder / REPLAY, ignore_errors=True)
    newest, passed = checkpoints.newest_good()
    for sentence in passed:
        say(Note("warning", sentence))
    if newest is None:
        if not start.workspace.branch:
            if passed:
                say(Note("warning", "No checkpoint could be used, so the job starts from its beginning."))
            return None
        path = Path(start.workspace.branch)
        say(Preparing(Phase.RESTORE, f"Checking the checkpoint {path.name}, which this job begins with."))
        newest = _verified(path, "Branch from another one.")
        if passed:
            say(
                Note("warning", "No checkpoint could be used, so the job starts again where it branched off.")
            )
    return newest, _counters(newest)


def lineage(found: Found | None, spec: JobSpec) -> list[Ancestor]:
    """Return the checkpoints of other jobs that this run descends from, the oldest first."""
    if found is None:
        return []
    before, manifest = found.manifest.lineage, found.manifest
    if manifest.job_id == spec.job_id:
        return before
    return [*before, Ancestor(manifest.job_id, found.path.name, manifest.step, manifest.check)]


def _verified(path: Path, advice: str) -> Found:
    try:
        return verify(path)
    except BadCheckpoint as bad:
        sentence = f"The checkpoint {path} cannot be used: {bad}. {advice}"
        raise TrainerError(FailureReason.CHECKPOINT, sentence) from bad


def _counters(found: Found) -> Progress:
    try:
        return Progress.load(found.path)
    except (OSError, msgspec.DecodeError) as error:
        raise TrainerError(
            FailureReason.CHECKPOINT,
            f"The counters in the checkpoint {found.path} cannot be read: {error}.",
        ) from error
