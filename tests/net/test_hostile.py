"""A backend that sends what it should not: the link hangs up and dials again, and the agent lives."""

import random
from pathlib import Path

import anyio
import psutil
import pytest
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

import agent.net.websocket
from agent.net.retry import backoff
from protocol.codec import Codec
from protocol.messages import SUBPROTOCOLS, Goaway, Hello, Welcome
from tests.net.backend import (
    CONTROL,
    LOGS,
    METRICS,
    Backend,
    Records,
    is_connected,
    link_to,
    running,
    serving,
)
from tests.support.fuzz import BY_HUB, Fuzz, tree_of
from tests.support.programs import KEY, Agent

pytestmark = pytest.mark.anyio
TREES = [tree_of(message) for message in BY_HUB]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Hostile:
    """Greets, sends frames that a decoder takes but nobody would send, and ends with some that none takes."""

    def __init__(self, seed: int, frames: int) -> None:
        print(f"seed {seed}")
        self.rng = random.Random(seed)
        self.frames = frames
        self.sent = 0
        self.connections = 0
        self.changed = anyio.Event()

    async def converse(self, socket: ServerConnection) -> None:
        assert socket.subprotocol is not None
        self.connections += 1
        self.changed.set()
        codec = Codec(socket.subprotocol)
        fuzz = Fuzz(self.rng.getrandbits(32), socket.subprotocol)

        async def say(data: bytes) -> None:
            await socket.send(data.decode("utf-8", "replace") if codec.as_json else data)
            self.sent += 1

        try:
            hello = codec.decode_agent(await socket.recv())
            assert isinstance(hello, Hello)
            if self.rng.random() < 0.8:
                await say(codec.encode(Welcome("s", [])))
            for _ in range(self.rng.randrange(self.frames)):
                frame = fuzz.sound(codec, by_hub=True)
                if not isinstance(codec.decode_hub(frame), Goaway):
                    await say(frame)
            await say(fuzz.frame(TREES))
            await say(b"\xc1")
            with anyio.move_on_after(5):
                while True:
                    await socket.recv()
        except ConnectionClosed:
            pass

    async def until(self, connections: int) -> None:
        with anyio.fail_after(60):
            while self.connections < connections:
                self.changed = anyio.Event()
                await self.changed.wait()


@pytest.mark.parametrize("subprotocol", SUBPROTOCOLS, ids=["msgpack", "json"])
async def test_a_link_outlives_a_hostile_backend(subprotocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.net.websocket, "backoff", lambda: backoff(0.001, 0.002))
    hostile = Hostile(random.getrandbits(32), 12)
    backend, records = Backend(), Records()
    for key in (CONTROL, METRICS, LOGS):
        records.say(key, *(f"{key.lane}.{number}" for number in range(20)))
    offered = (Subprotocol(subprotocol),)
    async with serving(backend, handler=hostile.converse, subprotocols=offered):
        link = link_to(backend, records, subprotocols=offered)
        async with running(link):
            await hostile.until(40)
    # The same records and a good backend: nothing of what was said stays behind in the link.
    async with serving(backend), running(link):
        await backend.until(lambda: is_connected(link))
        await backend.until(lambda: all(records.at[key] == len(rows) for key, rows in records.rows.items()))
    assert hostile.sent > 100


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


async def test_an_agent_outlives_a_hostile_backend(tmp_path: Path) -> None:
    hostile = Hostile(random.getrandbits(32), 120)
    backend = Backend()
    async with serving(backend, handler=hostile.converse, answer=lambda socket, request: None):
        program = Agent(tmp_path / "agent", backend.url, BACKEND_TRANSPORT="websocket").start()
        assert program.process is not None
        process = psutil.Process(program.process.pid)
        try:
            await hostile.until(4)
            assert is_alive(process), program.output[-4000:]
            assert process.memory_info().rss < 600 * 1024**2
            assert backend.requests[0].headers["Authorization"] == f"Bearer {KEY}"
        finally:
            code = await anyio.to_thread.run_sync(program.stop)
    assert code == 0, program.output[-4000:]
    assert "Traceback" not in program.output, program.output[-6000:]
