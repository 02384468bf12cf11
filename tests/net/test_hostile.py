"""A backend that sends what it should not: the link hangs up and dials again, and the agent lives."""

import math
import random
from collections.abc import Sequence
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
from protocol.messages import SUBPROTOCOLS, Command, Desired, Goaway, Hello, HubMessage, Offer, Welcome
from protocol.worker import Parameters
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
NASTY: list[HubMessage] = [
    *(
        Command(f"c{number}", "send_log", "job", 0.0, {"offset": offset})
        for number, offset in enumerate((math.inf, -math.inf, math.nan, 1e308, "x", 2**63))
    ),
    Command("c9", "retry", "no-such-job", math.nan),
    *(
        message
        for job_id in ("/etc/passwd", "../../etc/passwd", "../agent", "a/../../agent")
        for message in (Desired(job_id, 1, "run", Offer("{}")), Command(f"log {job_id}", "send_log", job_id))
    ),
    Command("c10", "send_log", "x" * 256, 0.0, {"offset": -1}),
    *(
        Desired(job_id, 1, "run", Offer(config))
        for job_id, config in (
            ("deep", '{"a":' * 20_000),
            ("null", "null"),
            ("../../etc/passwd", "{}"),
            ("", "{}"),
            ("\x00", "{}"),
            ("x" * 256, '{"model": {"name": "../../x"}, "training": {"max_steps": 1e400}}'),
        )
    ),
    Desired("nobody", 2**62, "cancel", checkpoint="/" * 4096, parameters=Parameters(learning_rate=math.nan)),
]
"""What a decoder takes and the agent's own rules must refuse."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Hostile:
    """Greets, sends frames that a decoder takes but nobody would send, and ends with some that none takes."""

    def __init__(self, seed: int, frames: int, first: Sequence[HubMessage] = ()) -> None:
        print(f"seed {seed}")
        self.rng = random.Random(seed)
        self.frames = frames
        self.first = first
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
                for message in (Welcome("s", []), *self.first):
                    await say(codec.encode(message))
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
    hostile = Hostile(random.getrandbits(32), 120, NASTY)
    backend = Backend()
    async with serving(backend, handler=hostile.converse, answer=lambda socket, request: None):
        program = Agent(tmp_path / "agent", backend.url, BACKEND_TRANSPORT="websocket").start()
        assert program.process is not None
        process = psutil.Process(program.process.pid)
        try:
            await hostile.until(3)
            assert is_alive(process), program.output[-4000:]
            assert process.memory_info().rss < 600 * 1024**2
            assert backend.requests[0].headers["Authorization"] == f"Bearer {KEY}"
        finally:
            code = await anyio.to_thread.run_sync(program.stop)
    assert code == 0, program.output[-4000:]
    assert "Traceback" not in program.output, program.output[-6000:]
