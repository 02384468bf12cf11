"""Start and idle: from the process's start to its socket at the hub, and what the agent costs while it waits."""

import statistics
import sys
import time
from pathlib import Path

import psutil

from tests.bench.figures import DEFAULTS, Figure, at_most, running
from tests.bench.watched_hub import WatchedHub
from tests.support.programs import Agent, wait_until

RUNS = 7
IDLE = 20.0
MB = 1_000_000


def start(folder: Path, runs: int = RUNS) -> dict[str, Figure]:
    """Return the median time to the open socket; the first start, with a cold cache, is not counted."""
    hub = WatchedHub(folder / "hub").start()
    taken: list[float] = []
    try:
        for run in range(runs + 1):
            # The command that users run, on a home that exists, as after each restart of a machine.
            agent = Agent(folder / "agent", hub.url, fake=False, **DEFAULTS)
            began = time.time()
            agent.start()
            try:
                wait_until(lambda count=run: len(hub.seen("open")) > count, "the agent's dial", every=0.02)
            finally:
                agent.stop()
            taken.append(hub.seen("open")[-1][1] - began)
    finally:
        hub.stop()
        hub.http.close()
    bare = statistics.median(_interpreter() for _ in range(runs))
    counted = taken[1:]
    return {
        "start": at_most(
            statistics.median(counted),
            "s to open socket",
            0.5,
            fastest=min(counted),
            slowest=max(counted),
            bare_interpreter=bare,
            runs=runs,
        )
    }


def _interpreter() -> float:
    """Return the seconds in which this machine starts a Python that does nothing, at this moment."""
    began = time.time()
    psutil.Popen([sys.executable, "-c", "pass"]).wait()
    return time.time() - began


def idle(folder: Path, seconds: float = IDLE) -> dict[str, Figure]:
    """Return memory and processor share of the agent's process while no job runs."""
    with running(folder, fake=False) as (hub, agent):
        agent.api().close()
        wait_until(lambda: hub.seen("open"), "the agent's dial")
        assert agent.process is not None
        process = psutil.Process(agent.process.pid)
        time.sleep(min(2.0, seconds))
        before, began = process.cpu_times(), time.monotonic()
        time.sleep(seconds)
        after, passed = process.cpu_times(), time.monotonic() - began
        memory = process.memory_full_info()
        torch = any("torch" in Path(map_.path).name for map_ in process.memory_maps())
    busy = after.user + after.system - before.user - before.system
    return {
        "idle_memory": at_most(memory.rss / MB, "MB resident", 60, unique_mb=memory.uss / MB),
        "idle_cpu": at_most(100 * busy / passed, "% of a core", 0.5, seconds=passed),
        "idle_torch": at_most(float(torch), "torch loaded (0 = no)", 0),
    }
