"""Events on disk: those for which memory has no room, and those that no agent has committed."""

import contextlib
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

_HEAD = struct.Struct("!QI")


class Overflow:
    """A queue of (number, event) in a file, gone when empty. What the disk refuses waits in memory behind it."""

    def __init__(self, folder: Path) -> None:
        self.count = 0
        self._path = folder / f".unsent-{os.getpid()}"
        self._file: BinaryIO | None = None
        self._front = 0
        self._end = 0
        self._tail: deque[tuple[int, bytes]] = deque()

    def __repr__(self) -> str:
        return f"Overflow({self.count} events, {self._end - self._front} bytes, {len(self._tail)} in memory)"

    def append(self, number: int, raw: bytes) -> None:
        """Add an event at the end."""
        self.count += 1
        if self._tail or not self._write(_HEAD.pack(number, len(raw)) + raw):
            self._tail.append((number, raw))

    def take(self, size: int) -> list[tuple[int, bytes]]:
        """Take events off the front, up to about ``size`` bytes."""
        taken: list[tuple[int, bytes]] = []
        total = 0
        for entry in self._entries():
            taken.append(entry)
            total += _HEAD.size + len(entry[1])
            if total >= size:
                break
        self._front += total
        while self._tail and self._front >= self._end and total < size:
            taken.append(self._tail.popleft())
            total += len(taken[-1][1])
        self.count -= len(taken)
        if not self.count:
            self.remove()
        return taken

    def remaining(self) -> Iterator[bytes]:
        """Return what is left, without taking it."""
        yield from (raw for _, raw in self._entries())
        yield from (raw for _, raw in self._tail)

    def remove(self) -> None:
        """Forget everything, file included."""
        if self._file is not None:
            self._file.close()
            self._file = None
            with contextlib.suppress(OSError):  # its folder was cleared by somebody else
                self._path.unlink()
        self._tail.clear()
        self.count = self._front = self._end = 0

    def _write(self, entry: bytes) -> bool:
        """Write at the end of the file; False when the disk has no room for it, and then nothing is changed."""
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("w+b", buffering=0)
            written = os.pwrite(self._file.fileno(), entry, self._end)
        except OSError:
            return False
        if written < len(entry):  # a part fitted: the next one is written over it
            return False
        self._end += written
        return True

    def _entries(self) -> Iterator[tuple[int, bytes]]:
        at = self._front
        while self._file is not None and at < self._end:
            number, size = _HEAD.unpack(os.pread(self._file.fileno(), _HEAD.size, at))
            yield number, os.pread(self._file.fileno(), size, at + _HEAD.size)
            at += _HEAD.size + size


def write_leftovers(path: Path, kept: Iterable[bytes], overflow: Overflow) -> None:
    """Write encoded events to ``path`` as one MessagePack array, after those that are in it already.

    The file is there whole or as it was before, whenever the power goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old_count, old_items = _array(path)
    kept = list(kept)
    count = old_count + len(kept) + overflow.count
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(struct.pack("!BI", 0xDD, count))
        file.write(old_items)
        for raw in kept:
            file.write(raw)
        for raw in overflow.remaining():
            file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _array(path: Path) -> tuple[int, bytes]:
    """Return the length and the encoded items of the MessagePack array in a file; (0, b"") without one."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return 0, b""
    head = data[0] if data else 0
    if head & 0xF0 == 0x90:
        return head & 0x0F, data[1:]
    if head == 0xDC and len(data) >= 3:
        return int.from_bytes(data[1:3], "big"), data[3:]
    if head == 0xDD and len(data) >= 5:
        return int.from_bytes(data[1:5], "big"), data[5:]
    return 0, b""  # empty or not ours: nothing in it could be read by anybody
