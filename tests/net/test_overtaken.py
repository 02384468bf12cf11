"""An agent whose disk was restored counts on from what the backend knows; two copies of one do not fight."""

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

import agent.net.websocket
from agent.core.ports import Uplink
from agent.net.retry import backoff, owner
from agent.net.websocket import Link
from agent.uplink import JournalUplink
from protocol.messages import Machine
from tests.hub.support import HubProcess
from tests.net.backend import DEADLINE, Records, running
from tests.support.desks import desk_in
from tests.support.scripted_agent import machine

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubProcess]:
    monkeypatch.setattr(agent.net.websocket, "backoff", lambda: backoff(0.05, 0.2))
    with HubProcess(tmp_path / "hub", "--no-page") as process:
        yield process


class Watched:
    """A link, and how often it came to what."""

    def __init__(self, hub: HubProcess, uplink: Uplink) -> None:
        self.states: list[tuple[str, str]] = []
        self._changed = anyio.Event()
        self.link = Link(
            uplink,
            backend_url=hub.url,
            key=lambda: hub.key,
            agent_id="agent_0123456789abcdef",
            heartbeat=15.0,
            on_state=self._note,
            user_agent="test/1",
        )

    def _note(self, state: str, detail: str) -> None:
        self.states.append((state, detail))
        self._changed.set()

    def count(self, what: str) -> int:
        return sum(what in f"{state}: {detail}" for state, detail in self.states)

    async def until(self, what: str, times: int = 1) -> None:
        with anyio.fail_after(DEADLINE):
            while self.count(what) < times:
                self._changed = anyio.Event()
                await self._changed.wait()


async def as_box() -> Machine:
    return machine()


async def no_log(job_id: str, offset: int) -> None:
    raise AssertionError("nobody asked for a log")


async def test_an_agent_on_a_restored_disk_counts_on(tmp_path: Path, hub: HubProcess) -> None:
    before = Records()
    before.boot = 9
    first = Watched(hub, before)
    async with running(first.link):
        await first.until("connected:")
    async with desk_in(tmp_path) as desk:
        uplink = JournalUplink(
            desk,
            agent_id="agent_0123456789abcdef",
            install_id="i",
            boot=3,
            machine=as_box,
            send_log=no_log,
            keep_secret=lambda secret: None,
        )
        restored = Watched(hub, uplink)
        async with running(restored.link):
            await restored.until("connected:")
        assert restored.count("boot 9 attempt 1 has taken over") == 1
        assert (await uplink.hello()).boot == 10
        # And the next start does not begin below it.
        assert await desk.ledger.journal.write(lambda tx: tx.next_boot()) == 11
        # What a late dial of its own is told moves nothing.
        await uplink.outrun(10, 1)
        assert (await uplink.hello()).boot == 10


async def test_of_two_copies_the_later_has_the_id(hub: HubProcess) -> None:
    one, other = Watched(hub, Records()), Watched(hub, Records())
    async with running(one.link):
        await one.until("connected:")
        async with running(other.link):
            await other.until("connected:")
            # The first was told, dials again, and takes nothing back.
            await one.until("has taken over", 4)
            assert (one.count("connected:"), other.count("connected:")) == (1, 1)


@pytest.mark.parametrize(
    ("reason", "pair"),
    [
        ("boot 7 attempt 41 has taken over this agent's id", (7, 41)),
        ("stale: boot 7 attempt 41", (7, 41)),
        ("busy", None),
        ("boot -7 attempt 41", None),
        (f"boot {10**16} attempt 1", None),
    ],
)
async def test_the_pair_is_read_out_of_the_reason(reason: str, pair: tuple[int, int] | None) -> None:
    assert owner(reason) == pair
