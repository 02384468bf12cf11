"""What the hosted platform does not store: kept through every outage, and given up only where it says so itself."""

import time

import anyio
import pytest

from agent.net.jobrow import APART, REFUSED_FOR, Refusals
from protocol.failures import FailureReason, failure
from protocol.lifecycle import JobState
from protocol.records import JobFacts, JobStatus, Notice, Result
from tests.net.kept import Kept, client, deliver, drain, kept
from tests.support.platform import Platform

FACTS = JobFacts(1e9, 1, 120, 2.5, 0, 90, 10, 4, 2, 2e-4)


async def _through(platform: Platform, store: Kept, seconds: float) -> None:
    """Run a drain while the platform is away for so long, and then until everything is delivered."""
    rest = client(platform)
    made = drain(rest, store)
    empty = anyio.Event()
    store.on_change = lambda: None if sum(store.backlog()) else empty.set()
    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(made.run)
            await anyio.sleep(seconds)
            platform.down = False
            await empty.wait()
            group.cancel_scope.cancel()
    await rest.close()


def test_an_outage_longer_than_any_number_of_tries_costs_no_record() -> None:
    with Platform(rate_limit=100_000) as platform:
        store = kept(platform)
        platform.down = True
        store.status("running")
        store.add(store.control, FACTS, Result(1e9, 1, "/m", "", "", 120, {"train_loss": 0.5}))
        store.held[store.job_id] = store.held[store.job_id]
        store.status("failed")
        anyio.run(_through, platform, store, 1.5)
        row = platform.rows[store.job_id]
        assert platform.faulted["down"] > 15
        assert row["started_at"] and (row["total_steps"], row["final_loss"]) == (120, 0.5)
        assert (row["status"], row["error_message"]) == ("failed", "Training failed")


@pytest.mark.parametrize("fault", ["202", "500", "502", "lost", "dropped"])
def test_a_bad_minute_of_the_jobs_route_costs_no_record(fault: str) -> None:
    with Platform(rate_limit=100_000) as platform:
        store = kept(platform)
        platform.fault("jobs", *[fault] * 12)
        store.status("running")
        store.add(store.control, FACTS)
        store.status("failed")
        deliver(platform, store)
        row = platform.rows[store.job_id]
        assert row["started_at"] and row["total_steps"] == 120 and row["error_message"] == "Training failed"
        assert platform.log.get(store.job_id) is None


def test_a_pause_arrives_after_a_bad_minute() -> None:
    with Platform() as platform:
        store = kept(platform)
        platform.fault("status", *["502"] * 8)
        store.status("running")
        store.status("paused")
        deliver(platform, store)
        assert platform.rows[store.job_id]["status"] == "paused"


@pytest.mark.parametrize("fault", ["202", "500"])
def test_what_its_table_never_takes_is_given_up_after_ten_minutes_and_its_user_told(fault: str) -> None:
    """The clock runs two thousand times as fast as ours."""
    with Platform(rate_limit=100_000) as platform:
        store = kept(platform)
        platform.fault("jobs", *[fault] * 10_000)
        store.add(store.control, FACTS, FACTS, FACTS)
        store.status("completed")
        began = time.monotonic()

        async def run() -> None:
            rest = client(platform)
            made = drain(rest, store, clock=lambda: (time.monotonic() - began) * 2000.0)
            empty = anyio.Event()
            store.on_change = lambda: None if sum(store.backlog()) else empty.set()
            with anyio.fail_after(60):
                async with anyio.create_task_group() as group:
                    group.start_soon(made.run)
                    # As the polls do.
                    while not empty.is_set():
                        await rest.get(f"/api/training/local/{store.job_id}/status")
                        await anyio.sleep(0.01)
                    group.cancel_scope.cancel()
            await rest.close()

        anyio.run(run)
        assert (time.monotonic() - began) * 2000.0 >= REFUSED_FOR
        assert platform.rows[store.job_id]["status"] == "completed"
        totals, start = platform.log[store.job_id]
        assert totals.startswith("[agent] warning: ") and "total_steps" in totals
        assert "started_at" in start


def test_only_time_in_which_it_answered_otherwise_counts() -> None:
    refusals = Refusals()
    now, answers = 0.0, 5
    assert not refusals.again(now, answers)
    # Nothing else was answered: the platform as a whole is in trouble.
    for _ in range(1000):
        now += 30.0
        assert not refusals.again(now, answers)
    # It slept for a day.
    now, answers = now + 86_400.0, answers + 1
    assert not refusals.again(now, answers)
    woken = now
    while not refusals.again(now + 30.0, answers + 1):
        now, answers = now + 30.0, answers + 1
    assert now + 30.0 - woken == REFUSED_FOR - APART


def test_a_pause_that_its_table_does_not_know_is_owed_and_not_contradicted() -> None:
    with Platform(paused_allowed=False) as platform:
        store = kept(platform)
        store.status("paused")
        store.add(store.control, Notice(1e9, "info", "the disk is full"))
        deliver(platform, store)
        # What comes after it waits for nothing.
        assert platform.log[store.job_id] == ["[agent] info: the disk is full"]

        async def look(*times: float) -> None:
            now = 0.0
            rest = client(platform)
            made = drain(rest, store, clock=lambda: now)
            for now in times:  # noqa: B007 - the drain's clock
                await made.look(store.held[store.job_id])
            await rest.close()

        anyio.run(look, 0.0, 130.0, 260.0)
        # Not confirmed as running: it is not.
        assert platform.patches == [] and platform.seen["status"] > 2
        platform.paused_allowed = True
        anyio.run(look, 0.0)
        assert platform.rows[store.job_id]["status"] == "paused"
        anyio.run(look, 0.0, 10.0)
        assert platform.patches == [(store.job_id, "paused")]


def test_a_pause_that_is_refused_for_good_is_said_in_the_jobs_log() -> None:
    with Platform(paused_allowed=False, rate_limit=100_000) as platform:
        store = kept(platform)
        store.status("paused")
        deliver(platform, store)

        async def look() -> None:
            now = 0.0
            rest = client(platform)
            made = drain(rest, store, clock=lambda: now)
            while now < 3 * REFUSED_FOR:
                await made.look(store.held[store.job_id])
                now += 30.0
            await rest.close()

        anyio.run(look)
        deliver(platform, store)
        (line,) = platform.log[store.job_id]
        assert line.startswith("[agent] warning: ") and "paused" in line
        assert platform.patches == []


def test_a_character_that_no_table_stores_does_not_hold_up_an_end() -> None:
    with Platform() as platform:
        store = kept(platform)
        why = failure(FailureReason.DATA, "Row 3 is no JSON: 'a\x00b'")
        store.status("failed")
        store.add(store.control, JobStatus(1e9, 1, "failed", failure=why))
        store.rows[store.control].pop(-2)
        store.print("a\x00b")
        store.add(store.control, Notice(1e9, "warning", "c\x00d"))
        deliver(platform, store)
        row = platform.rows[store.job_id]
        assert store.held[store.job_id].state is JobState.FAILED
        assert row["status"] == "failed" and "'ab'" in row["config"]["error"]
        assert "'ab'" in row["error_message"]
        assert sorted(platform.log[store.job_id]) == ["[agent] warning: cd", "ab"]
