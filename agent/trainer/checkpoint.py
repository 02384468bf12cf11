"""Checkpoints that are whole or absent: staged beside, hashed, renamed; verified before they are trusted.

A folder named ``step-N`` with a manifest that verifies is a checkpoint; everything else is not. A kill at any
moment leaves the older ones untouched, and what was finished but not yet renamed is taken over at the next start.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from agent.trainer.errors import TrainerError
from protocol.failures import FailureReason

MANIFEST = "manifest.json"
ORIGIN = "resumed-from.json"
"""Beside the checkpoints: which one an attempt was told to go on from. Later ones of older attempts are history."""
STAGING, DOOMED = ".staging-", ".doomed-"
_PREFIX = "step-"
_CHUNK = 1 << 22


class FileRecord(msgspec.Struct, frozen=True):
    """What a file must be to be the one that was saved."""

    size: int
    xxh3_128: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint is, and of what it must consist."""

    format: int = 1
    job_id: str
    step: int
    epoch: float
    attempt: int
    reason: str
    time: float
    train_loss: float | None = None
    eval_loss: float | None = None
    versions: dict[str, str] = {}
    inputs: dict[str, str] = {}
    """Fingerprints of what must be the same to go on exactly: data, model, method."""
    files: dict[str, FileRecord] = {}
    check: str = ""
    """xxh3-128 of this manifest with an empty ``check``."""


class Origin(msgspec.Struct, frozen=True):
    attempt: int
    name: str


class BadCheckpoint(Exception):
    """A checkpoint that must not be used; ``str()`` is a clause that says why."""


@dataclass(frozen=True)
class Found:
    """A checkpoint on disk whose manifest verifies."""

    path: Path
    manifest: Manifest
    size: int


class Checkpoints:
    """The folder of one job's checkpoints. One process writes to it at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.in_use: set[Path] = set()
        """Never deleted by `retain`."""

    def __repr__(self) -> str:
        return f"Checkpoints({str(self.folder)!r}, steps={[_step(path) for path in self._candidates()]})"

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint at ``step``, there or not."""
        return self.folder / f"{_PREFIX}{step}"

    def save(self, manifest: Manifest, fill: Callable[[Path], None]) -> Found:
        """Write a checkpoint: ``fill`` puts its files into a folder, and only then does it appear under its name.

        Raises TrainerError(DISK_FULL) when there is no room; what was there before is untouched.
        """
        final = self.path(manifest.step)
        staging = self.folder / f"{STAGING}{final.name}"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir(parents=True)
            fill(staging)
            files = {name: _record(staging / name) for name in _names(staging)}
            sealed = seal(msgspec.structs.replace(manifest, files=files))
            _write(staging / MANIFEST, msgspec.json.format(msgspec.json.encode(sealed)))
            _sync_tree(staging)
        except BaseException as error:
            full = is_disk_full(error, self.folder)
            shutil.rmtree(staging, ignore_errors=True)
            if full:
                raise disk_full(self.folder, f"the checkpoint at step {manifest.step}") from error
            raise
        replace_folder(staging, final)
        return Found(final, sealed, sum(record.size for record in files.values()))

    def newest_good(self) -> tuple[Found | None, list[str]]:
        """Return the checkpoint to go on from, and a sentence for each newer one that was passed over."""
        passed: list[str] = []
        for path in self._by_age():
            try:
                return verify(path), passed
            except BadCheckpoint as bad:
                passed.append(f"Checkpoint {path.name} was passed over: {bad}.")
        return None, passed

    def note_origin(self, attempt: int, chosen: Path) -> None:
        """Remember that ``attempt`` goes on from ``chosen``, so that a later start does not pick what came after it."""
        if chosen.parent == self.folder:
            _write(self.folder / ORIGIN, msgspec.json.encode(Origin(attempt, chosen.name)))

    def retain(self, limit: int) -> None:
        """Delete the oldest beyond ``limit``; those in use stay."""
        doomed = [path for path in self._by_age()[limit:] if path not in self.in_use]
        for path in doomed:
            grave = self.folder / f"{DOOMED}{path.name}"
            shutil.rmtree(grave, ignore_errors=True)
            # Renamed first: a kill in the middle of a deletion must not leave half a checkpoint under its name.
            path.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)

    def sweep(self) -> None:
        """Clear up after a killed process: what it had finished is taken over, the rest is deleted."""
        for prefix in (STAGING, DOOMED):
            for path in sorted(self.folder.glob(f"{prefix}{_PREFIX}*")):
                final = self.folder / path.name.removeprefix(prefix)
                try:
                    verify(path)
                    whole = True
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
        except (FileNotFoundError, msgspec.DecodeError):
            return None


def verify(path: Path) -> Found:
    """Return the checkpoint in ``path`` if each of its files is the one that was saved, else raise BadCheckpoint."""
    manifest = _manifest(path)
    for name, record in manifest.files.items():
        file = path / name
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise BadCheckpoint(f"its file {name} is missing") from None
        if size != record.size:
            raise BadCheckpoint(f"its file {name} has {size} bytes where {record.size} were saved")
        if _record(file).xxh3_128 != record.xxh3_128:
            raise BadCheckpoint(f"the contents of its file {name} are not what was saved")
    return Found(path, manifest, sum(record.size for record in manifest.files.values()))


def seal(manifest: Manifest) -> Manifest:
    """Return the manifest with the checksum of itself."""
    bare = msgspec.structs.replace(manifest, check="")
    return msgspec.structs.replace(bare, check=xxhash.xxh3_128_hexdigest(msgspec.json.encode(bare)))


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


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_disk_full(error: BaseException | None, folder: Path) -> bool:
    """Tell whether ``error`` comes of a disk with no room; safetensors and torch say so in words only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        text = str(error)
        if "No space left" in text or "os error 28" in text:
            return True
        if "inline_container" in text or "PytorchStreamWriter" in text:
            with_room = folder.exists() and shutil.disk_usage(folder).free > 1 << 20
            return not with_room
        error = error.__cause__ or error.__context__
    return False


def disk_full(folder: Path, what: str) -> TrainerError:
    """Return the error for a write of ``what`` that found no room."""
    free = shutil.disk_usage(folder).free / 1e6
    return TrainerError(
        FailureReason.DISK_FULL,
        f"There was no room to write {what}: {free:.0f} MB are free on the disk of {folder}. "
        "Earlier checkpoints are untouched; free some space, then resume the job.",
    )


def make_manifest(job_id: str, step: int, epoch: float, attempt: int, reason: str) -> Manifest:
    """Return a manifest of now; the rest is filled in with `msgspec.structs.replace`."""
    return Manifest(job_id=job_id, step=step, epoch=epoch, attempt=attempt, reason=reason, time=time.time())


def _manifest(path: Path) -> Manifest:
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise BadCheckpoint("it has no manifest, so its save was never finished") from None
    except (OSError, msgspec.DecodeError) as error:
        raise BadCheckpoint(f"its manifest cannot be read ({error})") from error
    if seal(manifest).check != manifest.check:
        raise BadCheckpoint("its manifest is not what was saved")
    return manifest


def _attempt(path: Path) -> int:
    try:
        return _manifest(path).attempt
    except BadCheckpoint:
        return 1 << 30  # looked at first, so that the user is told why it was passed over


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


def _write(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or as before."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)
