"""How much memory the machine or the container has left, what a trainer holds, and whether the kernel killed for it."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from agent.runtime.tree import LINUX, Identity, members

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
_PAGE = os.sysconf("SC_PAGE_SIZE") if LINUX else 4096
NO_LIMIT = 1 << 60
"""What cgroup v1 calls no limit is near 2**63."""


@dataclass(frozen=True)
class Memory:
    """Bytes, of the machine or of the smallest container around this process, whichever has less left."""

    available: int
    total: int


def memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> Memory:
    """Return what is left. What the kernel can give back at once (file pages) counts as left."""
    import psutil

    machine = psutil.virtual_memory()
    found = [Memory(machine.available, machine.total)]
    for folder in _folders(proc, cgroups):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if limit is None or used is None or limit >= NO_LIMIT:
            continue
        stat = _fields(folder / "memory.stat")
        prefix = "total_" if "total_inactive_file" in stat else ""
        files = sum(stat.get(f"{prefix}{name}", 0) for name in ("inactive_file", "active_file"))
        unwritten = sum(
            stat.get(f"{prefix}{name}", 0) for name in ("file_dirty", "file_writeback", "dirty", "writeback")
        )
        left = limit - used + max(0, files - unwritten)
        found.append(Memory(max(0, min(left, limit, machine.available)), min(limit, machine.total)))
    return min(found, key=lambda one: one.available)


def oom_kills(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Return how many processes the kernel has ended so far for lack of memory, here or on the whole machine."""
    counts = [_fields(proc / "vmstat").get("oom_kill", 0)]
    for folder in _folders(proc, cgroups):
        for name in ("memory.events", "memory.oom_control"):
            counts.append(_fields(folder / name).get("oom_kill", 0))
    return sum(counts)


def held_by(leader: Identity) -> int:
    """Return the bytes of memory that a trainer and its children hold for themselves, files in the cache apart."""
    if not LINUX:
        import psutil  # not needed on Linux

        sizes = []
        for identity in members(leader.pid):
            with contextlib.suppress(psutil.Error):
                sizes.append(int(psutil.Process(identity.pid).memory_info().rss))
        return sum(sizes)
    total = 0
    for identity in members(leader.pid):
        with contextlib.suppress(OSError):
            fields = (PROC / str(identity.pid) / "statm").read_text().split()
            total += (int(fields[1]) - int(fields[2])) * _PAGE
    return total


def _folders(proc: Path, cgroups: Path) -> list[Path]:
    """Return the memory cgroups around this process, the innermost first; version 2, else version 1."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    places: list[tuple[Path, str]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            places.append((cgroups, path))
        elif "memory" in controllers.split(","):
            places.append((cgroups / "memory", path))
    found = []
    for root, path in places:
        folder = root / path.strip("/")
        # In a container the path may be the host's, while the mount begins at the container's own: then there is
        # nothing but the root.
        while True:
            found.append(folder)
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent
    return found


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None  # no such file, or "max"


def _fields(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = [line.split() for line in lines]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
