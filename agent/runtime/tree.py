"""Who a process is, who descends from it, and whether all of them are gone."""

import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import anyio
import anyio.to_thread

LINUX: bool = sys.platform == "linux"
ASK_WHERE = signal.SIGUSR1
"""A trainer answers it by writing to its log where each of its threads stands; see `agent.runtime.boot`."""


@dataclass(frozen=True)
class Identity:
    """A process that no later one can be taken for: a pid alone is used again."""

    pid: int
    create_time: float
    """On Linux seconds since boot, which no change of the clock moves; elsewhere Unix seconds."""


@dataclass(frozen=True)
class _Entry:
    identity: Identity
    parent: int
    session: int
    group: int


def identify(pid: int) -> Identity | None:
    """Return who ``pid`` is now; None when it has ended, a zombie included."""
    entry = _entry(pid)
    return entry.identity if entry else None


def orphan_alive(pid: int, create_time: float) -> bool:
    """Return whether a trainer of an earlier agent still runs, perhaps saving."""
    return identify(pid) == Identity(pid, create_time)


async def orphan_gone(pid: int, create_time: float, limit: float) -> bool:
    """Wait until a trainer of an earlier agent has ended; False when ``limit`` seconds were not enough."""
    return await gone_within(Identity(pid, create_time), limit)


def members(leader: int, known: Iterable[Identity] = ()) -> frozenset[Identity]:
    """Return the living processes of the session and group that ``leader`` leads, those of ``known``, and
    all their descendants, the leader included.
    """
    entries = {entry.identity.pid: entry for entry in map(_entry, _pids()) if entry}
    known = set(known)
    found = {
        pid
        for pid, entry in entries.items()
        if leader in (pid, entry.session, entry.group) or entry.identity in known
    }
    while more := {pid for pid, entry in entries.items() if entry.parent in found} - found:
        found |= more
    return frozenset(entries[pid].identity for pid in found)


def kill(identity: Identity) -> None:
    """SIGKILL this very process; nothing happens when it has ended."""
    send(identity, signal.SIGKILL)


def send(identity: Identity, number: signal.Signals) -> None:
    """Send a signal to this very process; nothing happens when it has ended."""
    if LINUX:
        try:
            fd = os.pidfd_open(identity.pid)
        except ProcessLookupError:
            return
        try:
            # Between the look and the signal the pid cannot change hands: the descriptor holds it.
            if identify(identity.pid) == identity:
                signal.pidfd_send_signal(fd, number)
        except ProcessLookupError:
            return
        finally:
            os.close(fd)
    elif identify(identity.pid) == identity:
        os.kill(identity.pid, number)


def stopped(identity: Identity) -> bool:
    """Return whether somebody has stopped this very process (SIGSTOP, Ctrl-Z, a debugger)."""
    import psutil  # read once in a long while, where a trainer stands still

    try:
        process = psutil.Process(identity.pid)
        return identify(identity.pid) == identity and process.status() in (
            psutil.STATUS_STOPPED,
            psutil.STATUS_TRACING_STOP,
        )
    except psutil.NoSuchProcess:
        return False


async def gone_within(identity: Identity, limit: float) -> bool:
    """Wait until this very process, which may be nobody's child here, has ended."""
    if not LINUX:
        return await anyio.to_thread.run_sync(_wait_elsewhere, identity, limit, abandon_on_cancel=True)
    try:
        fd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return True
    try:
        with anyio.move_on_after(limit):
            if identify(identity.pid) == identity:
                await anyio.wait_readable(fd)
            return True
    finally:
        os.close(fd)
    return False


async def sweep(leader: int, known: Iterable[Identity], limit: float) -> frozenset[Identity]:
    """Kill what ``members`` finds, again and again, until there is none. Returns who outlived ``limit``."""
    with anyio.move_on_after(limit):
        while left := await anyio.to_thread.run_sync(members, leader, known):
            for identity in left:
                kill(identity)
            for identity in left:
                await gone_within(identity, limit)
        return frozenset()
    return members(leader, known)


def _pids() -> list[int]:
    if LINUX:
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208  (iterdir is 3 times as slow)
    import psutil  # not needed on Linux, where the agent must be small

    return psutil.pids()


def _entry(pid: int) -> _Entry | None:
    if not LINUX:
        return _entry_elsewhere(pid)
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the name in brackets, which may hold blanks and brackets itself.
    fields = stat.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return _Entry(Identity(pid, started), int(fields[1]), int(fields[3]), int(fields[2]))


def _entry_elsewhere(pid: int) -> _Entry | None:
    import psutil  # not needed on Linux

    try:
        process = psutil.Process(pid)
        with process.oneshot():
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            identity = Identity(pid, process.create_time())
            return _Entry(identity, process.ppid(), os.getsid(pid), os.getpgid(pid))
    except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, PermissionError):
        return None


def _wait_elsewhere(identity: Identity, limit: float) -> bool:
    import psutil  # not needed on Linux

    try:
        process = psutil.Process(identity.pid)
        if process.create_time() != identity.create_time:
            return True
        process.wait(limit)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True
