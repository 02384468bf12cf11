"""Jobs that a backend did not have for a while, by REST: gone and there again, or submitted anew."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from loguru import logger

from agent.desk import JobDesk
from agent.net.client import RestClient
from agent.net.drain import Drain
from agent.net.platform import PlatformDrain
from agent.net.poll import Poller
from agent.net.rest import HubDrain
from agent.uplink import JournalUplink
from protocol.lifecycle import JobState
from protocol.messages import Lane
from protocol.records import LogChunk, Notice
from tests.hub.support import KEY, HubProcess, logs_of, status_of, submit
from tests.net.kept import AGENT
from tests.protocol.golden import MACHINE
from tests.support.desks import desk_in, job, uplink_of
from tests.support.platform import Platform


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubProcess]:
    with HubProcess(tmp_path_factory.mktemp("hub"), "--no-page") as process:
        yield process


@asynccontextmanager
async def connected(
    folder: Path, url: str, job_id: str, token: str, state: JobState = JobState.RUNNING
) -> AsyncIterator[tuple[JobDesk, JournalUplink, RestClient]]:
    """An agent that has taken a job, and goes on under a token."""
    async with desk_in(folder, job(state, job_id, worker_pid=1, observed=1)) as desk:
        uplink = uplink_of(desk, box=MACHINE)
        await uplink.keep_token(job_id, token)
        rest = RestClient(url, key=lambda: KEY, agent_id=AGENT, user_agent="test", answer_within=5.0)
        try:
            yield desk, uplink, rest
        finally:
            with anyio.CancelScope(shield=True):
                await rest.close()


@asynccontextmanager
async def sending(desk: JobDesk, drain: Drain) -> AsyncIterator[None]:
    drain.aside = (0.02, 0.05)
    drain.hurry()
    desk.ledger.on_append = drain.wake
    async with anyio.create_task_group() as group:
        group.start_soon(drain.run)
        yield
        group.cancel_scope.cancel()


async def delivered(desk: JobDesk) -> None:
    """Wait until nothing is held any more, refused or taken."""
    desk.ledger.drained = anyio.Event()
    if any(records for records, _ in desk.ledger.backlog.values()):
        with anyio.fail_after(30):
            await desk.ledger.drained.wait()


async def say(desk: JobDesk, job_id: str, *numbers: int) -> None:
    for number in numbers:
        await desk.append(job_id, Lane.LOGS, [LogChunk(1.0, 1, 0, [f"line {number}"])])
        await anyio.sleep(0.002)


def test_a_row_that_is_away_for_a_moment_costs_what_is_said_meanwhile_and_no_more(tmp_path: Path) -> None:
    async def test(platform: Platform) -> None:
        job_id = platform.submit({"model": {"name": "m"}}, status="running", agent_id=AGENT)
        token = str(platform.rows[job_id]["job_token"])
        async with (
            connected(tmp_path, platform.url, job_id, token) as (desk, uplink, rest),
            sending(desk, PlatformDrain(rest, uplink, settle=0.0, within=5.0, look_every=2)),
        ):
            await say(desk, job_id, *range(10))
            await delivered(desk)
            row = platform.rows.pop(job_id)
            await say(desk, job_id, *range(10, 20))
            await delivered(desk)
            platform.rows[job_id] = row
            await say(desk, job_id, *range(20, 200))
            await delivered(desk)
        lines = [line for line in platform.log[job_id] if line.startswith("line ")]
        assert lines == [f"line {number}" for number in (*range(10), *range(20, 200))]

    with Platform(rate_limit=10**6) as platform:
        anyio.run(test, platform)


def test_a_stream_that_goes_with_another_ends_no_pass(tmp_path: Path, hub: HubProcess) -> None:
    async def test() -> None:
        async with connected(tmp_path, hub.url, "unknown", "old") as (desk, uplink, rest):
            wrong = list[str]()
            sink = logger.add(wrong.append, level="ERROR")
            drain = HubDrain(rest, uplink)
            async with sending(desk, drain):
                await delivered(desk)
                # One pass is to find both.
                desk.ledger.on_append = lambda: None
                for number in range(5):
                    for scope in ("", "unknown"):
                        await desk.append(scope, Lane.CONTROL, [Notice(1.0, "info", f"{number}")])
                    drain.wake()
                    await delivered(desk)
            logger.remove(sink)
            assert not wrong

    anyio.run(test)


@pytest.mark.parametrize("state", [JobState.RUNNING, JobState.PAUSED, JobState.COMPLETED])
def test_a_job_that_a_hub_lost_goes_on_where_it_is_submitted_again(
    tmp_path: Path, hub: HubProcess, state: JobState
) -> None:
    job_id, other = "lost", "behind"

    async def test() -> None:
        async with connected(tmp_path, hub.url, job_id, "an old token", state) as (desk, uplink, rest):
            with hub.client() as client:
                poller = Poller(rest, uplink, interval=1.0)
                async with sending(desk, HubDrain(rest, uplink)):
                    await delivered(desk)
                    assert submit(client, job_id=job_id)[0] == job_id
                    # A running job leaves no room for another, and is taken up all the same.
                    for _ in range(3):
                        await poller.once()
                    await say(desk, job_id, 1)
                    await delivered(desk)
                    assert status_of(client, job_id)["state"] == state
                    assert logs_of(client, job_id)["logs"][-1] == "line 1"
                    assert "submit it there again under the same id" in desk.job(job_id).notes[0]
                    submit(client, job_id=other)
                    await poller.once()
                    # Nor does it hide those behind it.
                    assert (other in desk.jobs) == (state is not JobState.RUNNING)

    anyio.run(test)


def test_a_token_that_a_hub_refuses_is_asked_for_anew(tmp_path: Path, hub: HubProcess) -> None:
    async def test() -> None:
        async with connected(tmp_path, hub.url, "anew", "an old token") as (desk, uplink, rest):
            with hub.client() as client:
                token = submit(client, job_id="anew")[1]
                # No poll has found it yet.
                async with sending(desk, HubDrain(rest, uplink)):
                    await say(desk, "anew", 1)
                    await delivered(desk)
                assert await uplink.token("anew") == token
                assert status_of(client, "anew")["state"] == "running"
                assert logs_of(client, "anew")["logs"][-1] == "line 1"

    anyio.run(test)
