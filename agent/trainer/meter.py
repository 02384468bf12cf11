"""How much memory a piece of work takes at most, and when: every allocation of it, on a CPU and on CUDA.

A CPU's resident memory cannot tell: the C library keeps what was freed, and what is kept is used again. So the
allocations themselves are recorded there, by torch's profiler, as the CUDA allocator counts them by itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from agent.trainer import memory

_MARK = "meter:"
_MEMORY = "[memory]"


class Meter:
    """Bytes above those that were allocated when the measurement began."""

    def __init__(self) -> None:
        self.segments: list[tuple[str, int, int]] = []
        """(mark that ended it, bytes then, most bytes in it), in the order of time."""

    def peak(self, *, upto: str = "", since: str = "") -> int:
        """Return the most bytes, of what came before the mark ``upto`` and after the mark ``since``, where set."""
        names = [name for name, _, _ in self.segments]
        end = names.index(upto) + 1 if upto in names else len(names)
        begin = names.index(since) + 1 if since in names else 0
        return max((peak for _, _, peak in self.segments[begin:end]), default=0)

    def live(self, mark: str = "end") -> int:
        """Return the bytes at a mark."""
        return next((live for name, live, _ in self.segments if name == mark), 0)

    def mark(self, name: str) -> None:
        """Note the moment, from the thread that computes."""
        raise NotImplementedError


class _HostMeter(Meter):
    def mark(self, name: str) -> None:
        with record_function(_MARK + name):
            pass

    def read(self, events: Any) -> None:
        """Take the recorded allocations apart at the marks."""
        live = peak = 0
        taken = (
            (event.start_ns(), event.name(), event.nbytes())
            for event in events
            if event.name() == _MEMORY or event.name().startswith(_MARK)
        )
        for _, name, size in sorted(taken, key=lambda one: one[0]):
            if name == _MEMORY:
                live += size
                peak = max(peak, live)
            else:
                self.segments.append((name.removeprefix(_MARK), live, peak))
                peak = live


class _CudaMeter(Meter):
    def __init__(self) -> None:
        super().__init__()
        torch.cuda.synchronize()
        self._before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def mark(self, name: str) -> None:
        # The allocator counts when a kernel is queued, so nothing has to be waited for.
        live, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        self.segments.append((name, live - self._before, peak - self._before))
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def measured(device: torch.device) -> Iterator[Meter]:
    """Measure what is done inside; the meter is complete afterwards, with a last mark "end"."""
    if device.type == "cuda":
        cuda = _CudaMeter()
        yield cuda
        cuda.mark("end")
        return
    host = _HostMeter()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        yield host
        host.mark("end")
    host.read(record.profiler.kineto_results.events())


def resident() -> int:
    """Return the bytes of this process that lie in memory, without what the C library keeps for later."""
    memory.give_back_freed()
    return resident_now()


def resident_now() -> int:
    """Return the bytes of this process that lie in memory, as they are."""
    return int(psutil.Process().memory_info().rss)


def total_host() -> int:
    """Return the bytes of memory that the machine has, or that its control groups let this process have of them."""
    total = int(psutil.virtual_memory().total)
    for group in _groups():
        with suppress(OSError, ValueError):
            total = min(total, int((group / "memory.max").read_text()))
    return total


def most_resident() -> int:
    """Return the most bytes of this process that ever lay in memory."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resident_now()


def forget_most() -> None:
    """Begin anew to count the most resident bytes, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def free_host() -> int:
    """Return the bytes of memory that this process can still get, by the machine and by its control groups."""
    free = int(psutil.virtual_memory().available)
    for group in _groups():
        with suppress(OSError, ValueError):
            limit = int((group / "memory.max").read_text())
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # Pages of files are given up when memory is needed.
            free = min(free, limit - used + int(stat.get("inactive_file", 0)))
    return max(0, free)


def _groups() -> Iterator[Path]:
    """Yield the control groups (version 2) of this process, from its own to the root."""
    root = Path("/sys/fs/cgroup")
    with suppress(OSError, IndexError):
        own = root / Path("/proc/self/cgroup").read_text().splitlines()[-1].split("::", 1)[1].lstrip("/")
        yield from (one for one in (own, *own.parents) if one.is_relative_to(root))
