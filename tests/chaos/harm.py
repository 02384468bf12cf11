"""What is done to a run, and when."""

import contextlib
import errno
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from protocol.worker import AnyEvent, Metrics, Trained
from tests.chaos.attempt import Attempt
from tests.chaos.jobs import SAVE_EVERY, STEPS, Ours, Stock

Side = Ours | Stock
Damage = Callable[[random.Random, Path, str], str]
"""Harms what lies in the folder of checkpoints, whose names begin with the third argument; returns what it was."""
LOADING, ENDING = 0.08, 0.95
"""Shares of a run's life: up to the first is loading, from the second on the end."""


@dataclass(frozen=True)
class Kind:
    """One way in which a run is harmed."""

    name: str
    share: int
    """Of twenty."""
    in_save: bool = False
    background: bool = True
    """Whether our periodic saves are written while training goes on."""
    act: str = "kill"
    """kill, stop (and go on after a while) or fill (the disk)."""
    damage: Damage | None = None


@dataclass(frozen=True)
class Paces:
    """How long the parts of an untouched run take on this machine now, and to what it comes."""

    weights: str
    load: float
    step: float
    save: float
    end: float


@dataclass
class Plan:
    """The moment, chosen before; `due` says when it has come."""

    kind: Kind
    rng: random.Random
    paces: Paces
    at: float
    """Share of the run's life."""
    save: int
    """The save that is meant, counted from 1."""
    within: float
    """Share of a step, or of a save."""
    done: bool = False
    damaged: str = ""
    """What was damaged after the kill."""
    _saves: int = 0
    _was_saving: bool = False
    _after: float | None = field(default=None)
    """When it is to happen, once that is known."""

    @classmethod
    def make(cls, kind: Kind, rng: random.Random, paces: Paces) -> "Plan":
        # What is damaged after a kill must be there, and the disk must not be full before the first save.
        early = 0.0 if kind.damage is None and kind.act == "kill" else 0.4
        late = 1.0 if kind.damage is None and kind.act == "kill" else 0.9
        return cls(kind, rng, paces, rng.uniform(early, late), rng.randint(1, STEPS // 4), rng.random())

    @property
    def patience(self) -> float:
        """Seconds between two looks: short where a save of milliseconds is to be met."""
        return 0.001 if self.kind.in_save or self._after is not None else 0.02

    def heard(self, event: AnyEvent, now: float) -> None:
        """Take note of how far the run is."""
        if self.kind.in_save or self._after is not None:
            return
        if self.at >= ENDING:
            if isinstance(event, Trained):
                self._after = now + (self.at - ENDING) / (1 - ENDING) * self.paces.end
        elif self.at >= LOADING and isinstance(event, Metrics) and event.step >= self.step:
            self._after = now + self.within * self.paces.step

    @property
    def step(self) -> int:
        return int((self.at - LOADING) / (ENDING - LOADING) * STEPS)

    def due(self, attempt: Attempt, saving: Callable[[], bool]) -> bool:
        """Tell whether the moment has come."""
        now = time.monotonic()
        if self._after is None and self.kind.in_save:
            is_saving = saving()
            if is_saving and not self._was_saving:
                self._saves += 1
                if self._saves >= self.save:
                    self._after = now + self.within * self.paces.save
            self._was_saving = is_saving
        elif self._after is None and self.at < LOADING:
            self._after = attempt.began + self.at / LOADING * self.paces.load
        if self._after is None or now < self._after:
            return False
        # What is to be damaged is a whole checkpoint: a torn one is what the kills in a save are about.
        return self.kind.damage is None or not saving()

    def strike(self, attempt: Attempt, checkpoints: Path) -> None:
        """Do it."""
        self.done = True
        match self.kind.act:
            case "kill":
                attempt.signal(signal.SIGKILL)
            case "stop":
                attempt.signal(signal.SIGSTOP)
                time.sleep(self.rng.uniform(0.2, 1.0))
                attempt.signal(signal.SIGCONT)
            case _:
                fill(checkpoints, self.rng)


def newest(checkpoints: Path, prefix: str) -> Path | None:
    """Return the newest checkpoint by its number."""
    found = [path for path in checkpoints.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdecimal()]
    return max(found, key=lambda path: int(path.name.removeprefix(prefix)), default=None)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def _a_file(rng: random.Random, checkpoints: Path, prefix: str, *, by_size: bool = False) -> Path:
    folder = newest(checkpoints, prefix)
    assert folder is not None, f"no checkpoint in {checkpoints}"
    files = _files(folder)
    return rng.choices(files, [file.stat().st_size for file in files] if by_size else None)[0]


def flip(rng: random.Random, checkpoints: Path, prefix: str) -> str:
    """Change one byte, each with the same chance."""
    file = _a_file(rng, checkpoints, prefix, by_size=True)
    raw = bytearray(file.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)
    return file.name


def truncate(rng: random.Random, checkpoints: Path, prefix: str) -> str:
    """Cut the end off a file."""
    file = _a_file(rng, checkpoints, prefix)
    raw = file.read_bytes()
    file.write_bytes(raw[: rng.randrange(len(raw))])
    return file.name


def delete(rng: random.Random, checkpoints: Path, prefix: str) -> str:
    """Remove a file."""
    file = _a_file(rng, checkpoints, prefix)
    file.unlink()
    return file.name


def delete_manifest(rng: random.Random, checkpoints: Path, prefix: str) -> str:
    """Remove the file that says what the checkpoint is; stock's is the trainer's state."""
    folder = newest(checkpoints, prefix)
    assert folder is not None
    name = "manifest.json" if (folder / "manifest.json").exists() else "trainer_state.json"
    (folder / name).unlink(missing_ok=True)
    return name


def leave_half(rng: random.Random, checkpoints: Path, prefix: str) -> str:
    """Leave what a kill in a save leaves: some files of a newer checkpoint, where the side writes them."""
    whole = newest(checkpoints, prefix)
    assert whole is not None
    name = f"{prefix}{int(whole.name.removeprefix(prefix)) + SAVE_EVERY}"
    half = checkpoints / (name if prefix == Stock.prefix else f".staging-{name}")
    half.mkdir(exist_ok=True)
    files = _files(whole)
    for file in files[: rng.randint(1, len(files) - 1)]:
        shutil.copy(file, half / file.name)
    return half.name


def _size_of_the_last(checkpoints: Path) -> int:
    """Return the bytes of what was written last. The run goes on meanwhile, and may be deleting what is looked at."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            last = max(checkpoints.iterdir(), key=lambda path: path.stat().st_mtime)
            return sum(file.stat().st_size for file in _files(last)) if last.is_dir() else 0


def fill(checkpoints: Path, rng: random.Random) -> None:
    """Fill the disk, but for less than a checkpoint."""
    size = _size_of_the_last(checkpoints)
    with (checkpoints.parent / BALLAST).open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        file.truncate(max(0, file.tell() - rng.randrange(size * 9 // 10 + 1)))


BALLAST = "ballast"

KINDS = (
    Kind("SIGKILL at any moment", 5),
    Kind("SIGKILL during a save", 3, in_save=True, background=False),
    Kind("SIGKILL during a save in the background", 4, in_save=True),
    Kind("a byte of the newest checkpoint flipped", 1, damage=flip),
    Kind("a file of it cut short", 1, damage=truncate),
    Kind("a file of it deleted", 1, damage=delete),
    Kind("its manifest deleted", 1, damage=delete_manifest),
    Kind("half a checkpoint left lying", 1, damage=leave_half),
    Kind("the disk full, then room again", 2, act="fill"),
    Kind("SIGSTOP, later SIGCONT", 1, act="stop"),
)
