"""A backend on loopback: the session core behind a real WebSocket server, and an agent's records in memory."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.abc
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from agent.net.websocket import Link
from protocol.codec import Codec, encode_record
from protocol.fields import MAX_FRAME
from protocol.messages import CONNECT_PATH, SUBPROTOCOLS, Command, Desired, Hello, StreamHead, Welcome
from protocol.records import AnyRecord, Notice
from protocol.session import Apply, Buried, Greeted, HubSession, Key, Left, Opened
from tests.protocol.golden import MACHINE

KEY = "wak_test"
EPOCH = 7
CONTROL, METRICS, LOGS = (Key(EPOCH, "job", lane) for lane in range(3))
DEADLINE = 10.0
"""Seconds after which a wait in a test is a failure."""


class Records:
    """The agent's side of the link (`agent.core.ports.Uplink`), without a disk."""

    def __init__(self) -> None:
        self.rows: dict[Key, list[bytes | None]] = {}
        self.at: dict[Key, int] = {}
        """What is acknowledged, and deleted."""
        self.link: Link | None = None
        self.wishes: list[Desired] = []
        self.commands: list[Command] = []
        self.refused: list[tuple[Key, str]] = []
        self.lost: list[tuple[Key, str]] = []
        self.boot = 1
        self.dials = 0
        self.connected = False
        self.on_change: Callable[[], None] = lambda: None
        self.gate = anyio.Event()
        """Until this is set nothing that is acknowledged can be deleted."""
        self.gate.set()
        self.acks = 0
        self.named = True
        """Whether HELLO names the streams."""

    def add(self, key: Key, *records: AnyRecord | bytes | None) -> None:
        """Append records; None is one that cannot be read any more."""
        rows = self.rows.setdefault(key, [])
        self.at.setdefault(key, 0)
        rows.extend(one if one is None or isinstance(one, bytes) else encode_record(one) for one in records)
        if self.link is not None:
            self.link.wake()

    def say(self, key: Key, *texts: str) -> None:
        """Append notices."""
        self.add(key, *(Notice(0.0, "info", text) for text in texts))

    async def hello(self) -> Hello:
        assert not self.connected, "the uplink was not told that the connection before is over"
        self.connected = True
        self.dials += 1
        heads = [
            StreamHead(sid, key.epoch, key.scope, key.lane, self.at[key] + 1, len(rows))
            for sid, (key, rows) in enumerate(self.rows.items(), start=1)
        ]
        return Hello(
            "agent_0123456789abcdef", "i", self.boot, self.dials, EPOCH, MACHINE, heads if self.named else []
        )

    async def outrun(self, boot: int, attempt: int) -> None:
        self.boot = boot + 1

    async def read(self, key: Key, after: int, max_bytes: int) -> list[tuple[int, bytes | None]]:
        await anyio.lowlevel.checkpoint()
        found: list[tuple[int, bytes | None]] = []
        size = 0
        begin = max(after, self.at[key])
        for number, body in enumerate(self.rows[key][begin : begin + 2048], start=begin + 1):
            size += len(body or b"")
            if found and size > max_bytes:
                break
            found.append((number, body))
        return found

    def heads(self) -> Mapping[Key, int]:
        return {key: len(rows) for key, rows in self.rows.items()}

    def backlog(self) -> list[int]:
        return [
            sum(len(rows) - self.at[key] for key, rows in self.rows.items() if key.lane == lane)
            for lane in range(3)
        ]

    async def acked(self, key: Key, seq: int) -> None:
        await self.gate.wait()
        self.acks += 1
        self.at[key] = max(seq, self.at[key])
        self.on_change()

    async def dropped(self, key: Key, reason: str) -> None:
        self.refused.append((key, reason))
        self.rows.pop(key)
        self.on_change()

    def ended(self) -> None:
        assert self.connected
        self.connected = False

    async def buried(self, key: Key, reason: str) -> None:
        self.lost.append((key, reason))

    async def welcomed(self, server_time: float) -> None:
        pass

    async def desired(self, message: Desired) -> None:
        self.wishes.append(message)
        self.on_change()

    async def commanded(self, message: Command) -> None:
        self.commands.append(message)


class Backend:
    """What the other end has, over all its connections."""

    def __init__(self) -> None:
        self.stored: dict[Key, list[str | None]] = {}
        self.hellos: list[Hello] = []
        self.largest = 0
        self.requests: list[Request] = []
        self.closes: list[tuple[int | None, str | None]] = []
        """How each connection ended, as seen here."""
        self.byes: list[str] = []
        self.port = 0
        self.terms: dict[str, Any] = {}
        """Fields of WELCOME that are not as usual."""
        self.refuse: str = ""
        """A scope whose streams are refused."""
        self.changed = anyio.Event()
        self.socket: ServerConnection | None = None
        self.session: HubSession | None = None
        self.codec: Codec | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def texts(self, key: Key) -> list[str | None]:
        """Return what is stored of a stream."""
        return self.stored.get(key, [])

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to be so."""
        with anyio.fail_after(DEADLINE):
            while not condition():
                self.changed = anyio.Event()
                if not condition():
                    await self.changed.wait()

    async def push(self, message: Any) -> None:
        """Say something to the agent that is connected."""
        assert self.socket is not None
        assert self.session is not None
        self.session.say(message)
        await self._flush()

    async def converse(self, socket: ServerConnection) -> None:
        """Be a good backend on one connection."""
        assert socket.subprotocol is not None
        self.socket, self.codec = socket, Codec(socket.subprotocol)
        self.session = session = HubSession(time.monotonic())
        try:
            while session.closing is None:
                frame = await socket.recv()
                self.largest = max(self.largest, len(frame if isinstance(frame, bytes) else frame.encode()))
                self._take(session, self.codec.decode_agent(frame))
                await self._flush()
        except ConnectionClosed:
            pass
        finally:
            self.closes.append((socket.close_code, socket.close_reason))
            self.changed.set()

    def _take(self, session: HubSession, message: Any) -> None:
        for news in session.receive(message, time.monotonic()):
            match news:
                case Greeted(hello=hello):
                    self.hellos.append(hello)
                    keys = [Key(head.epoch, head.scope, head.lane) for head in hello.streams]
                    session.welcome("s", {key: len(self.texts(key)) for key in keys}, 1.0)
                    for key in keys:
                        self._open(session, key)
                case Opened(key=key):
                    session.position(key, len(self.texts(key)))
                    self._open(session, key)
                case Apply(key=key, records=raws):
                    assert self.codec is not None
                    records = [self.codec.decode_record(raw) for raw in raws]
                    self._store(
                        session, key, [getattr(record, "text", type(record).__name__) for record in records]
                    )
                case Buried(key=key, lo=lo, hi=hi, reason=reason):
                    self._store(session, key, [f"<{reason}>"] * (hi - lo + 1))
                case Left(reason=reason):
                    self.byes.append(reason)

    def _open(self, session: HubSession, key: Key) -> None:
        if self.refuse and key.scope == self.refuse:
            session.refuse(key, "the job was deleted")

    def _store(self, session: HubSession, key: Key, texts: list[Any]) -> None:
        self.stored.setdefault(key, []).extend(texts)
        session.committed(key, len(self.stored[key]))

    async def _flush(self) -> None:
        assert self.socket is not None
        assert self.session is not None
        assert self.codec is not None
        for message in self.session.outgoing(time.monotonic()):
            if isinstance(message, Welcome) and self.terms:
                message = Welcome(
                    **{name: getattr(message, name) for name in Welcome.__struct_fields__} | self.terms
                )
            data = self.codec.encode(message)
            assert len(data) <= MAX_FRAME
            await self.socket.send(data.decode() if self.codec.as_json else data)
        self.changed.set()


Handler = Callable[[ServerConnection], Awaitable[None]]


@asynccontextmanager
async def serving(
    backend: Backend,
    *,
    handler: Handler | None = None,
    answer: Callable[[ServerConnection, Request], Response | None] | None = None,
    subprotocols: tuple[str, ...] | None = SUBPROTOCOLS,
    largest: int = MAX_FRAME,
) -> AsyncIterator[Backend]:
    """Serve ``backend``, with what goes otherwise than usual."""

    def process(socket: ServerConnection, request: Request) -> Response | None:
        backend.requests.append(request)
        backend.changed.set()
        if answer is not None:
            return answer(socket, request)
        assert request.path == CONNECT_PATH
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        return None

    offered = [Subprotocol(name) for name in subprotocols] if subprotocols else None
    async with serve(
        handler or backend.converse,
        "127.0.0.1",
        backend.port,
        process_request=process,
        subprotocols=offered,
        max_size=largest,
        ping_interval=None,
        compression=None,
        close_timeout=1,
    ) as server:
        backend.port = server.sockets[0].getsockname()[1]
        yield backend


def link_to(backend: Backend, records: Records, *, port: int = 0, **more: Any) -> Link:
    """Return a link to ``backend``, which ``records`` wakes."""
    states: list[tuple[str, str]] = []

    def note(state: str, detail: str) -> None:
        states.append((state, detail))
        backend.changed.set()

    options: dict[str, Any] = {
        "heartbeat": 15.0,
        "on_state": note,
        "agent_id": "agent_0123456789abcdef",
    } | more
    link = Link(
        records,
        backend_url=f"http://127.0.0.1:{port or backend.port}",
        key=lambda: KEY,
        user_agent="test/1",
        **options,
    )
    link.states = states  # type: ignore[attr-defined]
    records.link = link
    records.on_change = lambda: backend.changed.set()
    return link


@asynccontextmanager
async def running(link: Link) -> AsyncIterator[anyio.abc.TaskGroup]:
    """Run a link until the block ends."""
    with anyio.fail_after(4 * DEADLINE):
        async with anyio.create_task_group() as group:
            group.start_soon(link.run)
            yield group
            group.cancel_scope.cancel()


@asynccontextmanager
async def connected(**more: Any) -> AsyncIterator[tuple[Backend, Records, Link]]:
    """A link that has been welcomed."""
    backend, records = Backend(), Records()
    async with serving(backend):
        link = link_to(backend, records, **more)
        async with running(link):
            await backend.until(lambda: bool(backend.hellos))
            yield backend, records, link


def is_connected(link: Link) -> bool:
    return link.states[-1:] != [] and link.states[-1][0] == "connected"  # type: ignore[attr-defined]
