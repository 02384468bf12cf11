"""Records to the hosted platform as it is: nothing lost and nothing twice, although it numbers nothing."""

import math
import random

import anyio
import msgspec
import pytest

from agent.net.client import Unclear, Unreached
from agent.net.lines import LOG_CAP
from protocol.lifecycle import JobState, Want
from protocol.records import Checkpoint, JobFacts, Notice, Result
from protocol.rest import POLL
from protocol.session import Key
from tests.net.kept import Kept, client, deliver, drain, kept
from tests.support.platform import Platform
from tests.support.programs import wait_until


def steps(platform: Platform, store: Kept) -> list[int]:
    return [point["step"] for point in platform.chart(store.job_id)]


def test_points_keep_their_order_their_times_and_the_newest_evaluation() -> None:
    with Platform() as platform:
        store = kept(platform)
        for step in range(3):
            store.step(step, loss=3.0 - step)
        store.evaluated(2, 1.5)
        deliver(platform, store)
        row = platform.rows[store.job_id]
        assert steps(platform, store) == [0, 1, 2, 2]
        # Of two points of the highest step either may be what the page's summary is taken from.
        assert [point["eval_loss"] for point in platform.chart(store.job_id)] == [None, None, 1.5, 1.5]
        assert (row["eval_loss"], row["perplexity"], row["best_eval_loss"]) == (1.5, 2.0, 1.5)
        store.step(3, loss=math.nan)
        deliver(platform, store)
        last = platform.chart(store.job_id)[-1]
        # A point of training alone, and yet the page's summary keeps its evaluation.
        assert (last["step"], last["train_loss"], last["eval_loss"], last["best_step"]) == (3, None, 1.5, 2)
        assert (row["eval_loss"], row["perplexity"], row["best_eval_loss"]) == (1.5, 2.0, 1.5)
        assert row["loss_trend"] == "improving" and last["timestamp"] == "2001-09-09T01:46:43.000Z"
        assert all(isinstance(point["epoch"], int) for point in platform.chart(store.job_id))
        assert platform.seen["put"] == 0


@pytest.mark.parametrize("fault", ["lost", "dropped", "gateway", "500", "502", "slow", "late"])
def test_what_is_in_doubt_is_read_back_before_it_is_sent_again(fault: str) -> None:
    with Platform() as platform:
        store = kept(platform)
        platform.late = 0.7
        for step in range(1, 900):
            store.step(step)
        store.print(*(f"line {number}" for number in range(700)))
        platform.fault("metrics", fault)
        platform.fault("logs", fault)
        deliver_slowly = fault in ("slow", "late")
        deliver(platform, store, within=0.3 if deliver_slowly else 5.0, settle=1.2 if deliver_slowly else 0.0)
        assert steps(platform, store) == list(range(1, 900))
        assert platform.log[store.job_id] == [f"line {number}" for number in range(700)]
        assert platform.faulted[fault] == 2 and platform.most_writers == 1


def test_too_many_requests_are_waited_out_for_the_platforms_minute() -> None:
    with Platform() as platform:
        platform.fault("poll", "429")

        async def ask() -> float:
            rest = client(platform)
            with pytest.raises(Unreached) as refused:
                await rest.get(POLL)
            await rest.close()
            return refused.value.retry_after

        assert anyio.run(ask) == 60.0


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(one, marks=pytest.mark.slow) for one in range(6, 300))]
)
def test_nothing_is_lost_or_doubled_under_any_mixture_of_faults_and_crashes(seed: int) -> None:
    chance = random.Random(seed)
    kinds = ["lost", "dropped", "gateway", "500", "502", "401", "page", "late", "slow", "202", *[""] * 6]
    within, settle = 0.25, 1.0
    with Platform(rate_limit=100_000) as platform:
        platform.late = 0.4
        store = kept(platform)
        told: list[str] = []
        step = 0
        store.status("running")
        for number in range(9):
            for _ in range(chance.randrange(1, 120)):
                step += 1
                store.step(step)
            lines = [f"{len(told) + number}" for number in range(chance.randrange(1, 40))]
            # Equal lines beside each other are told apart by their count alone.
            lines += ["same"] * chance.randrange(0, 4)
            told += lines
            store.print(*lines)
            if number % 3 == 0:
                store.add(store.control, JobFacts(1e9, 1, 106, 2.5, 0, 90, 10, 4, 2, 2e-4))
            if chance.random() < 0.2:
                store.evaluated(step, 1.0)
            if chance.random() < 0.3:
                store.add(store.control, Notice(1e9, "warning", f"notice {len(told)}"))
            for route in ("metrics", "logs", "status", "jobs", "read-metrics", "read-logs"):
                some = [kind for kind in kinds if kind != "202" or route == "jobs"]
                platform.fault(route, *chance.choices(some, k=2))

            # Mostly killed at once, with something on its way; now and then there is time to wait for it.
            patience = within + settle if number % 4 == 3 else chance.uniform(0.0, 0.15)

            async def for_a_while() -> None:
                rest = client(platform, within)
                with anyio.move_on_after(patience):  # noqa: B023
                    await drain(rest, store, settle, within).run()
                await rest.close()

            anyio.run(for_a_while)
        platform._faults.clear()
        # Figures that a killed agent had sent may be shown late, over newer ones: the last word comes after them.
        wait_until(lambda: not platform.at_work, "the platform to do what was given up")
        store.add(store.control, Result(1e9, 1, "/m", "", "", step, {"train_loss": 0.5}))
        store.status("completed")
        deliver(platform, store, within, settle)
        wait_until(lambda: not platform.at_work, "the platform to do what was given up")
        trained = [one["step"] for one in platform.chart(store.job_id) if one["learning_rate"] is not None]
        assert trained == list(range(1, step + 1)), seed
        row = platform.rows[store.job_id]
        assert row["started_at"] and (row["total_steps"], row["status"]) == (106, "completed"), seed
        assert (row["final_loss"], row["current_step"], row["loss"]) == (0.5, step, 1.0), seed
        log = platform.log[store.job_id]
        assert [line for line in log if not line.startswith("[agent]")] == told, seed
        notices = [line for line in log if line.startswith("[agent]")]
        assert len(notices) == len(set(notices)), seed


@pytest.mark.parametrize("killed", [True, False])
def test_what_was_on_its_way_when_the_agent_left_is_waited_for(killed: bool) -> None:
    with Platform() as platform:
        platform.late = 0.8
        store = kept(platform)
        store.step(1)
        store.print("one")
        platform.fault("metrics", "late")
        platform.fault("logs", "late")

        async def run() -> None:
            rest = client(platform)
            made = drain(rest, store, 1.0, 1.0)
            for route in ("metrics", "logs", ""):
                with anyio.fail_after(20):
                    async with anyio.create_task_group() as group:
                        group.start_soon(made.run)
                        # A server in a thread is watched: nothing here could be waited for.
                        while not platform.seen[route] if route else sum(store.backlog()):  # noqa: ASYNC110
                            await anyio.sleep(0.01)
                        # Killed, or the socket has its turn.
                        group.cancel_scope.cancel()
                if killed:
                    made = drain(rest, store, 1.0, 1.0)
            await rest.close()

        anyio.run(run)
        wait_until(lambda: not platform.at_work, "the platform to do what was given up")
        assert platform.faulted["late"] == 2
        assert steps(platform, store) == [1] and platform.log[store.job_id] == ["one"]


def test_a_batch_that_is_seen_there_is_waited_for_no_longer() -> None:
    with Platform() as platform:
        store = kept(platform)
        store.step(1)
        platform.fault("metrics", "slow")

        async def run() -> None:
            rest = client(platform)
            for count in (1, 2):
                # Far less than what may still be on its way would be waited for.
                with anyio.fail_after(20):
                    async with anyio.create_task_group() as group:
                        group.start_soon(drain(rest, store, 60.0, 60.0).run)
                        while len(platform.chart(store.job_id)) < count:  # noqa: ASYNC110 - a server in a thread
                            await anyio.sleep(0.01)
                        group.cancel_scope.cancel()
                store.step(2)
            await rest.close()

        anyio.run(run)
        assert steps(platform, store) == [1, 2]


@pytest.mark.parametrize("fault", ["lost", "dropped"])
def test_no_start_of_the_agent_overtakes_an_earlier_one(fault: str) -> None:
    with Platform() as platform:
        store = kept(platform)
        store.step(1)
        store.print("before")
        store.metrics, store.lines = Key(8, store.job_id, 1), Key(8, store.job_id, 2)
        store.step(2)
        store.print("after")
        platform.fault("metrics", fault)
        platform.fault("logs", fault)
        deliver(platform, store)
        assert steps(platform, store) == [1, 2] and platform.log[store.job_id] == ["before", "after"]


def test_steps_that_are_made_again_after_a_lost_worker_are_not_drawn_twice() -> None:
    with Platform() as platform:
        store = kept(platform)
        for step in range(1, 31):
            store.step(step)
        deliver(platform, store)
        store.status("queued")
        store.status("running", attempt=2)
        for step in range(21, 41):
            store.step(step, attempt=2)
        deliver(platform, store)
        assert steps(platform, store) == list(range(1, 41))
        # To the platform the job was running all the time.
        assert platform.patches == []


def test_totals_times_results_and_errors_go_through_the_jobs_route() -> None:
    with Platform() as platform:
        store = kept(platform)
        platform.fault("jobs", "202", "lost")
        store.status("preparing")
        held = store.held[store.job_id]
        store.held[store.job_id] = msgspec.structs.replace(held, values={"train_loss": 0.5, "eval_loss": 1.2})
        store.add(store.control, JobFacts(1e9, 1, 120, 2.5, 0, 90, 10, 4, 2, 2e-4))
        store.add(store.control, Checkpoint(1e9, 1, "step-40", 40, 0.9, 1, 1.0, "steps", 1.25, None, True))
        store.add(store.control, Result(1e9, 1, "/m", "", "", 120, {"eval_loss": math.inf}))
        store.status("completed")
        deliver(platform, store)
        row = platform.rows[store.job_id]
        assert (row["total_steps"], row["total_epochs"], row["total_samples"]) == (120, 3, 100)
        assert (row["train_samples"], row["val_samples"], row["batch_size"]) == (90, 10, 4)
        assert (row["gradient_accumulation_steps"], row["max_learning_rate"]) == (2, 2e-4)
        assert row["started_at"] == "2001-09-09T01:46:40.000Z"
        assert (row["best_step"], row["best_eval_loss"], row["final_loss"]) == (40, 1.25, 0.5)
        assert (row["final_eval_loss"], row["progress"], row["status"]) == (None, 100, "completed")
        assert row["config"] == {"model": {"name": "m"}}


def test_a_pause_that_its_table_does_not_know_holds_nothing_up() -> None:
    with Platform(paused_allowed=False) as platform:
        store = kept(platform)
        store.status("paused")
        store.status("running")
        store.step(1)
        deliver(platform, store)
        assert platform.rows[store.job_id]["status"] == "running" and steps(platform, store) == [1]


@pytest.mark.parametrize("notice", [False, True])
def test_lines_that_somebody_wrote_before_stay_and_hide_none_of_ours(notice: bool) -> None:
    with Platform() as platform:
        store = kept(platform)
        platform.log[store.job_id] = ["earlier", "one"]
        platform.fault("logs", "lost")
        store.print("one", "two")
        if notice:
            store.add(store.control, Notice(1e9, "warning", "slow"))
        deliver(platform, store)
        log = platform.log[store.job_id]
        assert [line for line in log if not line.startswith("[agent]")] == ["earlier", "one", "one", "two"]


def test_lines_are_told_apart_also_where_the_platform_forgets_the_oldest() -> None:
    with Platform() as platform:
        store = kept(platform)
        platform.log[store.job_id] = [f"old {number}" for number in range(LOG_CAP)]
        platform.fault("logs", "lost", "dropped")
        store.print(*(f"new {number}" for number in range(600)))
        store.print("last")
        deliver(platform, store)
        log = platform.log[store.job_id]
        assert log[-601:] == [*(f"new {number}" for number in range(600)), "last"] and len(log) == LOG_CAP
        assert log[-602] == f"old {LOG_CAP - 1}"


@pytest.mark.parametrize("fault", ["lost", "dropped"])
def test_a_notice_in_doubt_is_settled_before_the_log_goes_on(fault: str) -> None:
    with Platform() as platform:
        store = kept(platform)
        store.print("one")
        deliver(platform, store)
        store.add(store.control, Notice(1e9, "warning", "half as fast"))
        store.print("two")
        platform.fault("logs", fault)
        deliver(platform, store)
        assert sorted(platform.log[store.job_id]) == ["[agent] warning: half as fast", "one", "two"]


@pytest.mark.parametrize("fault", ["lost", "dropped"])
def test_a_notice_behind_lines_in_doubt_hides_nothing_of_them(fault: str) -> None:
    with Platform() as platform:
        store = kept(platform)
        del store.rows[store.control][:]

        async def run() -> None:
            rest = client(platform)
            made = drain(rest, store)
            store.add(store.control, Notice(1e9, "info", "first"))
            await made.batch(store.control)
            store.print("one", "two")
            platform.fault("logs", fault)
            with pytest.raises(Unclear):
                await made.batch(store.lines)
            store.add(store.control, Notice(1e9, "info", "second"))
            await made.batch(store.control)
            await made.batch(store.lines)
            await rest.close()

        anyio.run(run)
        assert sorted(platform.log[store.job_id]) == [
            "[agent] info: first",
            "[agent] info: second",
            "one",
            "two",
        ]


def test_a_token_that_is_lost_or_refused_is_asked_for_and_a_deleted_job_is_dropped() -> None:
    with Platform() as platform:
        store = kept(platform)
        store.tokens.clear()
        store.step(1)
        deliver(platform, store)
        store.tokens[store.job_id] = "wrong"
        store.step(2)
        deliver(platform, store)
        assert steps(platform, store) == [1, 2]
        assert store.tokens[store.job_id] == platform.rows[store.job_id]["job_token"]
        row = platform.rows.pop(store.job_id)
        store.step(3)
        store.print("x")
        deliver(platform, store)
        assert store.refused and row["id"] not in platform.rows, "an agent made a row"


def test_a_page_of_the_platforms_host_deletes_nothing_and_its_own_word_does() -> None:
    with Platform() as platform:
        store = kept(platform)
        store.step(1)
        store.print("x")
        for route in ("metrics", "logs", "read-status"):
            platform.fault(route, "page", "page")
        deliver(platform, store)
        assert not store.refused
        assert steps(platform, store) == [1] and platform.log[store.job_id] == ["x"]


@pytest.mark.parametrize("said", [{"metrics": {"step": 1}}, {"metrics": ["x", {"step": None}, {"step": 1}]}])
def test_rows_that_are_none_are_not_taken_for_points(said: dict[str, object]) -> None:
    with Platform() as platform:
        store = kept(platform)
        store.step(1)
        store.step(2)
        platform.say("read-metrics", said)
        deliver(platform, store)
        assert steps(platform, store) == ([1, 2] if isinstance(said["metrics"], dict) else [2])


async def _looked(platform: Platform, store: Kept, said: str) -> list[str]:
    rest = client(platform)
    made = drain(rest, store)
    platform.rows[store.job_id]["status"] = said
    await made.look(store.held[store.job_id])
    await rest.close()
    return [wish.want for wish in store.wishes]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [("cancelled", ["cancel"]), ("paused", ["pause"]), ("running", []), ("failed", []), ("completed", [])],
)
def test_what_the_platform_says_of_a_job_is_obeyed_where_it_is_its_to_say(
    said: str, wanted: list[str]
) -> None:
    with Platform() as platform:
        store = kept(platform)
        assert anyio.run(_looked, platform, store, said) == wanted
        # Once: the same status again is no news.
        assert anyio.run(_looked, platform, store, said) == wanted
        # Nor does a word that was on its way undo it.
        if wanted:
            store.status("running")
            deliver(platform, store)
            assert platform.rows[store.job_id]["status"] == said


@pytest.mark.parametrize("state", ["running", "paused"])
@pytest.mark.parametrize("swept", ["failed", "completed"])
def test_a_living_job_that_a_sweep_ended_is_set_right_at_once(swept: str, state: str) -> None:
    with Platform() as platform:
        store = kept(platform)
        store.status("running")
        store.status(state)
        store.step(1)
        deliver(platform, store)
        # Not what is about to end anyway, or has.
        held = store.held[store.job_id]
        for other in ({"want": Want.CANCEL}, {"state": JobState.COMPLETED}):
            store.held[store.job_id] = msgspec.structs.replace(held, **other)
            if state == "running":
                anyio.run(_looked, platform, store, swept)
                assert platform.rows[store.job_id]["status"] == swept
        store.held[store.job_id] = held
        assert anyio.run(_looked, platform, store, swept) == []
        assert platform.rows[store.job_id]["status"] == state


def test_a_quiet_job_is_confirmed_before_the_page_calls_it_stale() -> None:
    with Platform() as platform:
        store = kept(platform)
        row = platform.rows[store.job_id]
        row["updated_at"] -= 400
        assert platform.stale(store.job_id)

        async def run() -> None:
            now = 0.0
            rest = client(platform)
            made = drain(rest, store, clock=lambda: now)
            await made.look(store.held[store.job_id])
            assert platform.stale(store.job_id)
            now = 130.0
            await made.look(store.held[store.job_id])
            await rest.close()

        anyio.run(run)
        assert not platform.stale(store.job_id)
