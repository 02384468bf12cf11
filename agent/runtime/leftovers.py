"""Takes in what a trainer left on disk because no agent committed it."""

from pathlib import Path

import msgspec

from protocol.codec import UNREADABLE
from protocol.worker import LEFTOVERS, Numbered, event_decoder

MAX_SIZE = 1 << 28
"""Bytes of a file that is read; a larger one is no trainer's of ours."""


class BadLeftovers(Exception):
    """The file cannot be read; it stays where it is, under another name, for the curious."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(path, why)
        self.path = path
        self.why = why

    def __str__(self) -> str:
        return f"Points that a trainer left in {self.path} could not be taken in: {self.why}."


def read_leftovers(folder: Path) -> list[tuple[Numbered, bytes]]:
    """Return the events of ``folder``'s leftovers with their encodings, in order; [] where there are none.

    The file stays until `forget_leftovers`, called once they are committed: to take them in twice is
    harmless, since (attempt, number) names each. Raises BadLeftovers.
    """
    path = folder / LEFTOVERS
    try:
        size = path.lstat().st_size
        if size > MAX_SIZE:
            raise _put_aside(path, f"it has {size} bytes, and at most {MAX_SIZE} are read")
        raw = _items.decode(path.read_bytes())
        return [(event_decoder.decode(item), bytes(item)) for item in raw]
    except FileNotFoundError:
        return []
    except UNREADABLE as error:
        raise _put_aside(path, str(error)) from error


def forget_leftovers(folder: Path) -> None:
    """Remove the file: everything in it is committed."""
    (folder / LEFTOVERS).unlink(missing_ok=True)


_items: msgspec.msgpack.Decoder[list[msgspec.Raw]] = msgspec.msgpack.Decoder(list[msgspec.Raw])


def _put_aside(path: Path, why: str) -> BadLeftovers:
    path.replace(path.with_name(path.name + ".bad"))
    return BadLeftovers(path, why)
