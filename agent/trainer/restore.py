"""Which checkpoint an attempt goes on from, and from which other jobs the run descends."""

import shutil
from collections.abc import Callable
from pathlib import Path

from agent.trainer.checkpoint import Ancestor, BadCheckpoint, Checkpoints, Found, Manifest, verify
from agent.trainer.errors import TrainerError
from agent.trainer.progress import Progress
from protocol.codec import UNREADABLE
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
    if checkpoints.folder.is_dir():
        checkpoints.sweep()
        # Of a trainer that was killed while it checked its resume.
        shutil.rmtree(checkpoints.folder / REPLAY, ignore_errors=True)
    if start.resume_from:
        path = Path(start.resume_from)
        say(Preparing(Phase.RESTORE, f"Checking the checkpoint {path.name}."))
        found = _verified(path, "Resume from another one, or start the job again.")
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
        checkpoints.note_origin(start.attempt, path)
        return found, _counters(found)
    newest, passed = checkpoints.newest_good()
    for sentence in passed:
        say(Note("warning", sentence))
    if newest is None:
        _refuse_newer(checkpoints)
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


def _refuse_newer(checkpoints: Checkpoints) -> None:
    """Raise TrainerError where another version of the agent could go on: the job must not begin anew meanwhile."""
    newer = checkpoints.of_newer_agents()
    if newer:
        path, why = newer[-1]
        raise TrainerError(
            FailureReason.CHECKPOINT,
            f"The job cannot go on from its checkpoint {path.name}: {why}. It is untouched.",
            advice="Update the agent, then retry the job. To begin anew instead, submit it as a new job.",
        )


def lineage(found: Found | None, spec: JobSpec) -> list[Ancestor]:
    """Return the checkpoints of other jobs that this run descends from, the oldest first."""
    if found is None:
        return []
    before, manifest = found.manifest.lineage, found.manifest
    if manifest.job_id == spec.job_id:
        return before
    return [*before, Ancestor(manifest.job_id, found.path.name, manifest.step, manifest.check)]


def led_to(target: Manifest, earlier: Manifest) -> bool:
    """Tell whether the run came by an earlier checkpoint of its job, rather than went back behind it."""
    if not target.begun:  # by an older agent
        return earlier.attempt <= target.attempt
    until = target.step
    for attempt, first in reversed(target.begun):
        if earlier.attempt == attempt:
            return first <= earlier.step <= until
        until = first
    return earlier.attempt < target.begun[0][0] and earlier.step <= until


def _verified(path: Path, advice: str) -> Found:
    try:
        return verify(path)
    except BadCheckpoint as bad:
        sentence = f"The checkpoint {path} cannot be used: {bad}. {advice}"
        raise TrainerError(FailureReason.CHECKPOINT, sentence) from bad


def _counters(found: Found) -> Progress:
    try:
        return Progress.load(found.path)
    except (OSError, *UNREADABLE) as error:
        raise TrainerError(
            FailureReason.CHECKPOINT,
            f"The counters in the checkpoint {found.path} cannot be read: {error}.",
        ) from error
