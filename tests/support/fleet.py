"""Many agents in one process: the real link, session and redial code of each, with its records in memory.

`python -m tests.support.fleet [AGENTS]` cuts them all off from a hub and prints how they come back.
"""

import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from agent.net.websocket import Link
from protocol.messages import Desired, Hello, Lane
from protocol.records import Point, Schema
from protocol.session import Key
from tests.net.backend import Records
from tests.support.programs import KEY, Hub, fake_config
from tests.support.recording import RecordingHub
from tests.support.scripted_agent import machine

POINTS = 20
"""Points of each agent's job before the cut, and again while the hub is away."""
PATIENCE = 120.0


class OneOfMany(Records):
    """An agent with one job, whose points it makes as it is told."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.agent_id = f"agent_{number:016x}"
        self.epoch = 1_000 + number
        self.jobs: set[str] = set()

    async def hello(self) -> Hello:
        said = await super().hello()
        return msgspec.structs.replace(
            said, agent_id=self.agent_id, install_id=self.agent_id, epoch=self.epoch, machine=machine()
        )

    async def desired(self, message: Desired) -> None:
        if message.job_id not in self.jobs:
            self.jobs.add(message.job_id)
            self.add(Key(self.epoch, message.job_id, 0), Schema(1, ["train_loss"]))
            self._train(message.job_id, 1)

    def train_on(self) -> None:
        """Make the points of as many steps again."""
        for job in self.jobs:
            self._train(job, POINTS + 1)

    def _train(self, job: str, first: int) -> None:
        steps = range(first, first + POINTS)
        self.add(Key(self.epoch, job, 1), *(Point(0.0, 1, step, 0.0, 1, [float(step)]) for step in steps))

    @property
    def settled(self) -> bool:
        """Whether all that it has said is acknowledged."""
        return all(self.at[key] == len(rows) for key, rows in self.rows.items())


@dataclass
class Storm:
    """How a fleet came back after its hub was gone for a while."""

    agents: int
    cut: float
    back: float
    """When the hub was there again."""
    dials: list[float] = field(default_factory=list)
    """When each dial was due, in seconds from the cut: the waits of its agent before it.

    On a clock that one process with all agents reads, what a busy machine holds up falls on one moment.
    """
    returns: list[float] = field(default_factory=list)
    """When each agent was connected again."""
    points: dict[str, set[int]] = field(default_factory=dict)
    """Steps that the hub holds of each job."""
    took: Counter[str] = field(default_factory=Counter)
    """How many points the hub stored of each job, a point as often as it did."""

    @property
    def worst_tenth(self) -> int:
        """Most dials in any 100 ms from one second after the cut on."""
        late = sorted(at for at in self.dials if at >= 1.0)
        most, first = 0, 0
        for last, at in enumerate(late):
            while at - late[first] >= 0.1:
                first += 1
            most = max(most, last - first + 1)
        return most

    @property
    def lost(self) -> int:
        whole = set(range(1, 2 * POINTS + 1))
        return sum(len(whole - steps) for steps in self.points.values())

    @property
    def doubled(self) -> int:
        return sum(self.took[job] - len(steps) for job, steps in self.points.items())

    def __str__(self) -> str:
        after = sorted(at - self.back for at in self.returns)
        first = sorted(self.dials)[: self.agents]
        return (
            f"{self.agents} agents, hub away for {self.back - self.cut:.1f} s: {len(self.dials)} dials, at most "
            f"{self.worst_tenth} in 100 ms from 1 s after the cut; first redial after {statistics.median(first):.2f} s "
            f"(median); back {statistics.median(after):.1f} s (median), {after[-1]:.1f} s (last) after the hub; "
            f"{self.lost} points lost, {self.doubled} doubled of {2 * POINTS * self.agents}"
        )


class Fleet:
    """Agents that dial one hub."""

    def __init__(self, hub: Hub, count: int, url: str = "") -> None:
        self.hub = hub
        self.url = url or hub.url
        self.agents = [OneOfMany(number) for number in range(count)]
        self.dials: list[float] = []
        self.waited: dict[str, float] = {}
        self.connected: dict[str, float] = {}

    def _link(self, agent: OneOfMany) -> Link:
        def note(state: str, detail: str) -> None:
            if "dialling again" in detail:
                wait = link.dial_due - time.monotonic()
                self.waited[agent.agent_id] = self.waited.get(agent.agent_id, 0.0) + wait
                self.dials.append(self.waited[agent.agent_id])
            if state == "connected":
                self.connected[agent.agent_id] = time.monotonic()

        link = Link(
            agent,
            backend_url=self.url,
            key=lambda: KEY,
            agent_id=agent.agent_id,
            heartbeat=15.0,
            on_state=note,
            user_agent="fleet/1",
        )
        agent.link = link
        return link

    async def storm(self, away: float, settle: float = 1.0) -> Storm:
        """Have every agent connect and train, kill the hub, start it again after ``away`` seconds."""
        assert isinstance(self.hub, RecordingHub), "the tables of the hub hold nothing twice"
        for number in range(len(self.agents)):
            await anyio.to_thread.run_sync(
                lambda number=number: self.hub.submit(fake_config(), job_id=f"fleet-{number}")
            )
        async with anyio.create_task_group() as group:
            for agent in self.agents:
                group.start_soon(self._link(agent).run)
                await anyio.sleep(0.002)  # the start is no storm
            await self._until(self._all_stored)
            await anyio.sleep(settle)
            self.dials.clear()
            self.waited.clear()
            self.connected.clear()
            cut = time.monotonic()
            await anyio.to_thread.run_sync(lambda: self.hub.stop(9))
            for agent in self.agents:
                agent.train_on()
            await anyio.sleep(away)
            await anyio.to_thread.run_sync(self.hub.start)
            back = time.monotonic()
            await self._until(self._all_stored)
            await self._until(lambda: len(self.connected) == len(self.agents))
            group.cancel_scope.cancel()
        returns = [self.connected[agent.agent_id] for agent in self.agents]
        took = self.hub.took(Lane.METRICS)
        return Storm(len(self.agents), cut, back, list(self.dials), returns, stored(self.hub.data), took)

    async def cut_off(self, cut: Callable[[], None]) -> list[float]:
        """Have every agent connect, call ``cut``, and return how many seconds later each was back."""
        async with anyio.create_task_group() as group:
            for agent in self.agents:
                group.start_soon(self._link(agent).run)
                await anyio.sleep(0.002)
            await self._until(lambda: len(self.connected) == len(self.agents))
            await anyio.sleep(1.0)
            self.connected.clear()
            began = time.monotonic()
            await anyio.to_thread.run_sync(cut)
            await self._until(lambda: len(self.connected) == len(self.agents))
            group.cancel_scope.cancel()
        return [at - began for at in self.connected.values()]

    def _all_stored(self) -> bool:
        taken = sum(len(agent.jobs) for agent in self.agents)
        return taken == len(self.agents) and all(agent.settled for agent in self.agents)

    async def _until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(PATIENCE):
            while not condition():  # noqa: ASYNC110  # many links change what is waited for
                await anyio.sleep(0.05)


def stored(data: Path) -> dict[str, set[int]]:
    """Return the steps that a hub's database holds of each job."""
    path = data / "hub.sqlite3"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as base:
        rows = base.execute("SELECT jobs.id, step FROM points JOIN jobs ON jobs.seq = points.job").fetchall()
    found: dict[str, set[int]] = {}
    for job, step in rows:
        found.setdefault(job, set()).add(step)
    return found


def main(count: int, away: float = 3.0) -> Storm:
    """Run one storm against a hub of its own."""
    with tempfile.TemporaryDirectory() as folder:
        hub = RecordingHub(Path(folder) / "hub").start()
        try:
            return anyio.run(Fleet(hub, count).storm, away)
        finally:
            hub.stop()


if __name__ == "__main__":
    print(main(int(sys.argv[1]) if len(sys.argv) > 1 else 500))
