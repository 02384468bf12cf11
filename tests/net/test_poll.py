"""Polls and claims: whose a job is, and that a lost answer costs none."""

from typing import Any

import anyio
import pytest

from agent.errors import AgentError
from agent.net.client import RestError
from agent.net.poll import Poller
from protocol.messages import Desired
from tests.net.kept import AGENT, Kept, client
from tests.support.platform import Platform


async def _poll(platform: Platform, store: Kept, times: int = 1) -> list[float]:
    rest = client(platform)
    poller = Poller(rest, store, interval=10.0)
    poller.others_begin = 0.0
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


CLOUD = {"started_at": "2026-01-01T00:00:00Z", "created_at": "2026-01-01"}


def test_a_job_that_is_passed_over_does_not_block_those_behind_it() -> None:
    with Platform() as platform:
        store = Kept("none")
        # More than a page of them: a pod that died leaves its row for good.
        for _ in range(130):
            platform.submit({}, **CLOUD)
        platform.submit({}, id="../etc", created_at="2026-01-02")
        job = platform.submit({"metadata": {"job_name": "mine"}}, created_at="2026-01-03")
        platform.submit({}, created_at="2026-01-04")
        anyio.run(_poll, platform, store)
        (wish,) = store.wishes
        assert wish.offer is not None and (wish.job_id, wish.offer.name) == (job, "mine")
        assert platform.seen["claim"] == 1 and platform.rows[job]["agent_id"] == AGENT


def test_a_job_that_is_held_already_blocks_none_behind_it() -> None:
    with Platform() as platform:
        store = Kept("none")
        held = platform.submit({}, created_at="2026-01-01")
        store.held[held] = store.held["none"]
        job = platform.submit({}, created_at="2026-01-02")
        # What this agent has already is not claimed again, and stands in nobody's way.
        anyio.run(_poll, platform, store)
        assert [wish.job_id for wish in store.wishes] == [job]


@pytest.mark.parametrize("listed", ["page", "500", "odd"])
def test_a_list_that_cannot_be_read_stops_no_poll(listed: str) -> None:
    with Platform() as platform:
        store = Kept("none")
        platform.submit({}, **CLOUD)
        if listed == "odd":
            platform.say("read-jobs", {"jobs": [7, {"id": 7}, {}], "total": "many"})
        else:
            platform.fault("read-jobs", listed)
        assert anyio.run(_poll, platform, store) == [10.0]
        assert not store.wishes and platform.seen["claim"] == 0


def test_a_listed_job_whose_claim_had_no_answer_fails_with_its_reason() -> None:
    with Platform() as platform:
        store = Kept("none")
        platform.submit({}, **CLOUD)
        job = platform.submit({"model": {"name": "m"}})
        platform.fault("claim", "lost")

        async def run() -> None:
            with pytest.raises(RestError, match="no answer"):
                await _poll(platform, store)
            await _poll(platform, store)

        anyio.run(run)
        row = platform.rows[job]
        # Its settings stood in that answer alone; a job with none of them must not train.
        assert (
            not store.wishes and row["status"] == "failed" and "Start the job again" in row["error_message"]
        )


@pytest.mark.parametrize("shows", ["started_at", "current_step", "hub"])
def test_a_claim_that_was_not_done_leaves_the_job_to_whoever_claims_it_next(shows: str) -> None:
    with Platform() as platform:
        store = Kept("none")
        job = platform.submit({})
        hub = shows == "hub"

        async def run() -> None:
            rest = client(platform)
            poller = Poller(rest, store, interval=10.0)
            poller.others_begin = 0.0
            platform.fault("claim", "502")
            with pytest.raises(RestError):
                await poller._consider({"id": job, "config": {}}, hub=hub)
            assert store.notes["claiming"]
            # Meanwhile another agent asked. A hub's 409 says as much: it answers the same agent again.
            platform.rows[job] |= {"agent_id": "agent_other", "status": "running"}
            if not hub:
                platform.rows[job][shows] = 1
            await poller.once()
            await rest.close()

        anyio.run(run)
        assert not store.wishes and not store.notes["claiming"] and platform.seen["jobs"] == 0


@pytest.mark.parametrize("job_id", ["../../etc/passwd", "/var/log/auth", "a/b", "a\n", "x" * 200, ""])
def test_what_is_no_id_of_a_job_is_not_claimed(job_id: str) -> None:
    with Platform() as platform:
        store = Kept("none")
        platform.say("poll", {"job": {"id": job_id, "config": {}}, "poll_interval_seconds": 10**400})
        assert anyio.run(_poll, platform, store) == [30.0]
        assert not store.wishes and not store.notes.get("claiming")
        assert platform.seen["read-status"] == platform.seen["claim"] == 0


@pytest.mark.parametrize(
    "said",
    [
        {"dataset": {"sha256": "0" * 64, "size": 1}},
        {"dataset": ["no hash", 1]},
        {"dataset": 7},
        {"job": [1, 2]},
        {"job": "x"},
    ],
)
def test_an_answer_to_a_claim_that_cannot_be_read_fails_that_job_alone(said: dict[str, Any]) -> None:
    with Platform() as platform:
        store = Kept("none")
        job = platform.submit({})
        platform.say("claim", {"job_token": platform.rows[job]["job_token"], **said})
        anyio.run(_poll, platform, store)
        assert not store.wishes and not store.notes["claiming"]
        assert platform.rows[job]["status"] == "failed"
        assert "cannot be read" in platform.rows[job]["config"]["error"]
        other = platform.submit({})
        anyio.run(_poll, platform, store, 2)
        assert [wish.job_id for wish in store.wishes] == [other]


class Full(Kept):
    """A journal whose disk is full for a while."""

    full = True

    async def desired(self, message: Desired) -> None:
        if self.full:
            raise AgentError("The disk is full.")
        await super().desired(message)


@pytest.mark.parametrize("claim", ["", "401", "page"])
def test_a_job_that_was_claimed_is_kept_in_mind_until_it_can_be_stored(claim: str) -> None:
    with Platform() as platform:
        store = Full("none")
        job = platform.submit({})

        async def run() -> None:
            with pytest.raises(AgentError):
                await _poll(platform, store)
            store.full = False
            if claim:
                # Nothing that the platform itself says of this job.
                platform.fault("claim", claim)
                with pytest.raises(RestError):
                    await _poll(platform, store)
            await _poll(platform, store)

        anyio.run(run)
        assert [wish.job_id for wish in store.wishes] == [job] and not store.notes["claiming"]


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
