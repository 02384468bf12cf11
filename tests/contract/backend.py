"""What the scenarios need of a backend: its socket, frame by frame, and the REST routes of a user."""

import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
import httpx
import msgspec
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from protocol.codec import Codec, encode_record
from protocol.fields import MAX_FRAME
from protocol.messages import (
    CONNECT_PATH,
    SUBPROTOCOL_MSGPACK,
    Ack,
    AgentMessage,
    Close,
    Command,
    Data,
    Hello,
    JobSeen,
    StreamHead,
    Welcome,
)
from protocol.records import AnyRecord, Point, Schema
from protocol.rest import CLAIM, HEADER_AGENT, HEADER_RANGE, HEADER_STREAM, JOB, JOBS, POLL, RECORDS
from tests.support.scripted_agent import machine

DEADLINE = 20.0
"""Seconds in which a backend must have done what is asked of it."""
CONFIG: dict[str, Any] = {"model": {"name": "tiny"}, "training": {"method": "sft", "max_steps": 4}}
NAMES = ["train_loss", "learning_rate"]

T = TypeVar("T")


@dataclass
class Someone:
    """An agent; each scenario has its own."""

    agent_id: str = field(default_factory=lambda: f"agent_{secrets.token_hex(8)}")
    install_id: str = "install-1"
    boot: int = 1
    attempt: int = 0
    epoch: int = field(default_factory=lambda: secrets.randbits(63))

    def hello(self, *streams: StreamHead, jobs: tuple[JobSeen, ...] = ()) -> Hello:
        """Return the HELLO of the next dial."""
        self.attempt += 1
        return Hello(
            self.agent_id,
            self.install_id,
            self.boot,
            self.attempt,
            self.epoch,
            machine(at_once=8),
            list(streams),
            list(jobs),
        )

    def head(self, sid: int, scope: str = "", lane: int = 0, last: int = 0) -> StreamHead:
        """Return a stream of this start of the agent."""
        return StreamHead(sid, self.epoch, scope, lane, 1, last)


@dataclass(frozen=True)
class Job:
    """A job that was submitted."""

    id: str
    token: str

    def path(self, tail: str) -> str:
        return f"{JOB.format(job_id=self.id)}/{tail}"


class Line:
    """One connection, frame by frame."""

    def __init__(self, socket: ClientConnection, codec: Codec) -> None:
        self.socket = socket
        self.codec = codec
        self.heard: list[Any] = []
        """Everything that came, in order."""
        self._taken = 0

    async def say(self, *messages: AgentMessage | list[Any] | bytes) -> None:
        """Send frames: messages, trees of them, or bytes as they are."""
        for message in messages:
            if isinstance(message, list):
                encode = msgspec.json.encode if self.codec.as_json else msgspec.msgpack.encode
                data = encode(message)
            else:
                data = message if isinstance(message, bytes) else self.codec.encode(message)
            await self.socket.send(data.decode() if self.codec.as_json else data)

    async def data(self, sid: int, lo: int, *records: AnyRecord) -> None:
        """Send records, ``lo`` the number of the first."""
        await self.say(Data(sid, lo, [msgspec.Raw(encode_record(record)) for record in records]))

    async def hear(self, kind: type[T], such: Callable[[T], bool] = lambda _: True) -> T:
        """Return the next message of a kind; what comes before it is kept in ``heard``."""
        with anyio.fail_after(DEADLINE):
            while True:
                while self._taken < len(self.heard):
                    message = self.heard[self._taken]
                    self._taken += 1
                    if isinstance(message, kind) and such(message):
                        return message
                frame = await self.socket.recv()
                assert len(frame if isinstance(frame, bytes) else frame.encode()) <= MAX_FRAME
                self.heard.append(self.codec.decode_hub(frame))

    async def acked(self, sid: int, seq: int) -> Ack:
        """Wait until a stream is acknowledged up to ``seq``; no acknowledgement may go beyond that."""

        def there(ack: Ack) -> bool:
            numbers = [one.seq for one in ack.acks if one.sid == sid]
            assert all(number <= seq for number in numbers), (
                f"{numbers} acknowledged, {seq} was the last sent"
            )
            return seq in numbers

        return await self.hear(Ack, there)

    async def closed(self) -> tuple[int, str]:
        """Return the close code and reason once the backend has closed."""
        try:
            await self.hear(Line)  # which no backend says
        except ConnectionClosed as closed:
            code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
        if 4000 <= code <= 4999:
            assert code in set(Close), f"{code} is not in the table of close codes"
            assert reason, f"{code} comes without a reason"
        return code, reason

    async def stays(self, seconds: float) -> None:
        """Check that the backend does not close for so long, although nothing is said."""
        try:
            with anyio.move_on_after(seconds):
                while True:
                    self.heard.append(self.codec.decode_hub(await self.socket.recv()))
        except ConnectionClosed as closed:
            raise AssertionError(f"closed after less than {seconds:g} s: {closed}") from None

    async def lives(self) -> None:
        """Check that the connection is open and answered."""
        from protocol.messages import Heartbeat, HeartbeatAck

        nonce = secrets.randbits(40)
        await self.say(Heartbeat(nonce))
        await self.hear(HeartbeatAck, lambda beat: beat.nonce == nonce)


class Backend:
    """The backend under test."""

    def __init__(self, url: str, key: str, restart: Callable[[str], None] | None) -> None:
        self.url = url
        self.key = key
        self._restart = restart
        self._made: list[Job] = []
        self.http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30, trust_env=False
        )

    def __enter__(self) -> "Backend":
        return self

    def __exit__(self, *exc: object) -> None:
        self.http.close()

    def restart(self, how: str) -> None:
        """End it by `kill` or `stop` and start it again; skip the scenario where nobody said how."""
        if self._restart is None:
            pytest.skip("set AGENT_TEST_RESTART to a command that restarts the backend")
        self._restart(how)

    # The socket

    def dial(
        self, agent: Someone, subprotocols: tuple[str, ...] = (SUBPROTOCOL_MSGPACK,), **options: Any
    ) -> connect:
        """Return the dial of a socket."""
        settings: dict[str, Any] = {
            "subprotocols": [Subprotocol(name) for name in subprotocols] or None,
            "additional_headers": {"Authorization": f"Bearer {self.key}", HEADER_AGENT: agent.agent_id},
            "compression": None,
            "max_size": None,
            "proxy": None,
            "close_timeout": 1,
            "ping_interval": None,
        }
        address = self.url.replace("http", "ws", 1) + CONNECT_PATH + options.pop("query", "")
        return connect(address, **(settings | options))

    @asynccontextmanager
    async def line(self, agent: Someone, subprotocol: str = SUBPROTOCOL_MSGPACK) -> AsyncIterator[Line]:
        """Open a socket, and say nothing."""
        async with self.dial(agent, (subprotocol,)) as socket:
            yield Line(socket, Codec(subprotocol))

    @asynccontextmanager
    async def greeted(
        self,
        agent: Someone,
        *streams: StreamHead,
        jobs: tuple[JobSeen, ...] = (),
        subprotocol: str = SUBPROTOCOL_MSGPACK,
    ) -> AsyncIterator[tuple[Line, dict[int, int]]]:
        """Open a socket and say HELLO; yield it with the positions that WELCOME says."""
        async with self.line(agent, subprotocol) as line:
            await line.say(agent.hello(*streams, jobs=jobs))
            welcome = await line.hear(Welcome)
            yield line, {ack.sid: ack.seq for ack in welcome.acks}

    # What a user does

    def submit(self, **fields: Any) -> Job:
        """Submit a job."""
        body = {"config": CONFIG, "dataset_path": "data.jsonl", "status": "pending", **fields}
        body.setdefault("job_id", secrets.token_hex(16))
        answer = self.http.post(JOBS, json=body)
        assert answer.status_code == 200, answer.text
        return Job(answer.json()["job_id"], answer.json()["job_token"])

    def claim(self, agent: Someone, job_id: str) -> httpx.Response:
        """Claim a job in an agent's name."""
        return self.http.post(CLAIM.format(job_id=job_id), headers={HEADER_AGENT: agent.agent_id})

    def job_of(self, agent: Someone, **fields: Any) -> Job:
        """Submit a job and give it to this agent."""
        job = self.submit(**fields)
        answer = self.claim(agent, job.id)
        assert answer.status_code == 200, answer.text
        return job

    def control(self, job: Job, action: str) -> None:
        answer = self.http.post(job.path("control"), json={"action": action})
        assert answer.status_code == 200, answer.text

    def curve(self, job: Job) -> list[dict[str, Any]]:
        return list(self._get(job.path("metrics"))["metrics"])

    def steps(self, job: Job) -> list[int]:
        """Return the steps of the curve as they are shown: a doubled one is there twice."""
        return [point["step"] for point in self.curve(job)]

    def logs(self, job: Job) -> list[str]:
        return list(self._get(f"{job.path('logs')}?limit=1000&offset=0")["logs"])

    def status(self, job: Job) -> dict[str, Any]:
        return self._get(job.path("status"))

    def _get(self, path: str) -> dict[str, Any]:
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    # What an agent without a socket does

    def append(
        self,
        job: Job,
        lane: int,
        epoch: int,
        lo: int,
        *records: AnyRecord,
        token: str | None = None,
        hi: int | None = None,
        **more: str,
    ) -> httpx.Response:
        """Append records by REST, with ``more`` headers."""
        method, tail = (("PATCH", "status"), ("PUT", "metrics"), ("POST", "logs"))[lane]
        key = job.token if token is None else token
        return self._numbered(method, job.path(tail), key, f"{epoch}/{lane}", lo, records, hi, more)

    def append_own(
        self, agent: Someone, lo: int, *records: AnyRecord, key: str | None = None
    ) -> httpx.Response:
        """Append records of lane 0 of the agent's own stream."""
        stream, named = f"{agent.epoch}/0", {HEADER_AGENT: agent.agent_id}
        return self._numbered("POST", RECORDS, key or self.key, stream, lo, records, None, named)

    def _numbered(
        self,
        method: str,
        path: str,
        token: str,
        stream: str,
        lo: int,
        records: tuple[AnyRecord, ...],
        hi: int | None,
        more: dict[str, str],
    ) -> httpx.Response:
        headers = {
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/msgpack",
            HEADER_STREAM: stream,
            HEADER_RANGE: f"{lo}-{lo + len(records) - 1 if hi is None else hi}",
            **more,
        }
        body = msgspec.msgpack.encode([msgspec.Raw(encode_record(record)) for record in records])
        return self.http.request(method, path, content=body, headers=headers)

    def commands(self, agent: Someone) -> list[Command]:
        """Poll, and return the commands that come along."""
        answer = self.http.get(POLL, headers={HEADER_AGENT: agent.agent_id})
        assert answer.status_code == 200, answer.text
        return msgspec.convert(answer.json()["commands"], list[Command])


def schema() -> Schema:
    """Return the names of the points that `points` makes."""
    return Schema(1, NAMES)


def points(*steps: int, attempt: int = 1, loss: float = 1.0) -> list[Point]:
    """Return points of the curve."""
    now = time.time()
    return [Point(now, attempt, step, step / 10, 1, [loss, 1e-4]) for step in steps]
