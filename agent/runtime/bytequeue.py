"""One-way queue of byte frames between agent and trainer. Standard library only: the child loads it first.

It is `multiprocessing.queues.SimpleQueue` with `put` and `get` narrowed to bytes: the stock one unpickles
what the other side sent, which would run a trainer's code inside the agent. One producer and one consumer
each, so it needs none of the stock one's semaphores, which a killed process would hold for ever.
"""

import contextlib
import fcntl
import select
import struct
from multiprocessing import context
from multiprocessing.connection import Connection, Pipe
from multiprocessing.queues import SimpleQueue
from typing import Any

PIPE_SIZE = 1 << 20
MAX_FRAME = 1 << 24
"""Bytes of a frame that `get` accepts: an order, which is ours. Events have a lower limit of their own."""


class ByteQueue(SimpleQueue[bytes]):
    """A pipe of whole frames. Either end may be closed; a process must hold only the one it uses."""

    _reader: "Connection[Any, Any] | None"
    _writer: "Connection[Any, Any] | None"
    _room: "select.poll | None" = None

    def __init__(self, *, ctx: context.BaseContext) -> None:
        # Not super().__init__(): it would make two locks, which are named semaphores under spawn.
        self._reader, self._writer = Pipe(duplex=False)
        _enlarge(self._writer.fileno())

    def __getstate__(self) -> Any:
        context.assert_spawning(self)
        return (self._reader, self._writer)

    def __setstate__(self, state: Any) -> None:
        self._reader, self._writer = state

    def reading_end(self) -> "ByteQueue":
        """Return the same queue without its writer, to be handed to a child that reads."""
        return _with_ends(self._reader, None)

    def writing_end(self) -> "ByteQueue":
        """Return the same queue without its reader, to be handed to a child that writes.

        A child that held the reader could make our shared descriptor blocking under our feet.
        """
        return _with_ends(None, self._writer)

    def put(self, frame: bytes) -> None:
        """Write one frame; blocks while the pipe is full. For one thread of one process."""
        _open(self._writer).send_bytes(frame)

    def try_put(self, frame: bytes) -> bool:
        """Write one frame if that takes no waiting, and say whether it did; never so for a large one.

        What was written is in the kernel's hands: it arrives even if this process is killed next.
        """
        writer = _open(self._writer)
        if len(frame) > select.PIPE_BUF - 4:
            return False
        if self._room is None:
            self._room = select.poll()
            self._room.register(writer.fileno(), select.POLLOUT)
        # A pipe that is ready takes PIPE_BUF bytes at once, and nobody else writes to this one. One
        # whose reader is gone is "ready" too, and raises.
        if not self._room.poll(0):
            return False
        writer.send_bytes(frame)
        return True

    def get(self) -> bytes:
        """Read one frame; blocks until there is one. Raises EOFError when every writer is gone."""
        return _open(self._reader).recv_bytes(MAX_FRAME)

    def empty(self) -> bool:
        """Return whether `get` would block."""
        return not _open(self._reader).poll()

    def fileno(self) -> int:
        """Return the reader's descriptor, to wait on."""
        return _open(self._reader).fileno()

    def writer_fileno(self) -> int:
        """Return the writer's descriptor, to wait on."""
        return _open(self._writer).fileno()

    def close_reader(self) -> None:
        """Close the reading end in this process; harmless when it is closed."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def close_writer(self) -> None:
        """Close the writing end in this process; the other side reads its end of file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def close(self) -> None:
        """Close both ends in this process."""
        self.close_reader()
        self.close_writer()


def make_queue(ctx: context.BaseContext) -> ByteQueue:
    """Return a new queue for a child of this (spawn) context."""
    return ByteQueue(ctx=ctx)


def pack(frame: bytes) -> bytes:
    """Return a frame as `get` expects it on the pipe."""
    return struct.pack("!i", len(frame)) + frame


class BadFrame(ValueError):
    """What came over the pipe is no frame, or a larger one than allowed."""


class FrameReader:
    """Cuts what was read from a pipe into frames, so that nobody waits for a half-written one."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._rest = bytearray()

    @property
    def waiting(self) -> int:
        """Bytes of a frame that has not come whole."""
        return len(self._rest)

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the frames that are whole now. Raises BadFrame, after which the pipe makes no sense."""
        rest = self._rest
        rest += chunk
        frames: list[bytes] = []
        at = 0
        while len(rest) - at >= 4:
            (size,) = struct.unpack_from("!i", rest, at)
            # -1 announces 8 more bytes of length, for frames over 2 GiB: always too large for us.
            if not 0 <= size <= self.limit:
                shown = "over 2 GiB" if size == -1 else f"{size} bytes"
                raise BadFrame(f"a frame of {shown} was announced; at most {self.limit} bytes are allowed")
            if len(rest) - at - 4 < size:
                break
            frames.append(bytes(rest[at + 4 : at + 4 + size]))
            at += 4 + size
        del rest[:at]
        return frames


def _open(end: "Connection[Any, Any] | None") -> "Connection[Any, Any]":
    if end is None:
        raise OSError("this end of the queue is closed in this process")
    return end


def _with_ends(reader: "Connection[Any, Any] | None", writer: "Connection[Any, Any] | None") -> ByteQueue:
    queue = ByteQueue.__new__(ByteQueue)
    queue._reader, queue._writer = reader, writer
    return queue


def _enlarge(fd: int) -> None:
    # Linux only, and refused beyond a user's pipe quota: the default size works too, with more waiting.
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_SIZE)
