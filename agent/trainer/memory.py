"""What the device holds: figures for the curve, the owner's cap, and giving everything back."""

import contextlib
import ctypes
import gc
import sys
import time
from typing import Any

import torch

from protocol.worker import Limits

_GB = 1 << 30
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Of mallopt(3)."""
_fraction = 1.0
"""The owner's share of the device, as it was applied."""
_utilization: tuple[float, float | None] = (0.0, None)


def apply_cap(limits: Limits) -> None:
    """Keep this process within the owner's share of each device's memory; before anything is allocated there."""
    global _fraction
    _fraction = limits.gpu_memory_fraction
    if torch.cuda.is_available() and limits.gpu_memory_fraction < 1.0:
        for device in range(torch.cuda.device_count()):
            torch.cuda.set_per_process_memory_fraction(limits.gpu_memory_fraction, device)


def keep_freed() -> None:
    """Where the processor computes, keep what a step frees for the next one; before anything large is allocated.

    The C library gives freed memory back to the system at once, and every step would have to fault it in again.
    """
    if torch.cuda.is_available() or sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        set_option = ctypes.CDLL(None).mallopt
        for option, value in (
            (_MMAP_THRESHOLD, 32 << 20),
            (_TRIM_THRESHOLD, 2**31 - 1),
            (_TOP_PAD, 64 << 20),
        ):
            set_option(option, value)


def give_back_freed() -> None:
    """Give the system back what the C library keeps of freed memory; see `keep_freed`."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def within_cap(free: int, total: int, held: int, fraction: float) -> int:
    """Return the bytes of a device that this process may still come to hold, with the ``held`` ones it has."""
    return max(0, min(free + held, int(total * fraction)))


def free_device() -> int | None:
    """Return the bytes of the device that this process may hold at most, now; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return within_cap(free, total, torch.cuda.memory_reserved(), _fraction)


def figures() -> dict[str, float]:
    """Return what the charts show of the device; empty without CUDA. Causes no wait for the device."""
    if not torch.cuda.is_available():
        return {}
    values = {
        "gpu_memory_allocated_gb": torch.cuda.memory_allocated() / _GB,
        "gpu_memory_reserved_gb": torch.cuda.memory_reserved() / _GB,
    }
    busy = _busy_percent()
    if busy is not None:
        values["gpu_utilization_percent"] = busy
    return values


def release() -> None:
    """Give back what no object holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_gb() -> float | None:
    """Return the most device memory that was ever allocated, in GB."""
    return torch.cuda.max_memory_allocated() / _GB if torch.cuda.is_available() else None


def _busy_percent() -> float | None:
    """Return the device's utilisation, asked of NVML at most once a second."""
    global _utilization
    asked, value = _utilization
    if time.monotonic() - asked >= 1.0:
        value = _ask_nvml()
        _utilization = (time.monotonic(), value)
    return value


def _ask_nvml() -> float | None:
    try:
        import pynvml  # absent on machines without NVIDIA's library
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    except pynvml.NVMLError:
        return None
