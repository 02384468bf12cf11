"""The journal's records out by REST, in order, one request at a time; what is common to both kinds of backend."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Protocol

import anyio
from loguru import logger

from agent.core.job import Job
from agent.core.ports import Uplink
from agent.errors import AgentError
from agent.net.client import RestClient, RestError, Unreached
from agent.net.retry import backoff
from protocol.messages import Lane, Machine
from protocol.session import Key

READ_BYTES = 192 * 1024
LOOK_EVERY = 10.0
"""Seconds between looks at what is wanted of the jobs that live."""
LOOK_LEAST = 2.0
LOOKS_APART = 1.2
"""Seconds between two looks on average, however many jobs there are: a key may ask 100 times a minute."""
ASIDE_MOST = 30.0


class Store(Uplink, Protocol):
    """What the REST side asks of the agent beyond what the socket does."""

    def jobs(self) -> Mapping[str, Job]:
        """Return the backend's jobs that this agent holds, ended ones among them."""
        ...

    def room(self) -> int:
        """Return how many more jobs the agent would start now."""
        ...

    async def machine(self) -> Machine: ...

    async def token(self, job_id: str) -> str:
        """Return the job's token, or "" where none is kept."""
        ...

    async def keep_token(self, job_id: str, token: str) -> None: ...

    async def noted(self, name: str) -> str:
        """Return what was noted under a name, or ""."""
        ...

    async def note(self, notes: Mapping[str, str]) -> None: ...

    async def settled(self, key: Key, seq: int, notes: Mapping[str, str]) -> None:
        """Take the records up to ``seq`` for delivered, and the notes with them, in one commit."""
        ...

    async def announce(self, told: Mapping[str, str], notes: Mapping[str, str], *, warn: bool = True) -> None:
        """Add a sentence of the agent's own to the records of jobs, by id, and keep the notes, in one commit."""
        ...


class Drain(ABC):
    """Sends what is stored, most urgent first, for as long as `run` is let run."""

    every: ClassVar[Mapping[int, float]] = {Lane.CONTROL: 0.0, Lane.METRICS: 1.0, Lane.LOGS: 3.0}
    """Seconds between two appends of a stream: a request costs as much for one record as for a thousand."""
    in_order: ClassVar[bool] = False
    """Whether a job's points and lines wait where its control lane cannot be sent: it names and begins them."""

    def __init__(
        self,
        client: RestClient,
        uplink: Store,
        clock: Callable[[], float] = time.monotonic,
        look_every: float = LOOK_EVERY,
    ) -> None:
        self.look_every = max(look_every, LOOK_LEAST)
        self.client = client
        self.uplink = uplink
        self.clock = clock
        self.aside = (0.5, ASIDE_MOST)
        """Seconds for which what went wrong is left alone, at first and at most."""
        self.sent = 0
        """Records delivered."""
        self._wake = anyio.Event()
        self._hurry = False
        self._at: dict[Key, int] = {}
        self._last: dict[Key, float] = {}
        self._aside: dict[Key | str, tuple[float, Iterator[float]]] = {}
        self._looked = -1e9

    def wake(self) -> None:
        """Something was appended: look for it now."""
        self._wake.set()

    def hurry(self) -> None:
        """The agent is leaving: hold nothing back."""
        self._hurry = True
        self.wake()

    async def run(self) -> None:
        """Send for ever."""
        self._at.clear()
        self.in_doubt()
        while True:
            wake = self._wake = anyio.Event()
            due = await self._pass()
            with anyio.move_on_after(due):
                await wake.wait()

    @abstractmethod
    def in_doubt(self) -> None:
        """Nothing is known of what was on its way last. (The socket, a crash or a full disk came between.)"""

    @abstractmethod
    async def batch(self, key: Key) -> int:
        """Send the next records of a stream; return up to where it is delivered. Raises RestError."""

    @abstractmethod
    async def look(self, job: Job) -> None:
        """Ask what is wanted of a job. Raises RestError."""

    def seen(self, job: Job) -> bool:
        """Tell whether `look` is worth a request."""
        return True

    async def _pass(self) -> float:
        """Send what is due, and return the seconds until something will be."""
        now = self.clock()
        live = sum(self.seen(job) for job in self.uplink.jobs().values())
        wait = look_every = max(self.look_every, live * LOOKS_APART)
        if now - self._looked >= look_every:
            self._looked = now
            await self._look()
        held_up: set[tuple[str, int]] = set()
        for key, last in sorted(self.uplink.heads().items(), key=lambda item: (item[0].lane, item[0].scope)):
            lane = (key.scope, key.lane)
            if self._at.get(key, -1) >= last or lane in held_up:
                continue
            # Streams of one lane are those of the agent's starts, oldest first, and none overtakes another.
            leads = self.in_order and key.lane == Lane.CONTROL and key.scope != ""
            behind = {(key.scope, int(other)) for other in Lane} if leads else {lane}
            held_up |= behind
            due = self._last.get(key, -1e9) + (0.0 if self._hurry else self.every[key.lane])
            until = self._aside[key][0] if key in self._aside else 0.0
            if max(due, until) > now:
                wait = min(wait, max(due, until) - now)
                continue
            try:
                at = self._at[key] = await self.batch(key)
            except Exception as error:  # noqa: BLE001 - the edge of a stream: what went wrong there ends there
                wait = min(wait, self._set_aside(key, error))
                continue
            self._aside.pop(key, None)
            if at < last:
                # From the top: a state that came meanwhile goes before the rest of a backlog.
                return 0.0
            self._last[key] = self.clock()
            held_up -= behind
        return max(0.01, wait)

    async def _look(self) -> None:
        for job in list(self.uplink.jobs().values()):
            if self._aside.get(job.job_id, (0.0,))[0] > self.clock() or not self.seen(job):
                continue
            try:
                await self.look(job)
            except Exception as error:  # noqa: BLE001 - the edge of a look, as of a stream
                self._set_aside(job.job_id, error)

    def _set_aside(self, what: Key | str, error: Exception) -> float:
        """Leave a stream, or the looks at a job, alone for a while; the others are not to wait for it."""
        waits = self._aside[what][1] if what in self._aside else backoff(*self.aside)
        pause = next(waits)
        if isinstance(error, Unreached):
            pause += error.retry_after
        if isinstance(error, RestError):
            logger.info("{}; sending again in {:.1f} s", error, pause)
        else:
            # It may have been sent, and what is kept here does not say so.
            self.in_doubt()
            if isinstance(error, AgentError):
                logger.warning("what was sent cannot be noted: {} Sending again in {:.1f} s.", error, pause)
            else:
                # A defect of ours, or an answer that nobody thought of: a running job must not end by it.
                logger.opt(exception=error).error("{} failed; sending again in {:.1f} s", what, pause)
        self._aside[what] = (self.clock() + pause, waits)
        return pause
