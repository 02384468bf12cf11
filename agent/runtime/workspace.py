"""Where a job may read and write: paths that cannot leave their folder, the job's own folders, its checkpoints."""

import math
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypedDict

import msgspec

from agent.errors import AgentError
from protocol.codec import UNREADABLE
from protocol.failures import FailureReason
from protocol.jobspec import JobId

MARKER = ".training-agent-job"
"""File in a job's checkpoints folder that says which job made it, and so that its folders are ours."""
PINNED = ".pinned-"
"""Before a checkpoint's name, beside it: the file that says it must stay. The trainer looks at it."""

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HUB_NAME = re.compile(rf"(?:{_PART}/)?{_PART}")
_CHECKPOINT = re.compile(r"step-[0-9]{1,12}")
_FILE_ENDING = re.compile(
    r"\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|zst|zip|bz2|xz|safetensors|gguf)$", re.IGNORECASE
)


class WorkspaceError(AgentError):
    """A job cannot have the path or folder it asks for. ``reason`` is what the job then fails with."""

    def __init__(self, sentence: str, reason: FailureReason = FailureReason.PERMISSION) -> None:
        super().__init__(sentence)
        self.reason = reason


class OutsideFolder(WorkspaceError):
    """A path leaves the folder that it must stay in."""


class NotThere(WorkspaceError):
    """Nothing lies at the path."""


class FolderTaken(WorkspaceError):
    """A folder with the job's name was there before the job, and is not the agent's to write to."""


class Folders(NamedTuple):
    """The places of one job."""

    checkpoints: Path
    output: Path
    """Of the final model. Made by the trainer when the model is whole; its parent exists."""
    log: Path
    cache: Path


class CheckpointFacts(TypedDict):
    """A checkpoint on disk, in the platform's field names (`agent.core.ports.CheckpointView`)."""

    path: str
    epoch: float
    step: int
    eval_loss: float | None
    train_loss: float | None
    size_bytes: int
    created_at: str
    is_best: bool
    is_latest: bool
    is_pinned: bool


def resolve_under(folder: Path, given: str, what: str = "path") -> Path:
    """Return the existing file or folder that ``given`` names within ``folder``, links followed.

    ``given`` is relative to ``folder``, or absolute and inside it. Raises OutsideFolder, NotThere.
    """
    if not given or "\0" in given:
        raise OutsideFolder(f"{given!r} is no {what}. Name a file or folder inside {folder}.")
    root = folder.resolve()
    try:
        path = (root / given).resolve()
        inside = path.is_relative_to(root)
        there = inside and path.exists()
    except (OSError, RuntimeError) as exc:
        # A name too long, a link that leads to itself.
        raise NotThere(f'The {what} "{_short(given)}" cannot be followed: {exc}.') from exc
    if not inside:
        raise OutsideFolder(
            f'The {what} "{_short(given)}" leads out of {folder}, and a job may use nothing outside it. '
            "Put it into that folder (a link to elsewhere is not followed), and name it from there."
        )
    if not there:
        raise NotThere(f'There is no {what} "{_short(given)}" in {folder}.')
    return path


def looks_like_hub_name(name: str) -> bool:
    """Tell whether ``name`` can be a Hugging Face name: "org/name" or "name", and no file's."""
    return (
        len(name) <= 96
        and _HUB_NAME.fullmatch(name) is not None
        and "--" not in name
        and ".." not in name
        and not name.endswith(".git")
        and _FILE_ENDING.search(name) is None
    )


def data_source(given: str, datasets_dir: Path, *, hub: bool) -> str:
    """Return the path of the job's data set, or its Hub name. Raises WorkspaceError."""
    return _source(given, datasets_dir, "data set", "DATASETS_DIR", FailureReason.DATA, hub=hub)


def model_source(given: str, models_dir: Path, *, hub: bool) -> str:
    """Return the path of the base model's or tokenizer's folder, or its Hub name. Raises WorkspaceError."""
    return _source(given, models_dir, "model", "MODELS_DIR", FailureReason.MODEL, hub=hub)


def prepare(
    job_id: str, *, models_dir: Path, checkpoints_dir: Path, logs_dir: Path, cache_dir: Path
) -> Folders:
    """Make the job's folders, for the owner alone. Raises FolderTaken, OSError."""
    try:
        msgspec.convert(job_id, JobId)
    except msgspec.ValidationError as exc:
        raise WorkspaceError(f"{job_id!r} is no job id: {exc}.", FailureReason.SPEC) from exc
    folders = Folders(checkpoints_dir / job_id, models_dir / job_id, logs_dir / f"{job_id}.log", cache_dir)
    marker = folders.checkpoints / MARKER
    if not marker.exists():
        # The trainer replaces what lies at the output, so what somebody else put there must be left alone.
        for folder in (folders.output, folders.checkpoints):
            if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
                raise FolderTaken(
                    f"{folder} was there before job {job_id} and is not the agent's, so nothing is written to it. "
                    "Submit the job under another id, or move that folder away."
                )
    elif marker.read_text(encoding="utf-8") != job_id:
        # On a disk that does not tell Job from job.
        raise FolderTaken(
            f"{folders.checkpoints} belongs to another job ({marker.read_text(encoding='utf-8')!r}). "
            "Submit this one under another id."
        )
    for folder in (folders.checkpoints, models_dir, logs_dir, cache_dir):
        _make(folder)
    marker.write_text(job_id, encoding="utf-8")
    return folders


def checkpoints_of(folder: Path) -> list[CheckpointFacts]:
    """Return the checkpoints in a job's checkpoints folder, the newest first.

    They are listed by their manifests, not verified: the trainer does that before it uses one.
    """
    found = sorted(_manifests(folder), key=lambda one: (one[1].attempt, one[1].step), reverse=True)
    kept = pinned(folder)
    # What the trainer held for the best, by the job's own metric, when it saved the newest.
    told = folder / f"step-{found[0][1].best_step}" if found else None
    # Else, of equal losses the earliest, which comes last here.
    losses = [(m.eval_loss, path) for path, m, _ in reversed(found) if m.eval_loss is not None]
    finite = [one for one in losses if math.isfinite(one[0])]
    best = min(finite, key=lambda one: one[0])[1] if finite else None
    if told in [path for path, _, _ in found]:
        best = told
    return [
        CheckpointFacts(
            path=str(path),
            epoch=manifest.epoch,
            step=manifest.step,
            eval_loss=manifest.eval_loss,
            train_loss=manifest.train_loss,
            size_bytes=size,
            created_at=datetime.fromtimestamp(manifest.time, UTC).isoformat(timespec="seconds"),
            is_best=path == best,
            is_latest=position == 0,
            is_pinned=path.name in kept,
        )
        for position, (path, manifest, size) in enumerate(found)
    ]


def pin(folder: Path, name: str) -> None:
    """Keep the checkpoint ``name`` of a job's folder until it is unpinned. Raises NotThere."""
    marker = _pin_of(folder, name)
    marker.touch(mode=0o600)
    if not (folder / name).is_dir():
        # It may have gone while the marker was made.
        marker.unlink(missing_ok=True)
        raise NotThere(f"There is no checkpoint {name} in {folder}; it may have been deleted meanwhile.")


def unpin(folder: Path, name: str) -> None:
    """Let the checkpoint ``name`` be deleted when its time comes. Harmless when it is not pinned."""
    _pin_of(folder, name).unlink(missing_ok=True)


def pinned(folder: Path) -> set[str]:
    """Return the names of the checkpoints that are pinned."""
    return {
        name
        for marker in folder.glob(f"{PINNED}*")
        if (folder / (name := marker.name.removeprefix(PINNED))).is_dir()
    }


def _pin_of(folder: Path, name: str) -> Path:
    if not _CHECKPOINT.fullmatch(name):
        raise NotThere(f'{name!r} is no checkpoint\'s name; they are called like "step-100".')
    if not (folder / name).is_dir():
        raise NotThere(f"There is no checkpoint {name} in {folder}.")
    return folder / f"{PINNED}{name}"


def free_bytes(path: Path) -> int:
    """Return the free space where ``path`` is, or would be."""
    return shutil.disk_usage(
        next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    ).free


class _File(msgspec.Struct, frozen=True):
    size: int = 0


class _Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of a checkpoint's manifest; `agent.trainer.checkpoint` writes it, of whatever version."""

    step: int
    epoch: float = 0.0
    attempt: int = 0
    time: float
    eval_loss: float | None = None
    train_loss: float | None = None
    best_step: int = 0
    files: dict[str, _File] = {}


def _manifests(folder: Path) -> Iterator[tuple[Path, _Manifest, int]]:
    for path in folder.glob("step-*"):
        if not path.name.removeprefix("step-").isdigit():
            continue
        try:
            manifest = path / "manifest.json"
            # What an old or foreign manifest does not tell is known from the folder.
            known = {"step": int(path.name.removeprefix("step-")), "time": manifest.stat().st_mtime}
            told = msgspec.json.decode(manifest.read_bytes(), type=dict[str, object])
            facts = msgspec.convert(known | told, _Manifest)
            yield path, facts, sum(file.size for file in facts.files.values()) or _size(path)
        except (OSError, *UNREADABLE):
            # Not finished, just deleted, or damaged: no checkpoint.
            continue


def _source(given: str, folder: Path, what: str, setting: str, reason: FailureReason, *, hub: bool) -> str:
    if not given:
        raise NotThere(f"The job names no {what}.", reason)
    hub_name = looks_like_hub_name(given)
    try:
        return str(resolve_under(folder, given, what))
    except NotThere as exc:
        if hub_name and hub:
            return given
        where = f" {setting} is where the agent looks: put it there."
        if hub_name:
            where += " It may also be a name on the Hugging Face Hub, but ALLOW_HUB is off."
        raise NotThere(f"{exc}{where}", reason) from exc


def _make(folder: Path) -> None:
    """Make the folder and those above it that are missing, each for the owner alone."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        one.mkdir(mode=0o700, exist_ok=True)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
