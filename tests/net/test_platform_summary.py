"""What the platform's page says of a job now: true while the curve is late, made again, or of an evaluation alone."""

import math
from typing import Any

import anyio
import msgspec
import pytest

from agent.net.client import Unclear, Unreached
from protocol.records import JobFacts, Notice
from protocol.session import Key
from tests.net.kept import Kept, client, deliver, drain, kept
from tests.support.platform import Platform
from tests.support.programs import wait_until


def losses(platform: Platform, store: Kept) -> list[tuple[int, float | None]]:
    return [(point["step"], point["train_loss"]) for point in platform.chart(store.job_id)]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("fault", ["", "202", "lost", "502"])
def test_an_evaluation_leaves_the_last_figures_of_training_standing(alone: bool, fault: str) -> None:
    with Platform() as platform:
        store = kept(platform)
        for step in (1, 2, 3):
            store.step(step, loss=4.0 - step)
        if alone:
            deliver(platform, store)
        store.evaluated(3, 1.5)
        if fault not in ("", "202"):
            platform.fault("jobs", fault)
        deliver(platform, store)
        row = platform.rows[store.job_id]
        assert (row["loss"], row["learning_rate"], row["samples_per_second"]) == (1.0, 1e-4, 2.0)
        assert (row["eval_loss"], row["perplexity"], row["current_step"]) == (1.5, 2.0, 3)
        # No second point for it.
        assert [point["step"] for point in platform.chart(store.job_id)] == [1, 2, 3, 3]


def test_an_evaluation_that_was_in_doubt_stays_in_the_summary() -> None:
    with Platform() as platform:
        store = kept(platform)
        store.step(1)
        store.step(2)
        store.evaluated(2, 1.5)
        platform.fault("metrics", "lost")
        deliver(platform, store)
        # What is carried is what was sent, and not how the job stands by now.
        store.held[store.job_id] = msgspec.structs.replace(store.held[store.job_id], values={})
        store.step(3)
        deliver(platform, store)
        assert platform.rows[store.job_id]["eval_loss"] == 1.5


def test_points_that_are_stored_and_not_settled_hide_no_later_ones_in_doubt() -> None:
    with Platform() as platform:
        store = kept(platform)
        platform.late = 0.7

        async def run() -> None:
            rest = client(platform, 0.3)
            store.evaluated(3, 1.5)
            platform.fault("jobs", "502")
            platform.fault("metrics", "", "late")
            with pytest.raises(Unclear):
                # Stored, and its figures are still to be shown.
                await drain(rest, store, 60.0, 0.3).batch(store.metrics)
            store.step(4)
            made = drain(rest, store, 60.0, 0.3)
            with pytest.raises(Unclear):
                await made.batch(store.metrics)
            with pytest.raises(Unreached):
                # What is seen now is the first batch and not the second.
                await made.batch(store.metrics)
            await rest.close()

        anyio.run(run)
        wait_until(lambda: not platform.at_work, "the platform to do what was given up")
        assert [point["step"] for point in platform.chart(store.job_id)] == [3, 4]


def test_figures_that_its_table_refuses_hold_no_points_up() -> None:
    with Platform(rate_limit=100_000) as platform:
        store = kept(platform)
        platform.fault("jobs", *["202"] * 50)
        store.evaluated(3, 1.5)
        deliver(platform, store)
        store.step(4)
        deliver(platform, store)
        assert [point["step"] for point in platform.chart(store.job_id)] == [3, 4]


def test_evaluations_close_together_do_not_use_the_keys_requests_up() -> None:
    with Platform() as platform:
        store = kept(platform)

        async def run() -> None:
            now = 0.0
            rest = client(platform)
            made = drain(rest, store, clock=lambda: now)
            for step in range(1, 41):
                store.step(step)
                store.evaluated(step, 1.0)
                await made.batch(store.metrics)
                now += 2.0
            await made.look(store.held[store.job_id])
            await rest.close()

        anyio.run(run)
        assert platform.seen["jobs"] <= 12
        assert platform.rows[store.job_id]["loss"] == 1.0


def test_what_a_rewind_makes_again_fills_the_holes_and_the_rest_is_said() -> None:
    with Platform() as platform:
        store = kept(platform)
        for step in range(1, 31):
            store.step(step, loss=math.nan if step >= 29 else 1.0)
        deliver(platform, store)
        assert platform.rows[store.job_id]["loss"] is None
        store.status("queued")
        store.status("running", attempt=2)
        store.add(store.control, JobFacts(1e9, 2, 120, 2.5, 20, 90, 10, 4, 2, 2e-4))
        for step in range(21, 26):
            store.step(step, loss=0.5, attempt=2)
        deliver(platform, store)
        row = platform.rows[store.job_id]
        # The chart cannot be corrected; what stands above it can.
        assert (row["current_step"], row["loss"]) == (25, 0.5)
        assert platform.log[store.job_id] == [
            "[agent] warning: Steps 21 to 30 are made again from step 20 and come out otherwise; "
            "where this chart has a value already it keeps that one."
        ]
        for step in range(26, 41):
            store.step(step, loss=0.5, attempt=2)
        platform.fault("metrics", "lost")
        deliver(platform, store)
        assert losses(platform, store) == [
            *((step, None if step >= 29 else 1.0) for step in range(1, 31)),
            *((step, 0.5) for step in range(29, 41)),
        ]
        assert (row["current_step"], row["loss"]) == (40, 0.5)
        assert len(platform.log[store.job_id]) == 1


@pytest.mark.parametrize("fault", ["lost", "dropped", "slow", "late"])
def test_a_filled_hole_that_is_in_doubt_is_filled_once(fault: str) -> None:
    with Platform() as platform:
        store = kept(platform)
        platform.late = 0.7
        for step in range(1, 6):
            store.step(step, loss=math.nan if step >= 4 else 1.0)
        deliver(platform, store)
        store.step(4, loss=0.5, attempt=2)
        platform.fault("metrics", fault)
        deliver(platform, store, within=0.3 if fault in ("slow", "late") else 5.0, settle=1.2)
        store.step(5, loss=0.5, attempt=2)
        deliver(platform, store)
        assert losses(platform, store)[-3:] == [(5, None), (4, 0.5), (5, 0.5)]


def test_a_rewind_that_was_never_sent_before_fills_its_holes_too() -> None:
    with Platform() as platform:
        store = kept(platform)
        for step in range(1, 31):
            store.step(step, loss=math.nan if step >= 29 else 1.0)
        for step in range(29, 41):
            store.step(step, loss=0.5, attempt=2)
        deliver(platform, store)
        assert [value for step, value in losses(platform, store) if step in (29, 30)] == [
            None,
            None,
            0.5,
            0.5,
        ]
        assert [step for step, _ in losses(platform, store)] == [*range(1, 31), *range(29, 41)]


def test_steps_made_again_with_equal_values_are_no_news() -> None:
    with Platform() as platform:
        store = kept(platform)
        for step in range(1, 31):
            store.step(step, loss=1 / 3)
        deliver(platform, store)
        for step in range(21, 35):
            store.step(step, loss=1 / 3, attempt=2)
        deliver(platform, store)
        assert [step for step, _ in losses(platform, store)] == list(range(1, 35))
        assert store.job_id not in platform.log


def test_a_page_is_current_before_and_after_a_long_backlog() -> None:
    with Platform() as platform:
        store = kept(platform)
        for step in range(1, 1601):
            store.step(step, loss=2000.0 - step)
        seen: list[tuple[int, Any]] = []
        post = platform._insert

        def watched(row: dict[str, Any], *rest: Any) -> None:
            seen.append((row["current_step"], row["loss"]))
            post(row, *rest)

        platform._insert = watched  # type: ignore[method-assign,assignment]
        deliver(platform, store)
        row = platform.rows[store.job_id]
        assert seen[0] == (1600, 400.0), "the page had to wait for the history"
        assert (row["current_step"], row["loss"]) == (1600, 400.0)
        assert len(seen) == 4 and platform.seen["jobs"] == 2


def test_the_agents_own_warning_is_read_with_each_job_that_lives() -> None:
    with Platform() as platform:
        store = kept(platform)
        store.add(Key(7, "", 0), Notice(1e9, "warning", "the journal was damaged"))
        platform.fault("logs", "lost")
        deliver(platform, store)
        deliver(platform, store)
        assert platform.log[store.job_id] == ["[agent] warning: the journal was damaged"]


def test_the_agents_own_warning_waits_for_a_job_to_be_read_with() -> None:
    with Platform() as platform:
        store = kept(platform)
        held = store.held.pop(store.job_id)
        store.add(Key(7, "", 0), Notice(1e9, "warning", "the journal was damaged"))
        rows = store.rows.pop(store.control)
        deliver(platform, store)
        assert store.job_id not in platform.log
        store.held[store.job_id] = held
        store.add(store.control, *rows)
        deliver(platform, store)
        deliver(platform, store)
        assert platform.log[store.job_id] == ["[agent] warning: the journal was damaged"]
