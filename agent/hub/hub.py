"""What the parts of the hub share, and the acts that touch more than one of them."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from agent.hub import jobs
from agent.hub.auth import Keys
from agent.hub.feed import AGENTS, Feed
from agent.hub.ingest import Applied
from agent.hub.model import Job
from agent.hub.points import named
from agent.hub.store import Store
from agent.hub.tables import find_agent
from protocol.messages import Command, Desired
from protocol.rest import Branch

ONLINE_SECONDS = 60
"""An agent that only polls is online for this long after a poll."""


class Line(Protocol):
    """A connected agent, as far as the rest of the hub goes."""

    def say(self, message: Desired | Command) -> None:
        """Send soon."""

    def leave(self, reason: str) -> None:
        """Tell the agent that the hub goes away, and close."""


class Hub:
    """One hub: its store, its keys, its connected agents, its news."""

    def __init__(
        self, store: Store, keys: Keys, data_dir: Path, clock: Callable[[], float] = time.time
    ) -> None:
        self.store = store
        self.keys = keys
        self.data_dir = data_dir
        self.clock = clock
        self.feed = Feed()
        self.lines: dict[str, Line] = {}
        """Connected agents that were welcomed."""

    def push(self, job: Job) -> bool:
        """Tell the job's agent what is wanted now; False if it is not connected."""
        line = self.lines.get(job.agent_id or "")
        if line is None:
            return False
        line.say(jobs.desired(job))
        return True

    async def place(self) -> None:
        """Give waiting jobs to connected agents with room."""
        if not self.lines:
            return
        connected = list(self.lines)
        given = await self.store.write(lambda db: jobs.assign(db, connected, self.clock()))
        for job in given:
            self.push(job)
            self.feed.tell(job.id)
        if given:
            self.feed.tell(AGENTS)

    async def control(
        self, job_id: str, action: str, checkpoint: str = "", accept_changes: bool = False
    ) -> tuple[Job, bool]:
        """Write down what is wanted and tell the agent at once; return the job and whether it was told."""
        now = self.clock()
        job = await self.store.write(
            lambda db: jobs.control(db, job_id, action, checkpoint, now, accept_changes)
        )
        told = self.push(job)
        if action == "retry" and job.agent_id is not None:
            agent_id = job.agent_id
            line = self.lines.get(agent_id)
            commands = await self.store.read(lambda db: jobs.open_commands(db, agent_id))
            for command in commands:
                if line is not None and command.job_id == job_id:
                    line.say(command)
        self.changed(job)
        if job.agent_id is None and job.live:
            await self.place()
        return job, told

    async def branch(self, job_id: str, body: Branch) -> tuple[Job, bool]:
        """Begin a new job with a checkpoint of this one; return it, and whether its agent was told."""
        job = await self.store.write(lambda db: jobs.branch(db, job_id, body, self.clock()))
        self.changed(job)
        return job, self.push(job)

    async def adjust(self, job_id: str, body: dict[str, object]) -> tuple[Job, bool]:
        """Ask for live parameters; return the job and whether its agent was told."""
        job = await self.store.write(lambda db: jobs.update_parameters(db, job_id, body, self.clock()))
        self.changed(job)
        return job, self.push(job)

    async def stored(self, applied: Applied) -> None:
        """Spread the news of a commit."""
        if applied.job is not None:
            job_id = applied.job.id
            dots = [named(*point) for point in applied.points] if self.feed.watched(job_id) else []
            self.feed.tell(job_id, dots, applied.lines)
        self.feed.tell(AGENTS)
        if applied.ended:
            await self.place()

    def changed(self, job: Job) -> None:
        """Wake the pages that show the job."""
        self.feed.tell(job.id)
        self.feed.tell(AGENTS)

    async def offline_since(self, job: Job) -> float | None:
        """Return since when the job's agent is away, or None."""
        agent_id = job.agent_id
        if agent_id is None or agent_id in self.lines:
            return None
        agent = await self.store.read(lambda db: find_agent(db, agent_id))
        if agent is None or self.clock() - (agent.last_poll_at or 0) <= ONLINE_SECONDS:
            return None
        return max(agent.last_seen, agent.last_poll_at or 0)
