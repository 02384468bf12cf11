"""Dial, carry a session's frames in and out, dial again."""

import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn
from urllib.parse import urlsplit

import anyio
import msgspec
from loguru import logger
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from agent.core.ports import Uplink
from agent.errors import NotOurBackend, Refused
from agent.net.frames import Frames
from agent.net.retry import (
    LOOPBACK,
    TLS_RETRY,
    backoff,
    can_retry,
    certificate_fault,
    closed_for_good,
    owner,
    refusal,
    retry_after,
)
from agent.net.sleep import EVERY, Clocks, read_clocks, slept
from protocol.codec import BadMessage, Codec
from protocol.fields import MAX_FRAME
from protocol.messages import CONNECT_PATH, SUBPROTOCOLS, Close, Command, Desired, Goaway, Tomb
from protocol.rest import HEADER_AGENT
from protocol.session import Acked, AgentSession, Closing, Dropped, Key, Welcomed

OPEN_WITHIN = 10.0
"""Seconds for TCP, TLS and the upgrade together."""
HELLO_WITHIN = 10.0
"""Seconds from the upgrade to HELLO: the backend waits no longer, and nothing reads the connection until then."""
HEALTHY = 60.0
"""Seconds a session must have lived before the next dial's wait starts small again."""
PROBE_WITHIN = 5.0
"""Seconds in which the backend must answer after a sleep of this machine."""
WOKEN_WITHIN = 3.0
"""Seconds over which the dials of machines that woke together are spread."""


def socket_url(backend_url: str) -> str:
    """Return the address to dial: https becomes wss."""
    parts = urlsplit(backend_url)
    scheme = {"https": "wss", "http": "ws"}[parts.scheme]
    return f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}{CONNECT_PATH}"


def _stay(exc: Exception) -> Exception | str:
    return exc


def wrong_subprotocol(url: str) -> NotOurBackend:
    """Return the error for a 101 that names no subprotocol of ours."""
    return NotOurBackend(
        f"{url} accepted a WebSocket but speaks none of {', '.join(SUBPROTOCOLS)}. Check BACKEND_URL."
    )


def decided(error: Exception, url: str, *, was_ours: bool) -> Refused | float:
    """Return what ends the dialling for good, or the seconds until the next dial at least.

    ``was_ours``: this process has been welcomed at that address before.
    """
    refused = refusal(error, url)
    away = isinstance(refused, NotOurBackend) or (refused is not None and refused.status == 403)
    if refused is not None and not (was_ours and away):
        return refused
    # It was ours a while ago: a redeploy or a proxy answers in its place, and that passes.
    return TLS_RETRY if refused is not None or certificate_fault(error) else retry_after(error)


class Link:
    """The agent's one connection to its backend. ``state``: connecting, connected, refused."""

    def __init__(
        self,
        uplink: Uplink,
        *,
        backend_url: str,
        key: Callable[[], str],
        agent_id: str,
        heartbeat: float,
        on_state: Callable[[str, str], None],
        user_agent: str,
        subprotocols: tuple[str, ...] = SUBPROTOCOLS,
        clock: Callable[[], float] = time.monotonic,
        clocks: Callable[[], Clocks] = read_clocks,
        on_sleep: Callable[[float], Awaitable[None]] | None = None,
    ) -> None:
        self._uplink = uplink
        self.url = socket_url(backend_url)
        self._key = key
        self._agent_id = agent_id
        self._heartbeat = heartbeat
        self._on_state = on_state
        self._user_agent = user_agent
        self._subprotocols = [Subprotocol(name) for name in subprotocols]
        self._clock = clock
        self._clocks = clocks
        self._on_sleep = on_sleep
        self._roused = anyio.Event()
        """The machine woke up: what this link waits for may be over."""
        self._wake = anyio.Event()
        self._welcomed = anyio.Event()
        self._acks: dict[Key, int] = {}
        """What the backend has acknowledged and the journal still holds, by stream."""
        self._acked = anyio.Event()
        self._session: AgentSession | None = None
        self._again = anyio.Event()
        self._retry_after = 0.0
        self._frames = Frames()
        self.dials = 0
        self.dial_due = 0.0
        """When the next dial is due, by the clock of this link."""
        self._was_ours = False
        self._overtaken = False

    def __repr__(self) -> str:
        return f"<Link {self.url} {self._session!r}, {self.dials} dials>"

    def wake(self) -> None:
        """Something was appended: look for it now."""
        self._wake.set()

    def greet_again(self) -> None:
        """Dial anew: what HELLO said of this machine is known better now."""
        self._again.set()

    def bye(self, reason: str, until: float = 0.0) -> None:
        """Explain a planned silence on the open connection, if there is one."""
        if self._session is not None:
            self._session.bye(reason, until)
            self.wake()

    async def run(self) -> None:
        """Dial for ever. Raises Refused when dialling again cannot help."""
        await self._dial_for_ever()

    async def notice_sleep(self) -> NoReturn:
        """Look at the clocks; after a sleep ask the backend for a sign of life, and wait for no old dial.

        Run beside `run`, and also where nobody dials: a sleep is explained by whatever way there is.
        """
        before = self._clocks()
        while True:
            await anyio.sleep(EVERY)
            now = self._clocks()
            asleep = slept(before, now)
            before = now
            if not asleep:
                continue
            logger.info("nothing ran here for {:.0f} s (sleep, or this process was stopped)", asleep)
            if self._session is not None:
                # Not killed blindly: after a short stop the connection is as good as before.
                self._session.probe(self._clock(), PROBE_WITHIN)
                self.wake()
            self._roused.set()
            if self._on_sleep is not None:
                await self._on_sleep(asleep)

    async def _wait_to_dial(self, wait: float) -> None:
        """Wait, but after a sleep of the machine only long enough that a house full of laptops is spread."""
        self._roused = anyio.Event()
        with anyio.move_on_after(wait):
            await self._roused.wait()
            await anyio.sleep(random.uniform(0, min(wait, WOKEN_WITHIN)))  # noqa: S311  # spreads load

    async def _dial_for_ever(self) -> None:
        waits = backoff()
        while True:
            began = self._clock()
            self._on_state("connecting", f"dialling {self.url}")
            try:
                closing = await self._one_connection()
                if (final := closed_for_good(closing.code, closing.reason, self.url)) is not None:
                    raise final
                why = closing.reason or f"closed with code {closing.code}"
                least = 0.0
            except Exception as error:  # noqa: BLE001
                # The connection's edge: every failure of a dial or a session ends here, and is judged once.
                judged = decided(error, self.url, was_ours=self._was_ours)
                if isinstance(judged, Refused):
                    self._on_state("refused", str(judged))
                    raise judged from None
                if refusal(error, self.url) is None and not can_retry(error):
                    # A defect of ours must not cut a running job off from its backend for good.
                    logger.exception("the link broke in a way that no network explains")
                why = str(error) or type(error).__name__
                least = judged
                if certificate_fault(error):
                    logger.error("the certificate of {} does not verify: {}", self.url, why)
            if self._clock() - began >= HEALTHY:
                waits = backoff()
            # What the backend asked for is spread too, or a whole fleet comes back at once.
            wait = max(least, self._retry_after) + next(waits)
            self._retry_after = 0.0
            self.dial_due = self._clock() + wait
            logger.info("link down: {}; dialling again in {:.1f} s", why, wait)
            self._on_state("connecting", f"{why.rstrip('.')}; dialling again in {wait:.0f} s")
            await self._wait_to_dial(wait)

    @asynccontextmanager
    async def _dialled(self) -> AsyncIterator[ClientConnection]:
        self.dials += 1
        options: dict[str, Any] = {}
        if urlsplit(self.url).hostname in LOOPBACK:
            options["proxy"] = None
        dial = connect(
            self.url,
            subprotocols=self._subprotocols,
            additional_headers={"Authorization": f"Bearer {self._key()}", HEADER_AGENT: self._agent_id},
            user_agent_header=self._user_agent,
            compression=None,
            open_timeout=OPEN_WITHIN,
            # The session's own heartbeat does this, and works when the write buffer is full.
            ping_interval=None,
            close_timeout=1,
            max_size=MAX_FRAME,
            **options,
        )
        # Following a redirect would drop the key or give it to another origin.
        dial.process_redirect = _stay  # type: ignore[method-assign]
        with anyio.fail_after(OPEN_WITHIN + 2):
            socket = await dial
        try:
            yield socket
        finally:
            # A closing handshake on a dead link never ends; the abort after it always does.
            with anyio.move_on_after(1, shield=True):
                await socket.close()
            socket.transport.abort()

    async def _one_connection(self) -> Closing:
        async with self._dialled() as socket:
            if socket.subprotocol not in self._subprotocols:
                raise wrong_subprotocol(self.url)
            codec = Codec(socket.subprotocol)
            # Before the look, so that whatever is learned during it ends this session.
            self._again = anyio.Event()
            with anyio.fail_after(HELLO_WITHIN):
                hello = await self._uplink.hello()
            # A HELLO that fills no frame; the other streams are opened after it.
            hello = msgspec.structs.replace(hello, streams=hello.streams[: self._frames.hello_streams])
            session = AgentSession(hello, self._clock(), self._heartbeat)
            self._session = session
            self._frames.begin()
            try:
                closing = await self._converse(socket, codec, session)
            finally:
                self._session = None
                self._uplink.ended()
            self._frames.ended(closing.code, session.welcome is not None)
            await self._stale(closing, session)
            if session.closing is not None and session.closing.code >= Close.DRAIN:
                # The other end should be able to read in its own log what it did.
                with anyio.move_on_after(1):
                    await socket.close(session.closing.code, session.closing.reason[:120])
            return closing

    async def _stale(self, closing: Closing, session: AgentSession) -> None:
        """Count on from the pair that owns this agent's id, unless that took it from us."""
        if closing.code != Close.STALE:
            return
        if session.welcome is not None:
            # A copy of this machine goes by its id. Two that outran each other would never end.
            self._overtaken = True
        elif not self._overtaken and (pair := owner(closing.reason)) is not None:
            await self._uplink.outrun(*pair)

    async def _converse(self, socket: ClientConnection, codec: Codec, session: AgentSession) -> Closing:
        ended: list[Closing] = []
        self._welcomed = anyio.Event()
        self._acks.clear()
        self._acked = anyio.Event()
        async with anyio.create_task_group() as group:

            async def guarded(
                part: Callable[[ClientConnection, Codec, AgentSession], Awaitable[None]],
            ) -> None:
                try:
                    await part(socket, codec, session)
                except ConnectionClosed as closed:
                    if closed.rcvd is not None:
                        ended.append(Closing(closed.rcvd.code, closed.rcvd.reason))
                    elif closed.sent is not None:
                        ended.append(
                            Closing(1006, f"this end hung up: {closed.sent.reason or closed.sent.code}")
                        )
                    else:
                        ended.append(Closing(1006, "the connection was lost"))
                group.cancel_scope.cancel()

            group.start_soon(guarded, self._read)
            group.start_soon(guarded, self._settle)
            group.start_soon(guarded, self._write)
            group.start_soon(guarded, self._watch)
            group.start_soon(guarded, self._renew)
        if ended:
            return ended[0]
        return session.closing or Closing(1006, "the connection was lost")

    async def _read(self, socket: ClientConnection, codec: Codec, session: AgentSession) -> None:
        while session.closing is None:
            frame = await socket.recv()
            try:
                message = codec.decode_hub(frame)
            except BadMessage as error:
                logger.warning("the backend sent a frame that cannot be read: {}", error)
                await socket.close(Close.MALFORMED, str(error)[:120])
                return
            for news in session.receive(message, self._clock()):
                match news:
                    case Welcomed():
                        self._was_ours = True
                        logger.info("connected to {} as session {}", self.url, news.session_id)
                        self._on_state("connected", self.url)
                        self._welcomed.set()
                        await self._uplink.welcomed(news.server_time)
                    case Acked(key=key, seq=seq):
                        self._acks[key] = seq
                        self._acked.set()
                    case Dropped(key=key, reason=reason):
                        logger.warning(
                            "the backend takes no more of {}: {}", key.scope or "the agent", reason
                        )
                        self._acks.pop(key, None)
                        await self._uplink.dropped(key, reason)
                    case Desired():
                        await self._uplink.desired(news)
                    case Command():
                        await self._uplink.commanded(news)
                    case Goaway(retry_after_s=after):
                        self._retry_after = after
            self.wake()

    async def _settle(self, socket: ClientConnection, codec: Codec, session: AgentSession) -> None:
        """Have what is acknowledged deleted, beside the reading: an order must not wait for the journal's deletes."""
        while True:
            await self._acked.wait()
            self._acked = anyio.Event()
            while self._acks:
                # Of a stream only the newest counts.
                key = next(iter(self._acks))
                await self._uplink.acked(key, self._acks.pop(key))

    async def _write(self, socket: ClientConnection, codec: Codec, session: AgentSession) -> None:
        while True:
            # Before the look, so that whatever comes during it ends the wait below.
            wake = self._wake = anyio.Event()
            self._look(session)
            while not wake.is_set() and (wish := session.next_read()) is not None:
                key, after, size = wish
                rows = await self._uplink.read(key, after, size)
                self._frames.queue(session, codec, key, after, rows)
                await self._flush(socket, codec, session)
            due = session.tick(self._clock(), self._uplink.backlog())
            await self._flush(socket, codec, session)
            if session.closing is not None:
                return
            with anyio.move_on_after(max(0.01, due - self._clock())):
                await wake.wait()

    async def _watch(self, socket: ClientConnection, codec: Codec, session: AgentSession) -> None:
        """Leave a backend that is silent: on a dead line the writer waits for ever on a full buffer."""
        with anyio.move_on_after(session.watch(self._clock()) - self._clock()):
            # WELCOME sets the limits anew.
            await self._welcomed.wait()
        while session.closing is None:
            due = session.watch(self._clock())
            await anyio.sleep(max(0.01, due - self._clock()))

    async def _renew(self, socket: ClientConnection, codec: Codec, session: AgentSession) -> None:
        await self._again.wait()
        await socket.close(1000, "more is known of this machine")

    def _look(self, session: AgentSession) -> None:
        """Tell the session what the journal holds by now."""
        for key, last in self._uplink.heads().items():
            session.appended(key, last)

    async def _flush(self, socket: ClientConnection, codec: Codec, session: AgentSession) -> None:
        for message in session.outgoing(self._clock()):
            data = codec.encode(message)
            self._frames.sent(len(data))
            await socket.send(data.decode() if codec.as_json else data)
            if isinstance(message, Tomb) and (key := session.key(message.sid)) is not None:
                await self._uplink.buried(key, message.reason)


__all__ = ["Link", "Refused", "socket_url"]
