"""Checkpoints that are whole or absent: staged beside, hashed, renamed; verified before they are trusted.

A folder named ``step-N`` with a manifest that verifies is a checkpoint; everything else is not. A kill at any
moment leaves the older ones untouched, and what was finished but not yet renamed is taken over at the next start.
"""

import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from agent.trainer.disk import DOOMED, PROBE, replace_folder, sync_folder, write_small
from agent.trainer.reading import LOCKED, alone
from protocol.codec import UNREADABLE

FORMAT = 2
"""1: torch.save's files for optimizer, scheduler and random state. 2: safetensors and JSON."""
MANIFEST = LOCKED
ORIGIN = "resumed-from.json"
"""Beside the checkpoints: which one an attempt was told to go on from. Later ones of older attempts are history."""
STAGING = ".staging-"
PINNED = ".pinned-"
"""Before the name of a checkpoint: the file that says it must stay (`agent.runtime.workspace` makes and removes it)."""
ASIDE = "kept-"
"""Before the name of one that must stay though its step came again: never listed, and never deleted."""
JOB_MARKER = ".training-agent-job"
"""The agent's own file in the folder; without it the folder would count as somebody else's."""
_PREFIX = "step-"
_CHUNK = 1 << 22
_UNKNOWN = 1 << 30
"""The attempt of one whose manifest does not say: looked at first, so that the user is told why it was passed over."""


class FileRecord(msgspec.Struct, frozen=True):
    """What a file must be to be the one that was saved."""

    size: int
    xxh3_128: str


class Ancestor(msgspec.Struct, frozen=True):
    """A checkpoint of another job that a run began with."""

    job_id: str
    name: str
    step: int
    check: str
    """Of its manifest."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint is, and of what it must consist."""

    format: int = FORMAT
    job_id: str
    step: int
    epoch: float
    attempt: int
    reason: str
    time: float
    train_loss: float | None = None
    eval_loss: float | None = None
    best_step: int = 0
    """Of the best evaluation so far, by the job's metric; 0: none yet."""
    versions: dict[str, str] = {}
    inputs: dict[str, str] = {}
    """Fingerprints of what must be the same to go on exactly: data, model, method."""
    lineage: list[Ancestor] = []
    """The checkpoints of other jobs that the run descends from, the oldest first."""
    begun: list[tuple[int, int]] = []
    """The attempts that led here, each with the step that it began after; without those that came to nothing."""
    files: dict[str, FileRecord] = {}
    check: str = ""
    """xxh3-128 of this manifest with an empty ``check``."""


class Origin(msgspec.Struct, frozen=True):
    attempt: int
    name: str


class BadCheckpoint(Exception):
    """A checkpoint that must not be used; ``str()`` is a clause that says why."""


class NotOurs(BadCheckpoint):
    """It must not be deleted either: another job's, or one that another agent or another hour may well read."""

    def __init__(self, why: str, *, newer: bool = False, attempt: object = None) -> None:
        super().__init__(why)
        self.newer = newer
        """A newer version of the agent reads it."""
        self.attempt = attempt if isinstance(attempt, int) else _UNKNOWN


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk whose manifest verifies."""

    path: Path
    manifest: Manifest
    size: int


class Checkpoints:
    """The folder of one job's checkpoints. One process writes to it at a time.

    With ``job_id``, those of another job are passed over.
    """

    def __init__(self, folder: Path, job_id: str = "") -> None:
        self.folder = folder
        self.job_id = job_id
        self.in_use: set[Path] = set()
        """Never deleted."""
        marker = folder / JOB_MARKER
        self._marker = marker.read_bytes() if marker.is_file() else None

    def __repr__(self) -> str:
        return f"Checkpoints({str(self.folder)!r}, steps={[_step(path) for path in self._candidates()]})"

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint at ``step``, there or not."""
        return self.folder / f"{_PREFIX}{step}"

    def save(self, manifest: Manifest, fill: Callable[[Path], Mapping[str, FileRecord] | None]) -> Found:
        """Write a checkpoint: ``fill`` puts its files into a folder, and only then does it appear under its name.

        What ``fill`` returns is known of files that it has hashed and synced itself. On any error what was there
        before is untouched.
        """
        final = self.path(manifest.step)
        staging = self.folder / f"{STAGING}{final.name}"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir(parents=True)
            files = dict(fill(staging) or {})
            for name in _names(staging):
                if name not in files:
                    files[name] = _record(staging / name)
                    sync_folder(staging / name)
            sealed = seal(msgspec.structs.replace(manifest, files=files))
            write_small(staging / MANIFEST, msgspec.json.format(msgspec.json.encode(sealed)))
            for path in [*staging.rglob("*"), staging]:
                if path.is_dir():
                    sync_folder(path)
            self._put_aside(final)
            replace_folder(staging, final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return Found(final, sealed, sum(record.size for record in files.values()))

    def _put_aside(self, path: Path) -> None:
        """Give a checkpoint that must stay another name, where a run that went back comes to its step again."""
        pin = self.folder / f"{PINNED}{path.name}"
        if not path.exists():
            return
        with alone(path) as unread:
            if unread and not pin.exists() and self._refusal(path) is None:
                return
        self._rename_aside(path, path.name)
        pin.unlink(missing_ok=True)

    def _rename_aside(self, path: Path, name: str) -> None:
        attempt = _attempt(path)
        name = f"{ASIDE}{name}" + (f"-attempt-{attempt}" if attempt < _UNKNOWN else "")
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        path.rename(next(aside for one in names if not (aside := self.folder / one).exists()))

    def _refusal(self, path: Path) -> NotOurs | None:
        """Return why a checkpoint is not this job's and this agent's to delete; None: it is."""
        try:
            _manifest(path, self.job_id)
        except NotOurs as why:
            return why
        except BadCheckpoint:
            pass
        return None

    def restore(self) -> bool:
        """Make the folder again if it has vanished; return whether it had."""
        if self.folder.is_dir():
            return False
        self.folder.mkdir(parents=True, mode=0o700)
        if self._marker is not None:
            write_small(self.folder / JOB_MARKER, self._marker)
        return True

    def newest_good(self) -> tuple[Found | None, list[str]]:
        """Return the checkpoint to go on from, and a sentence for each newer one that was passed over."""
        passed: list[str] = []
        for path in self._by_age():
            try:
                return verify(path, self.job_id), passed
            except BadCheckpoint as bad:
                passed.append(f"Checkpoint {path.name} was passed over: {bad}.")
        return None, passed

    def note_origin(self, attempt: int, chosen: Path) -> None:
        """Remember that ``attempt`` goes on from ``chosen``, so that a later start does not pick what came after it."""
        if chosen.parent == self.folder:
            write_small(self.folder / ORIGIN, msgspec.json.encode(Origin(attempt, chosen.name)))

    def of_newer_agents(self) -> list[tuple[Path, NotOurs]]:
        """Return those of this job that only a newer version of the agent can read, the oldest first."""
        refused = [(path, self._refusal(path)) for path in reversed(self._by_age())]
        return [(path, why) for path, why in refused if why is not None and why.newer]

    def retain(self, limit: int) -> None:
        """Delete the oldest beyond ``limit``; those in use, pinned, being read or not ours stay.

        Broken ones are older than all, so that none takes the place of a good one.
        """
        for path in self._ours()[limit:]:
            self._delete(path)

    def make_room(self, enough: Callable[[], bool], most: int | None = None) -> int:
        """Delete the oldest, one by one, until there is ``enough`` room or ``most`` are gone; return how many are.

        The newest good one stays, and so do those in use, pinned, being read or not ours.
        """
        gone = 0
        if enough():
            return 0
        newest, _ = self.newest_good()
        for path in reversed(self._ours()):
            if newest is not None and path != newest.path and self._delete(path):
                gone += 1
                if enough() or gone == most:
                    break
        return gone

    def _ours(self) -> list[Path]:
        """Return the candidates that may be deleted, the one to prefer first; last those with a broken manifest."""
        ours = [path for path in self._by_age() if self._refusal(path) is None]
        return sorted(ours, key=lambda path: _attempt(path) == _UNKNOWN)

    def _delete(self, path: Path) -> bool:
        """Delete a checkpoint unless it must stay; return whether it is gone."""
        if path in self.in_use or (self.folder / f"{PINNED}{path.name}").exists():
            return False
        with alone(path) as unread:
            if not unread:
                return False
            grave = self.folder / f"{DOOMED}{path.name}"
            shutil.rmtree(grave, ignore_errors=True)
            # Renamed first: a kill in the middle of a deletion must not leave half a checkpoint under its name.
            path.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)
        return True

    def sweep(self) -> None:
        """Clear up after a killed process: what it had finished is taken over, the rest is deleted."""
        for probe in self.folder.glob(f"{PROBE}*"):
            probe.unlink(missing_ok=True)
        for prefix in (STAGING, DOOMED):
            for path in sorted(self.folder.glob(f"{prefix}{_PREFIX}*")):
                final = self.folder / path.name.removeprefix(prefix)
                try:
                    verify(path, self.job_id)
                    whole = True
                except NotOurs:
                    # Whoever wrote it knows whether it is whole.
                    self._rename_aside(path, final.name)
                    continue
                except BadCheckpoint:
                    whole = False
                # A replaced checkpoint is renamed away before the new one takes its place.
                if whole and not final.exists():
                    path.rename(final)
                else:
                    shutil.rmtree(path, ignore_errors=True)

    def _candidates(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.glob(f"{_PREFIX}*") if _step(path) is not None]

    def _by_age(self) -> list[Path]:
        """Return the candidates, the one to prefer first: by attempt, then by step."""
        origin = self._origin()

        def age(path: Path) -> tuple[int, int]:
            attempt = _attempt(path)
            if origin is not None and path.name == origin.name and attempt < origin.attempt:
                attempt = origin.attempt  # where that attempt began, before anything it saved itself
            return (attempt, _step(path) or 0)

        return sorted(self._candidates(), key=age, reverse=True)

    def _origin(self) -> Origin | None:
        try:
            return msgspec.json.decode((self.folder / ORIGIN).read_bytes(), type=Origin)
        except (FileNotFoundError, *UNREADABLE):
            return None


def verify(path: Path, job_id: str = "") -> Found:
    """Return the checkpoint in ``path`` if each of its files is the one that was saved, else raise BadCheckpoint.

    With ``job_id``, it must be that job's.
    """
    manifest = _manifest(path, job_id)
    for name, record in manifest.files.items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != record.size:
                raise BadCheckpoint(f"its file {name} has {size} bytes where {record.size} were saved")
            digest = _record(file).xxh3_128
        except FileNotFoundError:
            raise BadCheckpoint(f"its file {name} is missing") from None
        except OSError as error:
            raise BadCheckpoint(f"its file {name} cannot be read ({error.strerror or error})") from error
        if digest != record.xxh3_128:
            raise BadCheckpoint(f"the contents of its file {name} are not what was saved")
    return Found(path, manifest, sum(record.size for record in manifest.files.values()))


def seal(manifest: Manifest) -> Manifest:
    """Return the manifest with the checksum of itself."""
    bare = msgspec.structs.replace(manifest, check="")
    return msgspec.structs.replace(bare, check=_checksum(msgspec.to_builtins(bare)))


def _checksum(told: dict[str, Any]) -> str:
    # Of what is written, not of what is understood: a field that this version does not know counts too.
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(told | {"check": ""}))


def make_manifest(job_id: str, step: int, epoch: float, attempt: int, reason: str) -> Manifest:
    """Return a manifest of now; the rest is filled in with `msgspec.structs.replace`."""
    return Manifest(job_id=job_id, step=step, epoch=epoch, attempt=attempt, reason=reason, time=time.time())


def _manifest(path: Path, job_id: str = "") -> Manifest:
    try:
        told = msgspec.json.decode((path / MANIFEST).read_bytes(), type=dict[str, Any])
        number, whose = told.get("format"), told.get("job_id")
        if isinstance(number, int) and number > FORMAT and not _was_ours(told):
            if job_id and isinstance(whose, str) and whose != job_id:
                raise NotOurs(f"it is a checkpoint of another job ({whose})", attempt=told.get("attempt"))
            raise NotOurs(
                f"it was written by a newer version of the agent (format {number}; this one reads up to {FORMAT})",
                newer=True,
                attempt=told.get("attempt"),
            )
        manifest = msgspec.convert(told, Manifest)
    except FileNotFoundError:
        raise BadCheckpoint("it has no manifest, so its save was never finished") from None
    except OSError as error:
        raise NotOurs(f"its manifest cannot be read ({error})") from error
    except UNREADABLE as error:
        raise BadCheckpoint(f"its manifest cannot be read ({error})") from error
    if _checksum(told) != manifest.check:
        raise BadCheckpoint("its manifest is not what was saved")
    if job_id and manifest.job_id != job_id:
        raise NotOurs(f"it is a checkpoint of another job ({manifest.job_id})")
    return manifest


def _was_ours(told: dict[str, Any]) -> bool:
    """Tell whether the format alone is not what was written: no newer version of the agent would cure that."""
    return any(_checksum(told | {"format": number}) == told.get("check") for number in range(1, FORMAT + 1))


def _attempt(path: Path) -> int:
    try:
        return _manifest(path).attempt
    except NotOurs as why:
        return why.attempt
    except BadCheckpoint:
        return _UNKNOWN


def _step(path: Path) -> int | None:
    number = path.name.removeprefix(_PREFIX)
    return int(number) if number.isdecimal() else None


def _names(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield path.relative_to(folder).as_posix()


def _record(path: Path) -> FileRecord:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        return FileRecord(file.tell(), digest.hexdigest())
