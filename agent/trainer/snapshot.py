"""What a checkpoint holds, apart from where: copied into host memory and written while training goes on.

Weights and optimizer state change in the optimizer's step and nowhere else. So the copy is made while the next
step runs forward and backward, and only the optimizer waits for it: see `Copying`.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from agent.trainer import meter, planes, tensorfile
from agent.trainer.checkpoint import FileRecord
from agent.trainer.tensorfile import PLAIN, PLANES, Sink

logger = logging.getLogger("agent.trainer")

_ALIGN = 64
_MARGIN = 512 << 20
"""Host memory that a snapshot leaves free at least, in bytes."""
_SHARE = 0.1
"""And of the memory that there is in all."""


@dataclass
class Content:
    """The files of a checkpoint: tensors by the name of their file, and everything else as it is written."""

    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes on disk, uncompressed and without headers."""
        return self.tensor_bytes + sum(map(len, self.files.values()))

    @property
    def tensor_bytes(self) -> int:
        return sum(_bytes(one) for group in self.tensors.values() for one in group.values())

    def write(
        self, folder: Path, *, compress: bool = False, pulse: Callable[[], None] = lambda: None
    ) -> Mapping[str, FileRecord]:
        """Write every file, hashed and synced; return their records."""
        records: dict[str, FileRecord] = {}
        for stem, tensors in self.tensors.items():
            name = f"{stem}{PLANES if compress else PLAIN}"
            with Sink(_place(folder, name), pulse) as sink:
                if compress:
                    planes.write(sink, tensors)
                else:
                    tensorfile.write_plain(sink, tensors)
                records[name] = sink.finish()
        for name, data in self.files.items():
            with Sink(_place(folder, name), pulse) as sink:
                sink.write(data)
                records[name] = sink.finish()
        return records


class HostBuffer:
    """Host memory that is kept from one snapshot to the next: fresh pages cost more than the copy itself."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def __repr__(self) -> str:
        return f"HostBuffer({self._memory.numel()} bytes)"

    def lacks(self, content: Content) -> int:
        """Return how many bytes of host memory must be had anew to hold ``content``; 0: it fits."""
        needed = _room(content)
        return 0 if needed <= self._memory.numel() else needed

    def hold(self, content: Content, ready: Any = None) -> Content:
        """Return ``content`` with copies of its tensors, which stay as they are until the next call.

        ``ready``: the point on the device's stream at which they are what they should be; see `ready_now`.
        """
        needed = _room(content)
        if needed > self._memory.numel():
            self._memory = torch.empty(0, dtype=torch.uint8)  # given back before the larger one is asked for
            self._memory = _fresh(needed)
        with _beside(ready):
            return Content(self._copies(content), content.files)

    def _copies(self, content: Content) -> dict[str, dict[str, torch.Tensor]]:
        held: dict[str, dict[str, torch.Tensor]] = {}
        end = 0
        for stem, tensors in content.tensors.items():
            held[stem] = {}
            for name, tensor in tensors.items():
                size = _bytes(tensor)
                view = self._memory[end : end + size].view(tensor.dtype).view(tensor.shape)
                view.copy_(tensor, non_blocking=True)
                held[stem][name] = view
                end += _aligned(size)
        return held


def _fresh(size: int) -> torch.Tensor:
    if torch.cuda.is_available():
        # The system may lend less memory that cannot be paged out than it has; a copy to other memory is slower.
        with contextlib.suppress(RuntimeError):
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return torch.empty(size, dtype=torch.uint8)


def ready_now() -> Any:
    """Return the present point on the device's stream, behind everything that was asked of it."""
    return torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None


@contextlib.contextmanager
def _beside(ready: Any) -> Iterator[None]:
    """Copy behind ``ready``, on a stream of its own beside what training asks for meanwhile; wait for it."""
    if not torch.cuda.is_available():
        yield
        return
    if ready is not None:
        # Not on the stream: the state of a paged optimizer is read by the processor.
        ready.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


class Copying:
    """A copy that is being made; the optimizer must not step before it is done."""

    def __init__(self, gathered: float) -> None:
        self.stall = gathered
        """Seconds that training stood still for it."""
        self._done = threading.Event()

    def done(self) -> None:
        self._done.set()

    def wait(self) -> None:
        """Wait for the copy, and count how long."""
        if not self._done.is_set():
            began = time.monotonic()
            self._done.wait()
            self.stall += time.monotonic() - began


def fits_host_memory(needed: int) -> bool:
    """Tell whether so many bytes can be taken with a margin to spare."""
    return meter.free_host() - needed > max(_MARGIN, _SHARE * meter.total_host())


class Abandoned(Exception):
    """The write was given up: nobody waits for it any more."""


class Writer:
    """Does one piece of work at a time beside training. Its errors come out where training looks at it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._abandon = threading.Event()

    def __repr__(self) -> str:
        return f"Writer(busy={self.busy})"

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[], None]) -> None:
        """Begin ``work``; the one before must be over."""
        self.wait()

        def run() -> None:
            try:
                work()
            except Abandoned:
                logger.info("a checkpoint that was being written was given up")
            except BaseException as error:  # noqa: BLE001  raised again in the thread that trains
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint writer", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what the work has failed with, if it is over."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Wait for the end of the work, and raise what it has failed with."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self, within: float | None = None) -> None:
        """Wait for the end of the work, and give it up when it takes longer than ``within``; raises nothing."""
        if self._thread is not None:
            self._thread.join(within)
        self._abandon.set()
        with contextlib.suppress(Exception):
            self.wait()

    def pulse(self) -> None:
        """Raise Abandoned if the work is to be given up."""
        if self._abandon.is_set():
            raise Abandoned


def _place(folder: Path, name: str) -> Path:
    path = folder / name
    # Not its parents: where ``folder`` has vanished, that must come out.
    path.parent.mkdir(exist_ok=True)
    return path


def _bytes(tensor: torch.Tensor) -> int:
    size: int = tensor.numel() * tensor.element_size()
    return size


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGN) * _ALIGN


def _room(content: Content) -> int:
    return sum(_aligned(_bytes(one)) for group in content.tensors.values() for one in group.values())
