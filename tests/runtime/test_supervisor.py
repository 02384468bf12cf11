import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from multiprocessing import resource_tracker
from pathlib import Path
from statistics import median
from typing import IO, Any

import anyio
import pytest

from agent.runtime.leftovers import BadLeftovers, forget_leftovers, read_leftovers
from agent.runtime.process import orphan_alive, orphan_gone
from protocol.worker import (
    LEFTOVERS,
    Cancel,
    EvaluateNow,
    Finished,
    Left,
    Metrics,
    Parameters,
    ParametersSet,
    Pause,
    Ready,
    Saved,
    SaveNow,
    SetParameters,
    Start,
    Stop,
    Trained,
)
from tests.support.children import DEADLINE, HOSTILE, Watch, clean_env, start_order, supervised


async def begin(watch: Watch, folder: Path, order: Start | None = None, **env: str) -> None:
    """Start a job; its attempt is in the order."""
    order = order or start_order(folder, "step=0.01", max_steps=100_000)
    await watch.supervisor.start("job", order, env=clean_env(**env), log=folder / "job.log")


def test_a_job_runs_to_its_end(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised() as watch:
            await begin(watch, tmp_path, start_order(tmp_path, max_steps=30))
            assert set(watch.supervisor.alive()) == {"job"}
            end = await watch.exited()
            assert (end.exit_code, end.signal, end.left, end.released) == (0, None, "", True)
            assert [point.step for point in watch.events(Metrics)] == list(range(1, 31))
            assert [type(event) for event in watch.events()[-2:]] == [Trained, Finished]
            assert watch.supervisor.alive() == {}

    anyio.run(go)
    assert (tmp_path / "model" / "model.json").exists()
    assert not (tmp_path / "checkpoints" / LEFTOVERS).exists()


def test_a_paused_and_resumed_job_is_as_one_never_touched(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised() as watch:
            await begin(watch, tmp_path, start_order(tmp_path / "a", max_steps=300))
            await watch.exited()
        (untouched,) = watch.events(Finished)
        async with supervised() as watch:
            words = "step=0.002"
            await begin(watch, tmp_path, start_order(tmp_path / "b", words, max_steps=300))
            await watch.heard(Metrics, lambda point: point.step >= 20)
            watch.supervisor.ask("job", Pause())
            end = await watch.exited()
            assert (end.exit_code, end.left) == (0, "paused")
            (saved,) = watch.events(Saved)
            assert saved.reason == "pause"
            await begin(watch, tmp_path, start_order(tmp_path / "b", words, attempt=2, max_steps=300))
            await watch.exited(attempt=2)
            (ready,) = watch.events(Ready, attempt=2)
            assert (ready.start_step, ready.resumed_from) == (saved.step, saved.path)
            steps = [point.step for point in watch.events(Metrics)]
            assert steps == list(range(1, 301))
            (finished,) = watch.events(Finished)
            assert finished.weights_hash == untouched.weights_hash

    anyio.run(go)


def test_orders_are_obeyed_while_it_trains(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised() as watch:
            await begin(watch, tmp_path)
            watch.supervisor.ask("job", SetParameters(Parameters(learning_rate=0.5)))
            watch.supervisor.ask("job", SaveNow("c1"))
            watch.supervisor.ask("job", EvaluateNow("c2"))
            assert (await watch.heard(ParametersSet)).refused == ""
            assert (await watch.heard(Saved)).command_id == "c1"
            await watch.heard(Metrics, lambda point: "eval_loss" in point.values)
            await watch.heard(Metrics, lambda point: point.values["learning_rate"] == 0.5)
            watch.supervisor.ask("job", Stop())
            assert (await watch.heard(Trained)).why == "stop"
            assert (await watch.exited()).exit_code == 0

    anyio.run(go)


def test_a_cancelled_job_leaves_by_itself_within_its_grace(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised() as watch:
            watch.supervisor.ask("job", Cancel())  # it has no trainer: nothing happens
            await watch.supervisor.end("job", grace=1)
            await begin(watch, tmp_path)
            await watch.heard(Metrics)
            await watch.supervisor.end("job", grace=DEADLINE)
            end = await watch.exited()
            assert (end.exit_code, end.signal, end.left, end.forced) == (0, None, "cancelled", False)

    anyio.run(go)


def test_one_that_has_said_its_last_word_and_stays_is_ended(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised(HOSTILE, leave_limit=0.1) as watch:
            await begin(watch, tmp_path, BEHAVIOUR="stay")
            end = await watch.exited()
            assert (end.signal, end.left, end.forced) == (signal.SIGTERM, "paused", True)
            assert end.sentence == "The trainer left at step 5: paused."

    anyio.run(go)


def test_what_a_trainer_needs_of_a_full_disk_is_a_fact_of_its_end(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised() as watch:
            await begin(watch, tmp_path, start_order(tmp_path, "disk_at=3 need_mb=7", max_steps=9))
            end = await watch.exited()
            assert (end.left, end.need, end.forced) == ("disk_full", 7 << 20, False)

    anyio.run(go)


def test_memory_that_stays_on_the_device_is_said(tmp_path: Path) -> None:
    asked: list[frozenset[int]] = []

    async def still_there(pids: frozenset[int]) -> bool:
        asked.append(pids)
        return False

    async def go() -> None:
        async with supervised(gpu_released=still_there) as watch:
            order = start_order(tmp_path, max_steps=1)
            identity = await watch.supervisor.start("job", order, env=clean_env(), log=tmp_path / "job.log")
            end = await watch.exited()
            assert not end.released
            assert "memory has not left the device" in end.sentence
            assert asked == [{identity.pid}]

    anyio.run(go)


def test_a_job_has_one_trainer(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised() as watch:
            await begin(watch, tmp_path)
            with pytest.raises(RuntimeError, match="has a trainer already"):
                await begin(watch, tmp_path)

    anyio.run(go)


def test_a_warm_trainer_takes_the_job_and_its_log(tmp_path: Path) -> None:
    (tmp_path / "job.log").write_text("of attempt 1\n")

    async def go() -> None:
        async with supervised() as watch:
            await watch.supervisor.keep_warm(clean_env(TMPDIR="/a"), tmp_path / "warm.log")
            (warm,) = [worker.child.identity for worker in watch.supervisor._all]
            order = start_order(tmp_path, "shout_every=1", max_steps=2)
            identity = await watch.supervisor.start(
                "job", order, env=clean_env(TMPDIR="/b"), log=tmp_path / "job.log"
            )
            assert identity == warm
            await watch.exited()

    anyio.run(go)
    assert (tmp_path / "job.log").read_text().splitlines() == ["of attempt 1", "step 1 of 2", "step 2 of 2"]
    assert not (tmp_path / "warm.log").exists()


def test_a_warm_trainer_of_another_environment_is_left_alone_or_replaced(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised() as watch:
            await watch.supervisor.keep_warm(clean_env(DEVICE="0"), tmp_path / "warm.log")
            (warm,) = [worker.child.identity for worker in watch.supervisor._all]
            order = start_order(tmp_path, max_steps=1)
            identity = await watch.supervisor.start(
                "job", order, env=clean_env(DEVICE="1"), log=tmp_path / "job.log"
            )
            assert identity != warm
            assert orphan_alive(warm.pid, warm.create_time)
            await watch.supervisor.keep_warm(clean_env(DEVICE="1"), tmp_path / "warm1.log")
            assert await orphan_gone(warm.pid, warm.create_time, DEADLINE)
            await watch.exited()

    anyio.run(go)


def descriptors() -> int:
    gc.collect()  # the queues' ends are closed, and what multiprocessing keeps of a process goes with it
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
def test_cancelling_the_supervisor_lets_its_trainers_save_and_leave(tmp_path: Path) -> None:
    resource_tracker.ensure_running()

    async def go() -> list[Any]:
        before = descriptors()
        async with supervised(kill=False) as watch:
            await begin(watch, tmp_path)
            await watch.supervisor.keep_warm(clean_env(), tmp_path / "warm.log")
            await watch.heard(Metrics)
            identities = [worker.child.identity for worker in watch.supervisor._all]
        assert descriptors() == before
        assert multiprocessing.active_children() == []
        return identities

    identities = anyio.run(go)
    assert len(identities) == 2
    for one in identities:
        assert anyio.run(orphan_gone, one.pid, one.create_time, DEADLINE)
    *_, saved, goodbye = [numbered.event for numbered, _ in read_leftovers(tmp_path / "checkpoints")]
    assert isinstance(saved, Saved)
    assert saved.reason == "parent_lost"
    assert goodbye == Left("parent_lost", saved.step)
    assert json.loads((Path(saved.path) / "state.json").read_text())["step"] == saved.step


def test_nothing_outlives_a_supervisor_that_was_told_to_kill(tmp_path: Path) -> None:
    async def go() -> Any:
        async with supervised(kill=False) as watch:
            await begin(watch, tmp_path)
            await watch.supervisor.keep_warm(clean_env(), tmp_path / "warm.log")
            await watch.heard(Metrics)
            both = [worker.child.identity for worker in watch.supervisor._all]
            await watch.supervisor.kill_all()
            assert not any(orphan_alive(one.pid, one.create_time) for one in both)
            assert (await watch.exited()).signal == signal.SIGKILL
            await begin(watch, tmp_path, start_order(tmp_path, "step=0.01", attempt=2, max_steps=100_000))
            return watch.supervisor.alive()["job"]

    late = anyio.run(go)
    assert not orphan_alive(late.pid, late.create_time)


def test_a_warm_trainer_whose_job_is_called_off_is_not_forgotten(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised(term_grace=0.1) as watch:
            await watch.supervisor.keep_warm(clean_env(), tmp_path / "warm.log")
            (warm,) = [worker.child.identity for worker in watch.supervisor._all]
            os.kill(warm.pid, signal.SIGSTOP)  # before its imports are done
            with anyio.move_on_after(0.1) as called_off:
                await begin(watch, tmp_path)
            assert called_off.cancelled_caught
            assert await orphan_gone(warm.pid, warm.create_time, DEADLINE)
            await begin(watch, tmp_path, start_order(tmp_path, max_steps=1))
            await watch.exited()

    anyio.run(go)


def test_warm_trainers_that_fail_are_started_ever_more_rarely(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised("agent.trainer.absent") as watch:
            supervisor = watch.supervisor
            for pause in (5.0, 10.0, 20.0):
                supervisor._warm_not_before = 0.0  # the last pause is over
                await supervisor.keep_warm(clean_env(), tmp_path / "warm.log")
                assert len(supervisor._all) == 1
                with anyio.fail_after(DEADLINE):
                    while supervisor._all:  # noqa: ASYNC110  nobody is told of the end of a warm one
                        await anyio.sleep(0.01)
                await supervisor.keep_warm(clean_env(), tmp_path / "warm.log")
                assert supervisor._all == []
                assert supervisor._warm_pause == pause

    anyio.run(go)


class SmallAgent:
    """An agent of its own process, which can be killed and stopped."""

    def __init__(self, folder: Path, words: str, steps: int) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "tests.support.children", str(folder), words, str(steps)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.pid, self.create_time = json.loads(self._line())
        assert self._line() == "training\n"

    def _line(self) -> str:
        out: IO[str] | None = self.process.stdout
        assert out is not None
        return out.readline()

    def __enter__(self) -> "SmallAgent":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        assert anyio.run(orphan_gone, self.pid, self.create_time, DEADLINE)


def test_an_agent_that_breaks_down_leaves_at_once_and_its_trainer_saves(tmp_path: Path) -> None:
    with SmallAgent(tmp_path, "step=0.01", 100_000) as agent:
        os.kill(agent.pid, signal.SIGSTOP)  # a save that lasts
        agent.process.terminate()
        assert agent.process.wait(timeout=DEADLINE) == 1
        assert orphan_alive(agent.pid, agent.create_time)
        os.kill(agent.pid, signal.SIGCONT)
        assert anyio.run(orphan_gone, agent.pid, agent.create_time, DEADLINE)
    *_, saved, goodbye = [numbered.event for numbered, _ in read_leftovers(tmp_path / "checkpoints")]
    assert isinstance(saved, Saved)
    assert goodbye == Left("parent_lost", saved.step)


def test_when_the_agent_is_killed_the_trainer_saves_leaves_its_points_and_goes(tmp_path: Path) -> None:
    with SmallAgent(tmp_path, "step=0.01", 100_000) as agent:
        # Stopped first, so that points pile up that nobody commits.
        agent.process.send_signal(signal.SIGSTOP)
        assert not anyio.run(orphan_gone, agent.pid, agent.create_time, 0.5)
        agent.process.kill()
        assert anyio.run(orphan_gone, agent.pid, agent.create_time, DEADLINE)
    left = [numbered for numbered, _ in read_leftovers(tmp_path / "checkpoints")]
    numbers = [numbered.number for numbered in left]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    *points, saved, goodbye = [numbered.event for numbered in left]
    assert len(points) > 10
    assert isinstance(saved, Saved)
    assert saved.reason == "parent_lost"
    assert goodbye == Left("parent_lost", saved.step)
    state = json.loads((Path(saved.path) / "state.json").read_text())
    assert state["step"] == saved.step == points[-1].step

    # What the next agent does: go on from there, with these points.
    async def next_agent() -> None:
        async with supervised() as watch:
            order = start_order(tmp_path, attempt=2, max_steps=saved.step + 5)
            await begin(watch, tmp_path, order)
            await watch.exited(attempt=2)
            assert watch.events(Metrics)[0].step == saved.step + 1

    anyio.run(next_agent)
    # They wait until somebody has committed them.
    assert len(read_leftovers(tmp_path / "checkpoints")) == len(left)
    forget_leftovers(tmp_path / "checkpoints")
    assert read_leftovers(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("stopped", [1, pytest.param(60, marks=pytest.mark.slow)])
def test_with_the_agent_stopped_training_goes_on_at_its_pace_and_no_point_is_lost(
    tmp_path: Path, stopped: int
) -> None:
    steps = 800 * stopped  # of 2 ms and more: they last longer than the agent is stopped
    with SmallAgent(tmp_path, "step=0.002", steps) as agent:
        agent.process.send_signal(signal.SIGSTOP)
        began = time.time()
        anyio.run(anyio.sleep, stopped)
        ended = time.time()
        agent.process.send_signal(signal.SIGCONT)
        assert agent.process.wait(timeout=stopped * 10 + DEADLINE) == 0
    told = json.loads((tmp_path / "agent.json").read_text())
    assert told["sentence"] == "The trainer finished."
    assert told["faults"] == []
    assert [step for step, _ in told["points"]] == list(range(1, steps + 1))
    times = [at for _, at in told["points"]]
    inside = [later - at for at, later in pairwise(times) if began < at and later < ended]
    outside = [later - at for at, later in pairwise(times) if later < began or ended < at]
    print(f"a step: {median(inside):.6f} s with the agent stopped, {median(outside):.6f} s otherwise")
    # The machine may be busy with other things; one that waited for the agent would have made no step.
    assert median(inside) < 2 * median(outside)


def test_leftovers_that_cannot_be_read_are_put_aside(tmp_path: Path) -> None:
    (tmp_path / LEFTOVERS).write_bytes(b"\x91\xa3abc")
    with pytest.raises(BadLeftovers, match="could not be taken in"):
        read_leftovers(tmp_path)
    assert read_leftovers(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == [LEFTOVERS + ".bad"]
