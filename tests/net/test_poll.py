"""Polls and claims: whose a job is, and that a lost answer costs none."""

import anyio
import pytest

from agent.net.client import RestError
from agent.net.poll import Poller
from tests.net.kept import AGENT, Kept, client
from tests.support.platform import Platform


async def _poll(platform: Platform, store: Kept, times: int = 1) -> list[float]:
    rest = client(platform)
    poller = Poller(rest, store, interval=10.0)
    try:
        return [await poller.once() for _ in range(times)]
    finally:
        await rest.close()


def test_polls_say_who_asks_and_pass_over_what_there_is_no_room_for() -> None:
    with Platform() as platform:
        store = Kept("none")
        platform.poll_seconds = 600
        job = platform.submit({"metadata": {"job_name": "mine"}}, "u/private/d.jsonl.gz")
        store.free = 0
        # However seldom it is told to: after a minute the page would call the agent offline.
        assert anyio.run(_poll, platform, store, 2) == [30.0, 30.0]
        assert platform.agents[AGENT]["platform"] == "linux" and platform.agents[AGENT]["hostname"]
        assert platform.rows[job]["status"] == "pending"
        store.free = 1
        anyio.run(_poll, platform, store)
        (wish,) = store.wishes
        assert wish.offer is not None and (wish.job_id, wish.want, wish.offer.name) == (job, "run", "mine")
        assert wish.offer.job_token == platform.rows[job]["job_token"]


def test_jobs_of_the_cloud_and_of_other_agents_are_left_alone() -> None:
    with Platform() as platform:
        store = Kept("none")
        platform.submit({}, started_at="2026-01-01T00:00:00Z")
        anyio.run(_poll, platform, store, 2)
        assert platform.seen["claim"] == 0 and not store.wishes
    with Platform() as platform:
        job = platform.submit({})
        platform.fault("claim", "500")
        store = Kept("none")
        store.notes["claiming"] = ""

        async def taken() -> None:
            offered = {"id": job, "config": {}}
            platform.rows[job] |= {"agent_id": "agent_other", "status": "running"}
            rest = client(platform)
            await Poller(rest, store, interval=10.0)._consider(offered, hub=True)
            await rest.close()

        platform._faults.clear()
        anyio.run(taken)
        assert platform.seen["claim"] == 1 and not store.wishes and not store.notes["claiming"]


@pytest.mark.parametrize("token", ["kept", "missing"])
def test_a_claim_whose_answer_is_lost_is_ours_also_after_a_crash(token: str) -> None:
    with Platform() as platform:
        store = Kept("none")
        job = platform.submit({"model": {"name": "m"}})
        if token == "missing":
            platform.rows[job]["job_token"] = None
        platform.fault("claim", "lost")

        async def lost() -> None:
            with pytest.raises(RestError, match="no answer"):
                await _poll(platform, store)

        anyio.run(lost)
        assert platform.rows[job]["agent_id"] == AGENT and not store.wishes
        # Nothing but what was noted is left; the jobs route accepts without storing at first.
        platform.fault("jobs", "202")

        async def again() -> None:
            with pytest.raises(RestError, match="did not store"):
                await _poll(platform, store)
            await _poll(platform, store)

        anyio.run(again)
        (wish,) = store.wishes
        assert wish.offer is not None
        assert wish.offer.job_token and wish.offer.job_token == platform.rows[job]["job_token"]
