"""Steps that went wrong and are left out when training goes back before them.

They lie in a file beside the checkpoints: the process that found them ends, and the next attempt, which starts
from the last good checkpoint, passes over their rows.
"""

import contextlib
import os
from pathlib import Path

import msgspec

FILE = "skipped-rows.json"


class Skip(msgspec.Struct, frozen=True, kw_only=True):
    """Rows that are not trained on: places ``first`` up to ``end`` of the epoch's order."""

    step: int
    epoch: int
    first: int
    end: int
    why: str
    order: int = 0
    """`Place.order`: in another order other rows stand at these places."""
    rows: list[int] = []
    """Their numbers in the data set, where it has any."""


class Skips:
    """What is left out of one job."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.entries: list[Skip] = []
        with contextlib.suppress(FileNotFoundError):
            self.entries = msgspec.json.decode(self._path.read_bytes(), type=list[Skip])

    def places(self, epoch: int, order: int = 0) -> frozenset[int]:
        """Return the places of an epoch's order that are passed over."""
        mine = [skip for skip in self.entries if (skip.epoch, skip.order) == (epoch, order)]
        return frozenset(at for skip in mine for at in range(skip.first, skip.end))

    def add(self, skip: Skip) -> None:
        """Remember it, also over a power cut."""
        self.entries.append(skip)
        partial = self._path.with_name(f"{FILE}.partial")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(msgspec.json.encode(self.entries))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._path)
