"""Figures of the device. What needs one is marked gpu."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch

from agent.trainer import memory
from protocol.worker import Limits

without = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a device does")


class Holder:
    pass


@without
def test_without_a_device_there_are_no_figures_and_no_cap() -> None:
    memory.apply_cap(Limits(gpu_memory_fraction=0.5))
    assert memory.figures() == {}
    assert memory.peak_gb() is None and memory.free_device() is None


def test_the_cap_counts_what_is_held_already_and_what_others_hold() -> None:
    """Arithmetic alone: that torch keeps to it is seen where there is a device, below."""
    assert memory.within_cap(free=20, total=24, held=0, fraction=1.0) == 20
    assert memory.within_cap(free=20, total=24, held=0, fraction=0.5) == 12
    assert memory.within_cap(free=2, total=24, held=6, fraction=0.5) == 8
    assert memory.within_cap(free=2, total=24, held=20, fraction=0.5) == 12


def test_release_frees_what_only_a_cycle_holds() -> None:
    gc.disable()
    try:
        holder = Holder()
        holder.itself = holder  # type: ignore[attr-defined]
        seen = weakref.ref(holder)
        del holder
        assert seen() is not None
        memory.release()
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.gpu
def test_figures_and_the_cap_on_a_device() -> None:
    memory.apply_cap(Limits(gpu_memory_fraction=0.5))
    total = torch.cuda.get_device_properties(0).total_memory
    assert 0 < (memory.free_device() or 0) <= total / 2
    held = torch.zeros(1 << 20, device="cuda")
    figures = memory.figures()
    assert figures["gpu_memory_allocated_gb"] > 0
    assert 0 <= figures["gpu_utilization_percent"] <= 100
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.zeros(
            int(torch.cuda.get_device_properties(0).total_memory * 0.6), dtype=torch.uint8, device="cuda"
        )
    assert memory.peak_gb() is not None
    del held


LEFT = """
import resource, sys, torch
from pathlib import Path
from agent.trainer import memory
if "keep" in sys.argv:
    memory.keep_freed()
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
torch.ones(1 << 18)
before = resident()
[torch.ones(6 << 20) for _ in range(4)]
kept = resident() - before
memory.give_back_freed()
print(kept, resident() - before)
"""


@without
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator alone is told to")
def test_what_a_step_frees_is_there_for_the_next() -> None:
    def left(*words: str) -> list[int]:
        # Resident memory and not page faults: how many pages a fault brings is the kernel's affair.
        said = subprocess.check_output([sys.executable, "-c", LEFT, *words], text=True)
        return [int(mebibytes) for mebibytes in said.split()]

    # A first step of 96 MiB, in pieces that the C library by itself maps and unmaps.
    freed, (kept, given_back) = left(), left("keep")
    assert freed[0] < 24
    assert kept > 90
    assert given_back < 24
