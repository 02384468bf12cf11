import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from agent.runtime.boot import Plan
from agent.runtime.process import Child, orphan_alive, orphan_gone
from agent.runtime.supervisor import Exited, Fact, Heard, Supervisor
from agent.runtime.tree import Identity, identify, members
from protocol.worker import Committed, EvaluateNow, Metrics, Note
from tests.support.children import DEADLINE, FAKE, HOSTILE, Watch, clean_env, start_order, supervised

Scene = Callable[[Watch], Awaitable[None]]


def hostile(folder: Path, behaviour: str, scene: Scene, **options: Any) -> None:
    """Play a scene with a child of this behaviour; afterwards it and its session are gone."""

    async def go() -> None:
        async with supervised(HOSTILE, **options) as watch:
            env = clean_env(BEHAVIOUR=behaviour)
            child = await watch.supervisor.start("job", start_order(folder), env=env, log=folder / "job.log")
            await scene(watch)
            assert members(child.pid) == frozenset()

    anyio.run(go)


@pytest.mark.parametrize(
    ("behaviour", "sentence"),
    [
        ("bomb {folder}/exploded", "bytes that are no event"),
        ("deep", "bytes that are no event"),
        ("garbage", "a frame of -66052 bytes was announced; at most 1048576"),
        ("oversize", "a frame of 2097152 bytes was announced; at most 1048576"),
        ("endless", "a frame of over 2 GiB was announced"),
        ("gap", "said event 3 of attempt 1 where event 2 of attempt 1 was due"),
    ],
)
def test_what_is_no_event_hurts_nothing_and_ends_the_child(
    tmp_path: Path, behaviour: str, sentence: str
) -> None:
    async def scene(watch: Watch) -> None:
        end = await watch.exited()
        assert end.signal == signal.SIGKILL
        assert end.released
        (fault,) = watch.faults()
        assert sentence in fault
        assert end.sentence.startswith(fault)

    hostile(tmp_path, behaviour.format(folder=tmp_path), scene)
    assert not (tmp_path / "exploded").exists()


def test_all_that_was_put_arrives_from_a_killed_child_and_then_its_exit(tmp_path: Path) -> None:
    async def scene(watch: Watch) -> None:
        end = await watch.exited()
        assert [int(note.text) for note in watch.events()] == list(range(1, 5001))
        assert watch.facts[-1] is end
        assert (end.signal, end.exit_code) == (signal.SIGKILL, None)
        assert "which this agent did not send" in end.sentence

    hostile(tmp_path, "burst 5000", scene)


def test_half_an_event_holds_nobody_up(tmp_path: Path) -> None:
    async def scene(watch: Watch) -> None:
        await watch.exited()
        assert [note.text for note in watch.events()] == ["whole"]
        assert watch.faults() == []

    hostile(tmp_path, "half", scene)


def test_a_crash_in_native_code_is_named(tmp_path: Path) -> None:
    async def scene(watch: Watch) -> None:
        end = await watch.exited()
        assert "ended by SIGSEGV" in end.sentence
        assert any("Fatal Python error: Segmentation fault" in line for line in end.log_tail)

    hostile(tmp_path, "segfault", scene)


def test_one_that_closes_its_queue_and_stays_is_ended(tmp_path: Path) -> None:
    async def scene(watch: Watch) -> None:
        end = await watch.exited()
        assert end.signal == signal.SIGTERM
        assert "since it had not left by itself" in end.sentence

    hostile(tmp_path, "close", scene, kill_limit=0.2)


def test_one_that_floods_is_read_no_faster_than_it_is_heard(tmp_path: Path) -> None:
    async def go() -> None:
        send, receive = anyio.create_memory_object_stream[list[Fact]](8)
        supervisor = Supervisor(facts=send, module=HOSTILE)
        async with anyio.create_task_group() as tasks:
            await tasks.start(supervisor.run)
            env = clean_env(BEHAVIOUR="flood")
            child = await supervisor.start("job", start_order(tmp_path), env=env, log=tmp_path / "log")
            # The first is taken, then nothing: the child fills whatever there is to fill.
            with anyio.fail_after(DEADLINE):
                await receive.receive()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            lag = 0.0
            for _ in range(50):
                at = time.monotonic()
                await anyio.sleep(0.01)
                lag = max(lag, time.monotonic() - at)
            assert lag < 5, "the loop was held up"
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10
            await supervisor.kill_all()
            assert members(child.pid) == frozenset()
            with anyio.fail_after(DEADLINE):
                while not isinstance((facts := await receive.receive())[-1], Exited):
                    assert all(isinstance(fact, Heard) for fact in facts)
            tasks.cancel_scope.cancel()
        send.close()
        receive.close()

    anyio.run(go)


@pytest.mark.parametrize("apart", [1, 2])
def test_a_deaf_child_and_its_grandchild_are_gone_after_the_ladder(tmp_path: Path, apart: int) -> None:
    async def go() -> None:
        async with supervised(term_grace=0.1) as watch:
            order = start_order(tmp_path, f"step=0.01 deaf=1 grandchild={apart}", max_steps=100_000)
            child = await watch.supervisor.start("job", order, env=clean_env(), log=tmp_path / "job.log")
            note = await watch.heard(Note)
            grandchild = identify(int(note.text.split()[1]))
            assert grandchild is not None
            await watch.heard(Metrics)
            await watch.supervisor.end("job", grace=0.1)
            end = await watch.exited()
            assert end.signal == signal.SIGKILL
            assert end.released
            assert identify(grandchild.pid) != grandchild
            assert not orphan_alive(child.pid, child.create_time)

    anyio.run(go)


def test_a_grandchild_that_holds_the_pipe_does_not_delay_the_news_of_death(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised() as watch:
            order = start_order(tmp_path, "step=0.01 grandchild=1", max_steps=100_000)
            child = await watch.supervisor.start("job", order, env=clean_env(), log=tmp_path / "job.log")
            note = await watch.heard(Note)
            os.kill(child.pid, signal.SIGKILL)
            end = await watch.exited()
            assert end.signal == signal.SIGKILL
            assert identify(int(note.text.split()[1])) is None

    anyio.run(go)


def test_orders_to_one_that_does_not_read_wait_without_holding_up_the_loop(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised() as watch:
            order = start_order(tmp_path, "step=0.01", max_steps=100_000)
            child = await watch.supervisor.start("job", order, env=clean_env(), log=tmp_path / "job.log")
            await watch.heard(Metrics)
            os.kill(child.pid, signal.SIGSTOP)
            with anyio.fail_after(DEADLINE):
                for number in range(2000):
                    watch.supervisor.ask("job", EvaluateNow("x" * 2000))
                    watch.supervisor.ask("job", Committed(number))
                    await anyio.lowlevel.checkpoint()
            os.kill(child.pid, signal.SIGCONT)
            await watch.supervisor.end("job", grace=DEADLINE)
            assert (await watch.exited()).left == "cancelled"

    anyio.run(go)


def test_a_log_that_cannot_be_written_is_told_to_the_caller(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def go() -> None:
        async with supervised() as watch:
            with pytest.raises(OSError, match="file"):
                await watch.supervisor.start(
                    "job", start_order(tmp_path), env={}, log=tmp_path / "file" / "job.log"
                )

    anyio.run(go)


def test_a_process_is_known_by_more_than_its_number() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    identity = identify(child.pid)
    assert identity is not None
    assert orphan_alive(identity.pid, identity.create_time)
    assert not orphan_alive(identity.pid, identity.create_time + 1)
    assert anyio.run(orphan_gone, identity.pid, identity.create_time + 1, 0.0)
    assert not anyio.run(orphan_gone, identity.pid, identity.create_time, 0.05)
    assert child.stdin is not None
    child.stdin.close()
    assert anyio.run(orphan_gone, identity.pid, identity.create_time, DEADLINE)
    # A zombie, which still has its number, counts as gone.
    assert identify(child.pid) is None
    child.wait()
    assert not orphan_alive(identity.pid, identity.create_time)


def test_a_child_can_be_buried_without_its_tending(tmp_path: Path) -> None:
    async def go() -> Identity:
        child = Child(Plan(FAKE, str(tmp_path / "log"), clean_env()))
        identity = child.start()
        await child.bury(DEADLINE)
        assert child.exit_code == -signal.SIGKILL
        return identity

    identity = anyio.run(go)
    assert not orphan_alive(identity.pid, identity.create_time)
