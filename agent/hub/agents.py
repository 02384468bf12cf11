"""The WebSocket that agents dial: `/api/training/agent/connect`."""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
from starlette.responses import JSONResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from agent.hub import ingest
from agent.hub.errors import Refusal, StoreFailed, StreamRefused
from agent.hub.feed import AGENTS
from agent.hub.greeting import Greeting, greet, parted
from agent.hub.hub import Hub
from protocol.codec import BadMessage, Codec
from protocol.messages import SUBPROTOCOLS, Close, Command, Desired, Goaway, Lane
from protocol.rest import HEADER_AGENT
from protocol.session import Apply, Buried, Greeted, HubSession, Key, Left, Opened

log = logging.getLogger("agent.hub")

UNCOMMITTED = 16
"""Frames of one agent that may wait for their commit; more are not read, and TCP holds the sender."""
CLOSE_WITHIN = 5.0
DRAIN_RETRY_S = 1.0
TOO_LARGE = "a number is too large to store"
"""JSON knows no largest number; a database does."""


async def connect(socket: WebSocket, hub: Hub) -> None:
    """Answer the upgrade, then serve the agent until either side leaves."""
    try:
        await hub.keys.require(socket.headers)
    except Refusal as refusal:
        await socket.send_denial_response(JSONResponse({"error": refusal.sentence}, refusal.status))
        return
    offered = socket.scope.get("subprotocols") or []
    chosen = next((name for name in SUBPROTOCOLS if name in offered), None)
    if chosen is None:
        sentence = f"No known subprotocol was offered. This hub speaks {' and '.join(SUBPROTOCOLS)}."
        await socket.send_denial_response(JSONResponse({"error": sentence}, 400))
        return
    await socket.accept(subprotocol=chosen)
    await Connection(hub, socket, Codec(chosen), socket.headers.get(HEADER_AGENT)).run()


Frame = tuple[Key, "asyncio.Future[ingest.Applied]"]
"""The stream of a DATA or TOMB frame, and its commit."""


class Pending:
    """Frames that wait for their commit, in order."""

    def __init__(self) -> None:
        self.frames: deque[Frame] = deque()
        self.more = asyncio.Event()


class Connection:
    """One socket of one agent."""

    def __init__(self, hub: Hub, socket: WebSocket, codec: Codec, named: str | None) -> None:
        self._hub = hub
        self._socket = socket
        self._codec = codec
        self._named = named
        self._session = HubSession(time.monotonic())
        self._wake = asyncio.Event()
        # The control lane is stored ahead of what came before it, and so it is answered apart.
        self._control = Pending()
        self._others = Pending()
        self._room = asyncio.Semaphore(UNCOMMITTED)
        self.agent_id = ""
        self.pair = (0, 0)
        self.ended = False

    def __repr__(self) -> str:
        waiting = len(self._control.frames) + len(self._others.frames)
        return f"<Connection {self.agent_id or 'unknown agent'} {self._session!r}, {waiting} uncommitted>"

    # Line

    def say(self, message: Desired | Command) -> None:
        """Send soon."""
        if isinstance(message, Desired) and self._session.refuses(message.job_id):
            # Refused before it was submitted here again. A refusal holds as long as its connection.
            self.close(
                Close.DRAIN, f"job {message.job_id} is known here again: dial, and its streams are taken"
            )
            return
        self._session.say(message)
        self._wake.set()

    def leave(self, reason: str) -> None:
        """Tell the agent that the hub goes away, and close."""
        self._session.say(Goaway(reason, DRAIN_RETRY_S))
        self.close(Close.DRAIN, reason)

    def close(self, code: int, reason: str) -> None:
        """Close with a reason the agent can act on."""
        self._session.close(code, reason)
        self._wake.set()

    # Its tasks

    async def run(self) -> None:
        try:
            async with anyio.create_task_group() as group:

                async def part(task: Callable[[], Awaitable[None]]) -> None:
                    with suppress(WebSocketDisconnect, OSError):
                        await task()
                    group.cancel_scope.cancel()

                settle_control = partial(self._settle, self._control)
                settle_others = partial(self._settle, self._others)
                for task in (self._read, self._write, settle_control, settle_others, self._watch):
                    group.start_soon(part, task)
        finally:
            with anyio.CancelScope(shield=True):
                await self._parted()

    async def _read(self) -> None:
        while self._session.closing is None:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("bytes")
            try:
                frame = self._codec.decode_agent(data if data is not None else message["text"])
            except BadMessage as error:
                log.warning("%s sent a frame that cannot be read: %s", self.agent_id or "an agent", error)
                self.close(Close.MALFORMED, str(error))
                break
            try:
                for news in self._session.receive(frame, time.monotonic()):
                    await self._act(news)
            except OverflowError as error:
                self.close(Close.MALFORMED, f"{TOO_LARGE}: {error}")
                break
            self._wake.set()
        # The closing frame is the writer's; it ends the group.
        await anyio.sleep(CLOSE_WITHIN)

    async def _act(self, news: Any) -> None:
        match news:
            case Greeted():
                await self._greeted(news)
            case Opened(key=key):
                try:
                    self._session.position(key, await self._position(key))
                except StreamRefused as refused:
                    self._session.position(key, 0)
                    self._session.refuse(key, str(refused))
            case Apply(key=key, lo=lo, records=records):
                await self._queue(
                    key,
                    lambda db: ingest.apply(
                        db, self.agent_id, key, lo, records, self._codec, self._hub.clock()
                    ),
                    len(records),
                )
            case Buried(key=key, lo=lo, hi=hi, reason=reason):
                await self._queue(
                    key,
                    lambda db: ingest.bury(db, self.agent_id, key, lo, hi, reason, self._hub.clock()),
                )
            case Left(reason=reason, until=until):
                await self._hub.store.write(
                    lambda db: parted(db, self.agent_id, self._hub.clock(), reason, until), behind=True
                )
                self._hub.feed.tell(AGENTS)

    async def _position(self, key: Key) -> int:
        def look(db: Any) -> int:
            ingest.owned(db, self.agent_id, key.scope)
            return ingest.position(db, self.agent_id, key)

        return await self._hub.store.write(look, behind=True)

    async def _queue(self, key: Key, op: Callable[[Any], ingest.Applied], records: int = 1) -> None:
        await self._room.acquire()
        urgent = key.lane == Lane.CONTROL
        pending = self._control if urgent else self._others
        pending.frames.append((key, self._hub.store.submit(op, behind=not urgent, records=records)))
        pending.more.set()

    async def _greeted(self, news: Greeted) -> None:
        hello = news.hello
        if self._named is not None and self._named != hello.agent_id:
            self.close(Close.MALFORMED, f"{HEADER_AGENT} says {self._named}, HELLO says {hello.agent_id}")
            return
        current = self._hub.lines.get(hello.agent_id)
        now = self._hub.clock()
        keys = [Key(head.epoch, head.scope, head.lane) for head in hello.streams]
        answer: Greeting = await self._hub.store.write(
            lambda db: greet(db, hello, keys, now, connected=current is not None), behind=True
        )
        if answer.refused is not None:
            self.close(*answer.refused)
            return
        self.agent_id = hello.agent_id
        self.pair = (hello.boot, hello.attempt)
        # Another dial may have been greeted while this one waited for the store.
        rival = self._hub.lines.get(self.agent_id)
        if isinstance(rival, Connection):
            if rival.pair >= self.pair:
                self.close(Close.STALE, f"boot {rival.pair[0]} attempt {rival.pair[1]} has taken over")
                return
            rival.ended = True
            rival.close(Close.STALE, f"boot {hello.boot} attempt {hello.attempt} has taken over")
        self._hub.lines[self.agent_id] = self
        self._session.welcome(secrets.token_hex(8), answer.acks, now)
        for key, reason in answer.closed.items():
            self._session.refuse(key, reason)
        for message in answer.desired:
            self._session.say(message)
        for command in answer.commands:
            self._session.say(command)
        log.info("%s is connected from %s", self.agent_id, hello.machine.hostname)
        self._hub.feed.tell(AGENTS)
        await self._hub.place()

    async def _settle(self, pending: "Pending") -> None:
        """Acknowledge what is durable, in order."""
        frames = pending.frames
        while True:
            await pending.more.wait()
            pending.more.clear()
            while frames:
                key, future = frames[0]
                try:
                    # Shielded: a connection that ends here leaves the rest to `_parted`.
                    applied = await asyncio.shield(future)
                    frames.popleft()
                except StreamRefused as refused:
                    frames.popleft()
                    self._session.refuse(key, str(refused))
                except ingest.Gap as gap:
                    frames.popleft()
                    self.close(Close.GAP, f"records after {gap.ack} are missing")
                except OverflowError as error:
                    frames.popleft()
                    self.close(Close.MALFORMED, f"{TOO_LARGE}: {error}")
                except StoreFailed as failed:
                    frames.popleft()
                    log.error("%s", failed)
                    self.close(1013, "the hub cannot store anything now; keep it and dial again")
                else:
                    self._session.committed(key, applied.ack)
                    await self._hub.stored(applied)
                finally:
                    self._room.release()
                self._wake.set()

    async def _write(self) -> None:
        while True:
            self._wake.clear()
            for message in self._session.outgoing(time.monotonic()):
                data = self._codec.encode(message)
                if self._codec.as_json:
                    await self._socket.send_text(data.decode())
                else:
                    await self._socket.send_bytes(data)
            closing = self._session.closing
            if closing is not None:
                code = closing.code if closing.code != 1006 else 1001
                await self._socket.close(code, _short(closing.reason))
                return
            await self._wake.wait()

    async def _watch(self) -> None:
        """Notice silence, and a peer that does not take what is sent."""
        while self._session.closing is None:
            due = self._session.tick(time.monotonic())
            await anyio.sleep(max(0.05, due - time.monotonic()))
        self._wake.set()
        await anyio.sleep(CLOSE_WITHIN)

    async def _parted(self) -> None:
        if self._hub.lines.get(self.agent_id) is self:
            del self._hub.lines[self.agent_id]
            agent_id = self.agent_id
            try:
                await self._hub.store.write(lambda db: parted(db, agent_id, self._hub.clock()), behind=True)
            except StoreFailed as failed:
                log.error("%s", failed)
            log.info("%s has left: %s", agent_id, self._session.closing or "the connection ended")
            self._hub.feed.tell(AGENTS)
        # What was received is stored all the same, and the pages hear of it.
        for frames in (self._control.frames, self._others.frames):
            await self._spread(frames)

    async def _spread(self, frames: deque["Frame"]) -> None:
        while frames:
            _, future = frames.popleft()
            try:
                await self._hub.stored(await future)
            except (StreamRefused, ingest.Gap, StoreFailed, OverflowError) as error:
                log.info("after %s had left: %s", self.agent_id, error)
            except Exception:
                # An edge: whatever one frame comes to (a row that cannot be read), the pages hear of those behind
                # it, and a job that waits gets the place of one that has ended.
                log.exception(
                    "after %s had left, a frame of it broke in a way that nobody foresaw", self.agent_id
                )


def _short(reason: str) -> str:
    """Cut a reason to what a closing frame holds."""
    return reason.encode()[:120].decode(errors="ignore")
