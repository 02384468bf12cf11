"""Noticing a sleep of the machine, by its clocks and over a line that died meanwhile."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio
import pytest

import agent.net.websocket
from agent.core.ports import Uplink
from agent.net.choice import Transport
from agent.net.retry import backoff
from agent.net.sleep import EVERY, Clocks, read_clocks, slept
from agent.net.websocket import Link
from tests.net.backend import Backend, Records, is_connected, link_to, running, serving
from tests.net.kept import AGENT, Kept, client
from tests.support.network import BadNetwork
from tests.support.platform import KEY, Platform

NOW = Clocks(1000.0, 50.0, 60.0)


def later(wall: float = EVERY, steady: float = EVERY, boot: float = EVERY) -> Clocks:
    return Clocks(NOW.wall + wall, NOW.steady + steady, NOW.boot + boot)


@pytest.mark.parametrize(
    ("after", "seconds"),
    [
        (later(), 0.0),
        (later(wall=601, boot=601), 600.0),  # Linux: the steady clock stood still
        (later(wall=601), 600.0),  # a system without a clock that counts a suspend
        (later(wall=61, steady=61, boot=61), 60.0),  # SIGSTOP: every clock went on
        (later(wall=9, steady=9, boot=9), 0.0),  # starved for a moment
        (later(wall=-3600), 0.0),  # set back
        (later(wall=EVERY + 4), 0.0),  # set forward by the time service
        (later(boot=EVERY + 1.5), 0.0),
    ],
)
def test_a_sleep_is_where_a_clock_ran_ahead_or_nobody_looked(after: Clocks, seconds: float) -> None:
    assert slept(NOW, after) == seconds


def test_the_clocks_of_this_machine_say_that_it_is_awake() -> None:
    before = read_clocks()
    assert slept(before, read_clocks()) == 0.0


class Sleeper:
    """The machine's clocks, and a sleep at will: the clock that counts it jumps, the steady one does not."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> Clocks:
        now = read_clocks()
        return replace(now, wall=now.wall + self.seconds, boot=now.boot + self.seconds)


@asynccontextmanager
async def noticing(link: Link) -> AsyncIterator[None]:
    async with running(link) as group:
        group.start_soon(link.notice_sleep)
        yield


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent.net.websocket, "EVERY", 0.05)
    monkeypatch.setattr(agent.net.websocket, "PROBE_WITHIN", 0.3)
    monkeypatch.setattr(agent.net.websocket, "WOKEN_WITHIN", 0.1)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_line_that_died_in_a_sleep_is_left_at_once(soon: None) -> None:
    backend, records, clocks = Backend(), Records(), Sleeper()
    told: list[float] = []

    async def note(seconds: float) -> None:
        told.append(seconds)

    async with serving(backend), BadNetwork("127.0.0.1", backend.port) as net:
        # The silence that is waited for without a sleep is far longer than this test's patience.
        link = link_to(backend, records, port=net.port, clocks=clocks, heartbeat=600.0, on_sleep=note)
        backend.terms = {"heartbeat_s": 600.0}
        async with noticing(link):
            await backend.until(lambda: is_connected(link))
            net.half_open()
            clocks.seconds = 8 * 3600.0
            await backend.until(lambda: "nothing was heard" in link.states[-1][1])  # type: ignore[attr-defined]
            net.heal()
            await backend.until(lambda: len(backend.hellos) == 2 and is_connected(link))
    assert told == [pytest.approx(8 * 3600, abs=5)]


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_line_that_lived_through_a_sleep_is_kept(soon: None) -> None:
    backend, records, clocks = Backend(), Records(), Sleeper()
    async with serving(backend):
        link = link_to(backend, records, clocks=clocks)
        async with noticing(link):
            await backend.until(lambda: is_connected(link))
            clocks.seconds = 60.0
            await anyio.sleep(1.0)
            assert link.dials == 1
            assert backend.session is not None
            assert is_connected(link)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_machine_that_wakes_between_two_dials_dials_at_once(
    soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent.net.websocket, "backoff", lambda: backoff(3600.0, 3600.0))
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    backend, records, clocks = Backend(), Records(), Sleeper()
    async with serving(backend):
        port = backend.port
    link = link_to(backend, records, port=port, clocks=clocks)
    async with noticing(link):
        await backend.until(lambda: any("dialling again" in detail for _, detail in link.states))  # type: ignore[attr-defined]
        backend.port = port
        async with serving(backend):
            clocks.seconds = 7200.0
            await backend.until(lambda: is_connected(link))


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("setting", ["auto", "poll"])
async def test_a_sleep_is_told_also_where_nobody_dials(soon: None, setting: str) -> None:
    told, clocks = list[float](), Sleeper()
    slept_once, by_rest = anyio.Event(), anyio.Event()

    async def note(seconds: float) -> None:
        told.append(seconds)
        slept_once.set()

    with Platform() as platform:

        def link(records: Uplink, on_state: Callable[[str, str], None]) -> Link:
            return Link(
                records,
                backend_url=platform.url,
                key=lambda: KEY,
                agent_id=AGENT,
                heartbeat=15.0,
                on_state=on_state,
                user_agent="test",
                clocks=clocks,
                on_sleep=note,
            )

        made = Transport(
            Kept("none"),
            client(platform),
            setting=setting,
            poll_interval=10.0,
            make_link=link,
            on_state=lambda state, _: by_rest.set() if state == "connected" else None,
        )
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(made.run)
                await by_rest.wait()
                clocks.seconds = 3600.0
                await slept_once.wait()
                group.cancel_scope.cancel()
    assert told == [pytest.approx(3600, abs=5)]
