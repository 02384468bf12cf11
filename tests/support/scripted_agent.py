"""A small real agent: the session core over a real WebSocket, with its records in memory."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from protocol.codec import Codec, encode_record
from protocol.fields import MAX_FRAME
from protocol.messages import (
    CONNECT_PATH,
    SUBPROTOCOL_MSGPACK,
    Command,
    Desired,
    Goaway,
    Hello,
    JobSeen,
    Lane,
    Machine,
    StreamHead,
)
from protocol.records import AnyRecord, Figures, LogChunk, Point
from protocol.rest import HEADER_AGENT
from protocol.session import Acked, AgentSession, Dropped, Key, Welcomed

DEADLINE = 20.0
"""Seconds after which a wait in a test is a failure."""


def machine(hostname: str = "box", methods: tuple[str, ...] = ("sft", "cpt"), at_once: int = 1) -> Machine:
    """Return a plain machine without a GPU."""
    return Machine(
        hostname=hostname,
        platform="linux",
        os="Linux 6",
        python="3.11",
        version="0.0-test",
        cpu="cpu",
        cpu_cores=2,
        ram_gb=4.0,
        disk_total_gb=10.0,
        disk_free_gb=5.0,
        gpus=[],
        methods=list(methods),
        max_concurrent_jobs=at_once,
    )


def lane_of(record: AnyRecord) -> Lane:
    """Return the lane a record travels on."""
    if isinstance(record, Point | Figures):
        return Lane.METRICS
    return Lane.LOGS if isinstance(record, LogChunk) else Lane.CONTROL


class ScriptedAgent:
    """Says what a test tells it to, resends what was not acknowledged, and keeps what it was told."""

    def __init__(
        self,
        url: str,
        key: str,
        agent_id: str = "agent_0123456789abcdef",
        *,
        install_id: str = "install-1",
        subprotocol: str = SUBPROTOCOL_MSGPACK,
        box: Machine | None = None,
    ) -> None:
        self.url = url.replace("http", "ws", 1) + CONNECT_PATH
        self.key = key
        self.agent_id = agent_id
        self.install_id = install_id
        self.subprotocol = subprotocol
        self.machine = box or machine()
        self.boot = 1
        self.attempt = 0
        self.epoch = random.getrandbits(63)
        self.records: dict[Key, list[bytes]] = {}
        self.ackeds: dict[Key, int] = {}
        self.desired: dict[str, Desired] = {}
        self.commands: list[Command] = []
        self.dropped: dict[Key, str] = {}
        self.goaways: list[Goaway] = []
        self.jobs: list[JobSeen] = []
        self.session: AgentSession | None = None
        self.socket: ClientConnection | None = None
        self.closed: tuple[int, str] | None = None
        self._changed = asyncio.Event()
        self._wake = asyncio.Event()

    def reborn(self) -> None:
        """Start again as after a restart of the program: a higher boot, a new epoch, records kept."""
        self.boot += 1
        self.attempt = 0
        self.epoch = random.getrandbits(63)

    def add(self, record: AnyRecord, scope: str = "") -> None:
        """Append a record to its stream."""
        self.add_body(encode_record(record), scope, lane_of(record))

    def add_body(self, body: bytes, scope: str, lane: int) -> None:
        """Append a record that is already MessagePack."""
        self.records.setdefault(Key(self.epoch, scope, lane), []).append(body)
        self._wake.set()

    def hello(self) -> Hello:
        """Return the first frame of the next dial."""
        self.attempt += 1
        heads = [
            StreamHead(sid, key.epoch, key.scope, key.lane, self.ackeds.get(key, 0) + 1, len(bodies))
            for sid, (key, bodies) in enumerate(self.records.items(), 1)
        ]
        return Hello(
            self.agent_id,
            self.install_id,
            self.boot,
            self.attempt,
            self.epoch,
            self.machine,
            heads,
            self.jobs,
        )

    def dial(self, **options: Any) -> connect:
        """Return the dial of a bare socket with this agent's headers."""
        headers = {"Authorization": f"Bearer {self.key}", HEADER_AGENT: self.agent_id}
        settings: dict[str, Any] = {
            "subprotocols": [Subprotocol(self.subprotocol)],
            "additional_headers": headers,
            "compression": None,
            "max_size": MAX_FRAME,
            "proxy": None,
            "close_timeout": 1,
            "ping_interval": None,
        }
        return connect(self.url, **(settings | options))

    @asynccontextmanager
    async def connected(self, welcomed: bool = True) -> AsyncIterator["ScriptedAgent"]:
        """Dial and converse while the context is open."""
        self.closed = None
        async with self.dial() as socket:
            self.socket = socket
            self.session = AgentSession(self.hello(), time.monotonic())
            codec = Codec(self.subprotocol)
            tasks = [
                asyncio.create_task(part(socket, codec, self.session)) for part in (self._read, self._write)
            ]
            try:
                if welcomed:
                    await self.until(lambda: self.session is not None and self.session.welcome is not None)
                yield self
            finally:
                for task in tasks:
                    task.cancel()
                    with suppress(asyncio.CancelledError, ConnectionClosed):
                        await task
                self.session = self.socket = None

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait until ``true`` of what was heard."""
        async with asyncio.timeout(DEADLINE):
            while not true():
                if self.closed is not None:
                    raise ConnectionError(f"closed with {self.closed}")
                self._changed.clear()
                await self._changed.wait()

    async def until_closed(self) -> tuple[int, str]:
        """Return the close code and reason."""
        async with asyncio.timeout(DEADLINE):
            while self.closed is None:
                self._changed.clear()
                await self._changed.wait()
        return self.closed

    async def until_acked(self) -> None:
        """Wait until the hub has acknowledged everything."""
        await self.until(
            lambda: all(
                self.ackeds.get(key, 0) == len(bodies) or key in self.dropped
                for key, bodies in self.records.items()
            )
        )

    async def until_wanted(self, job_id: str, want: str = "run", version: int = 0) -> Desired:
        """Return what the hub wants of a job, once it wants that."""
        await self.until(
            lambda: (
                job_id in self.desired
                and self.desired[job_id].want == want
                and self.desired[job_id].version >= version
            )
        )
        return self.desired[job_id]

    async def _read(self, socket: ClientConnection, codec: Codec, session: AgentSession) -> None:
        try:
            while True:
                for news in session.receive(codec.decode_hub(await socket.recv()), time.monotonic()):
                    match news:
                        case Acked(key=key, seq=seq):
                            self.ackeds[key] = seq
                        case Desired(job_id=job_id):
                            self.desired[job_id] = news
                        case Command():
                            self.commands.append(news)
                        case Dropped(key=key, reason=reason):
                            self.dropped[key] = reason
                        case Goaway():
                            self.goaways.append(news)
                        case Welcomed():
                            pass
                self._changed.set()
                self._wake.set()
        except ConnectionClosed as closed:
            self.closed = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
            self._changed.set()

    async def _write(self, socket: ClientConnection, codec: Codec, session: AgentSession) -> None:
        with suppress(ConnectionClosed):
            while True:
                self._wake.clear()
                for key, bodies in self.records.items():
                    if key not in self.dropped:
                        session.appended(key, len(bodies))
                while (wish := session.next_read()) is not None:
                    key, after, size = wish
                    session.send(key, after + 1, self._take(codec, key, after, size))
                    await self._flush(socket, codec, session)
                due = session.tick(time.monotonic())
                await self._flush(socket, codec, session)
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.01, due - time.monotonic())):
                        await self._wake.wait()

    def _take(self, codec: Codec, key: Key, after: int, size: int) -> list[bytes]:
        taken: list[bytes] = []
        for body in self.records[key][after : after + 4096]:
            size -= codec.length(body)
            if size < 0 and taken:
                break
            taken.append(body)
        return taken

    async def _flush(self, socket: ClientConnection, codec: Codec, session: AgentSession) -> None:
        for message in session.outgoing(time.monotonic()):
            data = codec.encode(message)
            await socket.send(data.decode() if codec.as_json else data)
