"""A job's log file, read while the trainer writes it: lines for the backend, pages for the local API.

The trainer appends to the file itself (O_APPEND), so nothing here can hold it up.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

MAX_LINE = 8 << 10
"""Characters of one line that are kept."""
MAX_LINES = 1000
"""Lines of one chunk."""
READ_BYTES = 64 << 10
"""What one chunk is made from, at most."""
MAX_LAG = 4 << 20
"""Unread bytes beyond which a tail leaves some out rather than fall further behind."""
QUOTA = 256 << 20
"""Bytes that a job's log file may have."""
_KEPT_TAIL = 64 << 10
_SCAN_BYTES = 1 << 20
# Redaction comes before the cut: a secret that lies across it must be whole.
_KEPT_LINE = MAX_LINE + 4096
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")


class Chunk(NamedTuple):
    """Lines of the log from byte ``offset`` of its file on."""

    offset: int
    lines: list[str]


def as_it_is(text: str) -> str:
    """Redact nothing."""
    return text


class LogTail:
    """Follows a growing log. Whoever owns it calls `read_new` when it is time to look."""

    def __init__(
        self, path: Path, redact: Callable[[str], str] = as_it_is, *, offset: int = 0, quota: int = QUOTA
    ) -> None:
        self.path = path
        self._redact = redact
        self._quota = quota
        self._dropped = 0
        self._lines = _Lines(offset)

    def __repr__(self) -> str:
        return f"<LogTail {self.path.name} at {self.offset}>"

    @property
    def offset(self) -> int:
        """Where the first line begins that was not given out yet: a later tail can go on from here."""
        return self._lines.start

    def read_new(self) -> Chunk | None:
        """Return the next whole lines, or None if there are none yet. Call again at once after a chunk."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return None
        with file:
            size = os.fstat(file.fileno()).st_size
            if size > self._quota:
                size = self._shorten(size)
            if size < self._lines.at:
                # Somebody emptied the file, or this is another one.
                self._lines = _Lines(0)
            lines: list[str] = []
            if size - self._lines.at > MAX_LAG:
                lines.append(self._skip(file, size - MAX_LAG // 4))
            start = self.offset
            file.seek(self._lines.at)
            while data := file.read(READ_BYTES):
                lines += self._texts(data)
                # A piece of a long line, or of a bar, ends none.
                if lines:
                    break
        return Chunk(start, lines) if lines else None

    def finish(self) -> Chunk | None:
        """Return the last line, where the writer left without ending it. Read all others before."""
        line = self._lines
        self._lines = _Lines(line.at)
        text = line.end()
        return Chunk(line.start, [_clean(*text, self._redact)]) if text is not None and text[1] else None

    def _texts(self, data: bytes) -> list[str]:
        texts: list[str] = []
        for kept, length in self._lines.feed(data):
            texts.append(_clean(kept, length, self._redact))
            if len(texts) == MAX_LINES:
                # What was fed beyond is read again.
                self._lines = _Lines(self._lines.start)
                break
        return texts

    def _skip(self, file: BinaryIO, to: int) -> str:
        """Go to the first line that begins after ``to``; return the sentence that stands for what is between."""
        start = self.offset
        file.seek(to)
        head = file.read(READ_BYTES)
        end = to + head.find(b"\n") + 1
        self._lines = _Lines(end)
        return f"[{end - start} bytes left out here; they are in the log file on the agent's machine]"

    def _shorten(self, size: int) -> int:
        """Drop the middle of the file: its first half stays, and its very end. Return the new size.

        The trainer goes on appending meanwhile. What it writes between the last two calls is lost.
        """
        cut = self._quota // 2
        tail_from = size - min(_KEPT_TAIL, self._quota // 4)
        with self.path.open("r+b", buffering=0) as file:
            file.seek(tail_from)
            tail = file.read()
            self._dropped += tail_from - cut
            marker = (
                f"\n[{self._dropped} bytes dropped here: the log has reached its limit of {self._quota}]\n"
            )
            # In its new place before the file is cut: appended after, it could come behind newer lines.
            file.seek(cut)
            file.write(marker.encode() + tail)
            file.seek(tail_from + len(tail))
            late = file.read()
            size = cut + len(marker) + len(tail) + len(late)
            file.seek(size - len(late))
            file.write(late)
            file.truncate(size)
        if self._lines.at > cut:
            already = max(0, self._lines.start - tail_from)
            # What was read of the end is not read again; otherwise the marker is what comes next.
            self._lines = _Lines(cut + len(marker) + already if already else cut + 1)
        return size


def read_lines(
    path: Path, offset: int, limit: int, redact: Callable[[str], str] = as_it_is
) -> tuple[list[str], int]:
    """Return ``limit`` lines from line ``offset`` on, and how many the file has. Reads all of it, in pieces."""
    lines: list[str] = []
    total = 0
    wanted = _Lines(0)
    collecting = False
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return [], 0
    with file:
        ended = True
        for block in iter(lambda: file.read(_SCAN_BYTES), b""):
            ended = block.endswith(b"\n")
            count = block.count(b"\n")
            if not collecting and total + count >= offset and len(lines) < limit:
                collecting = True
                block_start = _after_lines(block, offset - total)
                total, count = offset, count - (offset - total)
                block = block[block_start:]
            if collecting:
                for kept, length in wanted.feed(block, skip_blank=False):
                    lines.append(_clean(kept, length, redact))
                    if len(lines) >= limit:
                        collecting = False
                        break
            total += count
        if not ended:
            total += 1
            last = wanted.end() if collecting and len(lines) < limit else None
            if last is not None:
                lines.append(_clean(*last, redact))
    return lines[:limit], total


def _after_lines(block: bytes, count: int) -> int:
    position = 0
    for _ in range(count):
        position = block.index(b"\n", position) + 1
    return position


class _Lines:
    """Bytes to lines. Of a line that a progress bar redraws (carriage return) only the last state is kept."""

    def __init__(self, at: int) -> None:
        self.start = at
        """Offset of the current line."""
        self.at = at
        """Offset of the next byte."""
        self._kept = bytearray()
        self._length = 0
        self._returned = False
        self._redrawn = False

    def feed(self, data: bytes, *, skip_blank: bool = True) -> Iterator[tuple[bytes, int]]:
        """Yield the kept bytes and the full length of each line that ends in ``data``.

        ``skip_blank`` leaves out lines that a bar has wiped.
        """
        position = 0
        while (newline := data.find(b"\n", position)) >= 0:
            self._add(data[position:newline])
            wiped = self._redrawn and not self._kept.strip()
            line = self.end() or (b"", 0)
            self.at += 1
            self.start = self.at
            position = newline + 1
            if not (wiped and skip_blank):
                yield line
        self._add(data[position:])

    def end(self) -> tuple[bytes, int] | None:
        """End the current line and return it; None if there is nothing of it."""
        line = (bytes(self._kept), self._length) if self.at > self.start else None
        self._kept.clear()
        self._length = 0
        self._returned = self._redrawn = False
        return line

    def _add(self, piece: bytes) -> None:
        if not piece:
            return
        self.at += len(piece)
        # Returns right before the newline, or before more of them, redraw nothing (CR LF).
        text = piece.rstrip(b"\r")
        if text and (self._returned or b"\r" in text):
            self._kept.clear()
            self._length = 0
            self._redrawn = True
            text = text[text.rfind(b"\r") + 1 :]
        self._returned = piece.endswith(b"\r")
        self._kept += text[: _KEPT_LINE - len(self._kept)]
        self._length += len(text)


def _clean(kept: bytes, length: int, redact: Callable[[str], str]) -> str:
    text = redact(_CONTROL.sub("", kept.decode(errors="replace")))
    if len(text) <= MAX_LINE and length <= _KEPT_LINE:
        return text
    shown = text[:MAX_LINE]
    return f"{shown} [... {max(0, length - len(shown.encode()))} more bytes in this line]"
