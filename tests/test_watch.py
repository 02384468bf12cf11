"""What jobs print on its way to the backend: read once, by one at a time, and what is left out is told."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import pynvml
import pytest
from loguru import logger

from agent.core.job import Job
from agent.desk import JobDesk
from agent.runtime import devices
from agent.runtime.journal import JournalFull, Tx
from agent.runtime.redact import Redactor
from agent.watch import Watch
from protocol.lifecycle import JobState
from protocol.messages import Lane
from protocol.records import LogChunk
from tests.runtime.test_devices import Driver
from tests.support.broken_disk import needs_descriptors, unwritable
from tests.support.desks import EPOCH, desk_in, job, settings, stored


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A driver of a card that answers nothing until this is set, and then that there is no card."""
    driver, answering = ModuleType("pynvml"), threading.Event()

    def init() -> None:
        answering.wait()
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    driver.nvmlInit = init  # type: ignore[attr-defined]
    for name in ("NVMLError", "NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded"):
        setattr(driver, name, getattr(pynvml, name))
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    devices._start.cache_clear()
    yield answering
    answering.set()
    devices._start.cache_clear()


def test_hello_does_not_wait_for_a_driver_that_hangs(
    tmp_path: Path, hung: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.watch.HELLO_WAITS", 0.1)

    async def test() -> None:
        async with desk_in(tmp_path) as desk, anyio.create_task_group() as group:
            watch = Watch(desk, settings(tmp_path), Redactor())
            ticks = 0

            async def tick() -> None:
                nonlocal ticks
                while True:
                    await anyio.sleep(0.01)
                    ticks += 1

            group.start_soon(watch.send_figures)
            group.start_soon(watch.look)
            group.start_soon(tick)
            for _ in range(2):
                with anyio.fail_after(20):
                    machine = await watch.machine()
            assert machine.gpus == []
            assert machine.cpu and machine.ram_gb > 0 and machine.disk_total_gb > 0
            # Who starts jobs still waits for the driver, and nobody blocks the others meanwhile.
            assert watch.inventory is None
            assert ticks > 0
            hung.set()
            with anyio.fail_after(20):
                assert "restart of the machine" in (await watch.look()).gpu_problem
            group.cancel_scope.cancel()

    anyio.run(test)


def test_cards_that_are_found_after_hello_are_told_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.watch.HELLO_WAITS", 0.1)
    driver, answering, again = Driver(), threading.Event(), anyio.Event()
    driver.answers["Init"] = answering.wait
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    devices._start.cache_clear()

    async def test() -> None:
        async with desk_in(tmp_path) as desk:
            watch = Watch(desk, settings(tmp_path), Redactor())
            watch.on_late_cards = again.set
            assert (await watch.machine()).gpus == []
            answering.set()
            await watch.look()
            assert again.is_set()
            assert len((await watch.machine()).gpus) == 2

    try:
        anyio.run(test)
    finally:
        answering.set()
        devices._start.cache_clear()


def test_memory_of_a_gpu_is_gone_only_when_the_driver_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "ANSWER_WITHIN", 0.1)
    monkeypatch.setattr("agent.watch.GPU_FREE_WITHIN", 0.5)
    driver, answering, holding = Driver(), threading.Event(), [SimpleNamespace(pid=4242)]

    def processes(handle: int) -> Any:
        answering.wait()
        return holding

    driver.answers["DeviceGetComputeRunningProcesses"] = processes
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    devices._start.cache_clear()

    async def test() -> None:
        async with desk_in(tmp_path) as desk:
            watch = Watch(desk, settings(tmp_path), Redactor())
            assert not await watch.gpu_released(frozenset({4242}))
            monkeypatch.setattr("agent.watch.GPU_FREE_WITHIN", 30.0)
            holding.clear()
            # It is asked until it answers.
            async with anyio.create_task_group() as group:
                group.start_soon(anyio.to_thread.run_sync, lambda: answering.wait(0.5) or answering.set())
                assert await watch.gpu_released(frozenset({4242}))

    try:
        anyio.run(test)
    finally:
        answering.set()
        devices._start.cache_clear()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What is logged as a warning."""
    told: list[str] = []
    sink = logger.add(lambda message: told.append(str(message)), level="WARNING", format="{message}")
    yield told
    logger.remove(sink)


async def until(true: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not true():  # noqa: ASYNC110 - the log tells nobody
            await anyio.sleep(0.02)


@needs_descriptors
def test_a_disk_that_refuses_writes_for_a_while_ends_neither_figures_nor_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setattr("agent.watch.LOG_EVERY", 0.05)
    log_in(tmp_path, "one\n")
    sent = msgspec.structs.replace(
        settings(tmp_path), backend_url="https://platform.example", gpu_monitoring_interval_seconds=0.05
    )

    async def test() -> None:
        async with desk_in(tmp_path, job(JobState.RUNNING)) as desk, anyio.create_task_group() as group:
            watch = Watch(desk, sent, Redactor())
            desk.held["j"] = "cpu"
            watch.printing(desk.job("j"))
            with unwritable(tmp_path / "journal.sqlite-wal"):
                group.start_soon(watch.send_figures)
                group.start_soon(watch.follow_logs)
                for words in ("figures", "log of job j"):
                    await until(lambda: sum(words in one for one in warnings) >= 3)  # noqa: B023
            assert all("refuses writes" in one for one in warnings)
            with anyio.fail_after(30):
                while not (await chunks(desk) and await stored(desk, "", Lane.METRICS)):  # noqa: ASYNC110
                    await anyio.sleep(0.02)
            assert await chunks(desk) == [(["one"], 0)]
            group.cancel_scope.cancel()

    anyio.run(test)


def log_in(folder: Path, text: str) -> Path:
    path = folder / "logs" / "j.log"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


async def chunks(desk: JobDesk) -> list[tuple[list[str], int]]:
    """Return lines and how many were left out, of each chunk that is stored."""
    return [
        (one.lines, one.dropped) for one in await stored(desk, "j", Lane.LOGS) if isinstance(one, LogChunk)
    ]


def test_a_log_that_is_asked_for_is_not_read_by_two_at_once(tmp_path: Path) -> None:
    lines = [f"line {number}" for number in range(20_000)]
    log_in(tmp_path, "\n".join(lines) + "\n")

    async def test() -> None:
        async with desk_in(tmp_path, job(JobState.RUNNING), outbox=1 << 30) as desk:
            watch = Watch(desk, settings(tmp_path), Redactor())
            desk.held["j"] = "cpu"
            watch.printing(desk.job("j"))
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(watch.look_at_logs)
            sent = [line for part, _ in await chunks(desk) for line in part]
            assert sent == lines
            async with anyio.create_task_group() as group:
                group.start_soon(watch.send_log_from, "j", 0)
                group.start_soon(watch.look_at_logs)
            again = [line for part, _ in await chunks(desk) for line in part]
            assert again == lines + lines

    anyio.run(test)


def test_the_last_line_of_an_ended_job_is_sent_on_demand_too(tmp_path: Path) -> None:
    log_in(tmp_path, "one\nTraceback")

    async def test() -> None:
        async with desk_in(tmp_path, job(JobState.FAILED)) as desk:
            watch = Watch(desk, settings(tmp_path), Redactor())
            await watch.send_log_from("j", 0)
            assert await chunks(desk) == [(["one"], 0), (["Traceback"], 0)]

    anyio.run(test)


@pytest.mark.parametrize("restart", [False, True])
def test_lines_that_were_left_out_are_told_at_the_end_whatever_befell_the_agent(
    tmp_path: Path, restart: bool
) -> None:
    log_in(tmp_path, "one\ntwo\nthree\n")

    async def first() -> None:
        async with desk_in(tmp_path, job(JobState.RUNNING), outbox=0) as desk:
            watch = Watch(desk, settings(tmp_path), Redactor())
            desk.held["j"] = "cpu"
            watch.printing(desk.job("j"))
            await watch.look_at_logs()
            assert desk.ledger.left_out("j") == 3
            if not restart:
                await end(desk, watch)

    async def end(desk: JobDesk, watch: Watch) -> None:
        desk.held.clear()
        watch.printing(desk.job("j"))
        await watch.look_at_logs()
        # The backend takes nothing, and still the end of the log says what is missing.
        assert await chunks(desk) == [([], 3)]
        assert desk.ledger.left_out("j") == 0

    async def second() -> None:
        async with desk_in(tmp_path, outbox=0) as desk:
            await end(desk, Watch(desk, settings(tmp_path), Redactor()))

    anyio.run(first)
    if restart:
        anyio.run(second)


def test_lines_that_were_left_out_are_counted_once_though_the_disk_was_full(tmp_path: Path) -> None:
    log_in(tmp_path, "one\ntwo\n")

    async def test() -> None:
        async with desk_in(tmp_path, job(JobState.RUNNING), outbox=0) as desk:
            watch = Watch(desk, settings(tmp_path), Redactor())
            chunk = LogChunk(0.0, 1, 0, ["one", "two"])
            for _ in range(2):
                with pytest.raises(JournalFull):
                    await desk.append("j", Lane.LOGS, [chunk], also=no_room)
            assert desk.ledger.left_out("j") == 0
            desk.held["j"] = "cpu"
            watch.printing(desk.job("j"))
            await watch.look_at_logs()
            assert desk.ledger.left_out("j") == 2
            await desk.ledger.journal.write(lambda tx: tx.trim(EPOCH, "j", Lane.CONTROL, 2))
            desk.ledger.count({})
            # What could not be written then has told nobody: the next chunk says it again.
            with pytest.raises(JournalFull):
                await desk.append("j", Lane.LOGS, [LogChunk(0.0, 1, 8, [])], also=no_room)
            await desk.append("j", Lane.LOGS, [LogChunk(0.0, 1, 8, ["three"])])
            assert await chunks(desk) == [(["three"], 2)]

    anyio.run(test)


def no_room(tx: Tx) -> None:
    raise JournalFull(Path("journal"))


def test_a_log_is_read_on_where_an_agent_was_killed_after_the_jobs_end(tmp_path: Path) -> None:
    path = log_in(tmp_path, "one\n")

    async def first() -> None:
        async with desk_in(tmp_path, job(JobState.RUNNING), job(JobState.FAILED, "k")) as desk:
            watch = Watch(desk, settings(tmp_path), Redactor())

            def told(tx: Tx) -> None:
                for name in "jk":
                    tx.put_secret(name, "job_token", "t")
                    tx.trim(EPOCH, name, Lane.CONTROL, 1)

            await desk.ledger.journal.write(told)
            desk.held["j"] = "cpu"
            watch.printing(desk.job("j"))
            await watch.look_at_logs()
            await desk.ledger.journal.write(lambda tx: tx.trim(EPOCH, "j", Lane.LOGS, 1))
            desk.held.clear()
            await desk.change("j", lambda job: (ended(job), []))
            path.write_text("one\nTraceback")

    async def second() -> None:
        async with desk_in(tmp_path) as desk:
            watch = Watch(desk, settings(tmp_path), Redactor())
            await watch.reopen()
            assert desk.ledger.open_logs == {"j"}
            tokens = await desk.ledger.journal.read(
                lambda rows: [rows.get_secret(name, "job_token") for name in "jk"]
            )
            assert tokens == ["t", None]
            await watch.look_at_logs()
            assert await chunks(desk) == [(["Traceback"], 0)]
            await watch.reopen()
            assert desk.ledger.open_logs == set()

    anyio.run(first)
    anyio.run(second)


def ended(running: Job) -> Job:
    return msgspec.structs.replace(running, state=JobState.FAILED)
