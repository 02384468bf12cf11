"""Which way records go: by the socket, or by REST where no socket can be had. Never both at once."""

import time
from collections.abc import Awaitable, Callable
from typing import NoReturn

import anyio
from loguru import logger

from agent.core.ports import Uplink
from agent.errors import AgentError, KeyRefused, NotOurBackend, Refused
from agent.net.client import RestClient, RestError, Said, Unclear
from agent.net.drain import Drain, Store
from agent.net.platform import PlatformDrain
from agent.net.poll import Poller, is_platform, ours
from agent.net.rest import HubDrain
from agent.net.retry import backoff
from agent.net.websocket import Link
from protocol.lifecycle import TERMINAL, JobState

FAILED_DIALS = 3
WITHOUT_WELCOME = 30.0
"""Seconds since the link was lost (or the start) after which REST has its turn, however few dials there were."""
ABSENT_FIRST = 30.0
ABSENT_MOST = 600.0
"""Seconds between dials of a backend that has no socket, at most: one day it may have."""
OF_THE_KEY = ("Invalid API key", "Missing ")
"""How a refusal begins that is about the key itself; so is one that names a scope. It ends the agent at once."""
PASSING = ("Database error", "Authentication failed")
"""What the platform says with 401 when it could not look at the key."""
BROKE = "{} broke in a way that no network explains"
"""What is caught at the edges of the REST side, as at the socket's: neither a defect of ours, nor a full disk, nor an
answer that nobody foresaw may end the agent and its jobs."""
REFUSALS, REFUSED_FOR = 5, 600.0
"""Polls in a row, and seconds, for which any other refusal must last."""


class Rules:
    """When REST may have the records. Facts in; no clock, no I/O.

    The socket has them from HELLO until its session ends, and REST is stopped before HELLO. REST may have them
    after so many failed dials or so long without a WELCOME, at once where the backend has no socket, and always
    or never as the setting says. Dialling goes on meanwhile, and the next HELLO is the way back.
    """

    def __init__(self, setting: str, now: float) -> None:
        self.setting = setting
        self.socket = "none"
        """none, opening (from HELLO on), open, or absent."""
        self._since = now
        self._failed = 0

    def __repr__(self) -> str:
        return f"<Rules {self.setting} socket={self.socket} failed={self._failed} since={self._since:g}>"

    def hello(self) -> None:
        """The backend took the upgrade, and the session begins."""
        self.socket = "opening"

    def welcomed(self) -> None:
        """It answered as ours does."""
        self.socket = "open"
        self._failed = 0

    def ended(self, now: float) -> None:
        """A dial failed, or a session ended."""
        if self.socket == "open":
            self._since = now
            self._failed = 0
        else:
            self._failed += 1
        self.socket = "none"

    def absent(self) -> None:
        """The backend answers, and has no socket of ours."""
        self.socket = "absent"

    def rest_from(self) -> float | None:
        """Return the time from which REST has its turn as things stand, or None for not before they change."""
        if self.setting == "websocket" or self.socket in ("opening", "open"):
            return None
        if self.setting == "poll" or self.socket == "absent" or self._failed >= FAILED_DIALS:
            return float("-inf")
        return self._since + WITHOUT_WELCOME


class Polls:
    """What polls were answered so far, and which refusal is one for good. Facts in; no clock, no I/O.

    The platform says 401 also where its own database gives no answer, and a host or a firewall says 403 and 404
    while the backend is away. What would end the agent at its first poll must last, once polls were answered.
    """

    def __init__(self, base: str) -> None:
        self.base = base
        self.ever = False
        """Whether one was answered: what stands there is a backend that can be polled."""
        self.known = False
        """Whether a socket was opened with this key: the key was good."""
        self._refusals = 0
        self._since = 0.0

    def __repr__(self) -> str:
        return f"<Polls {self.base} ever={self.ever} refusals={self._refusals} since={self._since:g}>"

    def answered(self) -> None:
        """A poll was answered as it should be."""
        self.ever = True
        self._refusals = 0

    def failed(self, error: RestError, now: float, *, no_socket: bool) -> None:
        """A poll was not. Raises Refused where polling again cannot help; ``no_socket``: nor is there another way."""
        if not isinstance(error, Said) or error.status not in (401, 403):
            self._refusals = 0
            if isinstance(error, Said) and no_socket and not self.ever:
                raise NotOurBackend(
                    f"{self.base} has no route for agents that poll ({error}). Check BACKEND_URL: it must be the "
                    "address of a FineTune Lab backend or of `training-agent hub`."
                )
            return
        self._since = self._since if self._refusals else now
        self._refusals += 1
        lasts = self._refusals >= REFUSALS and now - self._since >= REFUSED_FOR
        passes = self.ever or self.known or error.error in PASSING
        if lasts or not passes or error.error.startswith(OF_THE_KEY) or "scope" in error.error:
            raise KeyRefused(
                f"{self.base} refused the API key ({error}). Make a key with the scope `training` on the platform's "
                "page and set it as API_KEY."
            )


class Transport:
    """The link and the REST side under those rules. ``state``: as `agent.net.websocket.Link` says."""

    def __init__(
        self,
        uplink: Store,
        client: RestClient,
        *,
        setting: str,
        poll_interval: float,
        make_link: Callable[[Uplink, Callable[[str, str], None]], Link],
        on_state: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rules = Rules(setting, clock())
        self.link = make_link(uplink, self._noted)
        self.poller = Poller(client, uplink, interval=poll_interval, clock=clock)
        self.hub = HubDrain(client, uplink, clock, poll_interval)
        self.platform = PlatformDrain(client, uplink, clock=clock, look_every=poll_interval)
        self.polls = Polls(client.base)
        self.by_rest = False
        """Whether the REST side has the records now."""
        self._client = client
        self._uplink = uplink
        self._on_state = on_state
        self._clock = clock
        self._dials = 0
        self._changed = anyio.Event()
        self._turn: anyio.CancelScope | None = None
        self._stopped = anyio.Event()
        self._stopped.set()
        self._drain: Drain | None = None
        self._refused: Refused | None = None

    def wake(self) -> None:
        """Something was appended: look for it now."""
        self.link.wake()
        if self._drain is not None:
            self._drain.wake()

    async def bye(self, reason: str, until: float = 0.0) -> None:
        """Explain a planned silence, and hold nothing back. ``until``: when it ends; 0 where that is not known.

        The socket has a frame for it. By REST it is a line in the log of each job that somebody waits for.
        """
        self.link.bye(reason, until)
        if self.by_rest:
            resting = (*TERMINAL, JobState.PAUSED)
            live = [job.job_id for job in self._uplink.jobs().values() if job.state not in resting]
            try:
                await self._uplink.announce(dict.fromkeys(live, reason), {}, warn=False)
            except AgentError as error:
                logger.warning("that the agent leaves cannot be told: {}", error)
        self.hub.hurry()
        self.platform.hurry()

    async def run(self) -> None:
        """Carry records for ever. Raises Refused when trying again cannot help."""
        try:
            async with anyio.create_task_group() as group:

                async def part(do: Callable[[], Awaitable[None]]) -> None:
                    try:
                        await do()
                    except Refused as refused:
                        self._refused = refused
                        group.cancel_scope.cancel()

                # Whichever way is open: who only polls has slept too, and is to say so.
                group.start_soon(self.link.notice_sleep)
                if self.rules.setting != "poll":
                    group.start_soon(part, self._by_socket)
                if self.rules.setting != "websocket":
                    group.start_soon(part, self._by_rest)
        finally:
            with anyio.CancelScope(shield=True):
                await self._client.close()
        if self._refused is not None:
            self._on_state("refused", str(self._refused))
            raise self._refused

    # The socket

    async def socket_turn(self) -> None:
        """Stop the REST side, and wait until it has: the socket is about to say where the records stand."""
        self.rules.hello()
        if self._turn is not None:
            self._turn.cancel()
        await self._stopped.wait()

    def _noted(self, state: str, detail: str) -> None:
        """Take the link's news."""
        if state == "connected":
            self.rules.welcomed()
            self.polls.known = True
        elif self.rules.socket == "open" or self.link.dials > self._dials:
            self._dials = self.link.dials
            if state == "connecting":
                self.rules.ended(self._clock())
        self._changed.set()
        if state != "refused" and not self.by_rest:
            self._on_state(state, detail)

    async def _by_socket(self) -> None:
        waits = backoff(ABSENT_FIRST, ABSENT_MOST)
        while True:
            try:
                await self.link.run()
            except Refused as refused:
                if self.rules.setting == "websocket" or not await self._served_otherwise(refused):
                    raise
                level = "DEBUG" if self.rules.socket == "absent" else "INFO"
                logger.log(level, "{}; polling instead", refused)
                self.rules.absent()
                self._changed.set()
            await anyio.sleep(next(waits))

    async def _served_otherwise(self, refused: Refused) -> bool:
        """Tell whether a backend that refuses the socket is one that can be polled, with this key."""
        if not isinstance(refused, NotOurBackend) and refused.status not in (401, 403):
            return False
        waits = backoff()
        # What was polled before can be polled again, and whoever polls finds out whether the key is still good.
        while not self.polls.ever:
            try:
                return is_platform(await self.poller.ask())
            except RestError as error:
                self.polls.failed(error, self._clock(), no_socket=False)
                if isinstance(error, Said) and error.status not in (401, 403):
                    return False
                if isinstance(error, Unclear) and 0 < error.status < 500:
                    return False
                logger.info("{}; asking again", error)
            except Exception:  # noqa: BLE001  a defect of ours in one answer must not end the agent and its jobs
                logger.exception(BROKE, "a poll")
            await anyio.sleep(next(waits))
        return True

    # REST

    async def _by_rest(self) -> None:
        waits = backoff()
        while True:
            await self._until_our_turn()
            self._stopped = anyio.Event()
            broke = False
            try:
                with anyio.CancelScope() as self._turn:
                    await self._serve()
            except Refused:
                raise
            except Exception:  # noqa: BLE001  as of a poll
                broke = True
                logger.exception(BROKE, "sending by REST")
            finally:
                self._turn = None
                self._stopped.set()
            if broke:
                await anyio.sleep(next(waits))
            else:
                waits = backoff()

    async def _until_our_turn(self) -> None:
        while True:
            self._changed = anyio.Event()
            due = self.rules.rest_from()
            now = self._clock()
            if due is not None and due <= now:
                return
            with anyio.move_on_after(None if due is None else due - now):
                await self._changed.wait()

    async def _serve(self) -> None:
        """Poll and send until the socket is there."""
        waits = backoff()
        try:
            while True:
                try:
                    answer = await self.poller.ask()
                    if not is_platform(answer):
                        raise Unclear(f"{self._client.base} answers a poll with something else")
                    break
                except RestError as error:
                    self._not_polled(error)
                    await anyio.sleep(next(waits))
            self.polls.answered()
            self._drain = self.hub if ours(answer) else self.platform
            self.by_rest = True
            kind = "a hub of ours" if ours(answer) else "the platform"
            logger.info("no socket to be had: polling {} ({})", self._client.base, kind)
            self._polled()
            refused: Refused | None = None
            async with anyio.create_task_group() as group:
                group.start_soon(self._drain.run)
                try:
                    await self._poll()
                except Refused as error:
                    refused = error
                    group.cancel_scope.cancel()
            if refused is not None:
                raise refused
        finally:
            self.by_rest = False
            self._drain = None

    async def _poll(self) -> NoReturn:
        waits = backoff()
        failing = False
        while True:
            try:
                wait = await self.poller.once()
                why = ""
            except RestError as error:
                self._not_polled(error)
                why = str(error)
            except Exception as error:  # noqa: BLE001  as of a first poll
                logger.exception(BROKE, "a poll")
                why = str(error) or type(error).__name__
            if why:
                wait = next(waits)
                failing = True
                self._on_state("connecting", f"{why}; polling again in {wait:.0f} s")
            else:
                self.polls.answered()
                if failing:
                    waits, failing = backoff(), False
                    self._polled()
            await anyio.sleep(wait)

    def _polled(self) -> None:
        self._on_state("connected", f"{self._client.base} by polling, without a socket")

    def _not_polled(self, error: RestError) -> None:
        logger.info("poll: {}", error)
        no_socket = self.rules.setting == "poll" or self.rules.socket == "absent"
        self.polls.failed(error, self._clock(), no_socket=no_socket)
