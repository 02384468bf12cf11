"""The guard on a real desk: what it lets go on and when, and what it finds out about an end."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import msgspec
import pytest

from agent.config import Settings, load
from agent.core.job import Job, rest
from agent.desk import JobDesk
from agent.guard import IS_BACK, TICK, Guard
from agent.hearing import Hearing
from agent.launch import Launching
from agent.runtime import devices
from agent.runtime.hostmem import Memory
from agent.runtime.redact import Redactor
from agent.runtime.supervisor import Exited, Fact, Heard
from agent.witness import MOMENTS, Witness
from protocol.failures import FailureReason, failure
from protocol.lifecycle import JobState
from protocol.messages import Gpu
from protocol.records import Notice
from protocol.worker import Failed, Metrics, Numbered, Ready
from tests.runtime.test_devices import Driver, xid_event
from tests.test_desk import desk_in, job, stored

GB = 1 << 30
S, R = JobState, FailureReason


class Machine:
    """Time and memory as a test sets them; everything else is this machine's."""

    def __init__(self, desk: JobDesk, folder: Path, **more: str) -> None:
        self.time = 1000.0
        self.available = 8 * GB
        self.settings: Settings = load({"AGENT_HOME": str(folder), "BACKEND_URL": "none", **more})
        redactor = Redactor(["hf_" + "s" * 20])
        self.witness = Witness(
            desk,
            self.settings,
            redactor,
            memory=lambda: Memory(self.available, 16 * GB),
            clock=lambda: self.time,
        )
        self.guard = Guard(
            desk, self.settings, redactor, self.witness, clock=lambda: self.time, monotonic=lambda: self.time
        )
        self.settings.logs_dir.mkdir(parents=True)
        desk.launcher = Launching(desk, self.settings, folder, {}, redactor, "test")
        desk.held = {name: one.device or "cpu" for name, one in desk.jobs.items() if one.state is S.RUNNING}

    async def ticks(self, count: int = 1, seconds: float = TICK) -> None:
        for _ in range(count):
            self.time += seconds
            await self.guard.tick()


def waiting(cause: str, room: int, job_id: str = "j") -> Job:
    return job(S.PAUSED, job_id, held="Full.", held_for=cause, room=room)


def run(test: Callable[[JobDesk], Any], folder: Path, *jobs: Job) -> None:
    async def body() -> None:
        async with desk_in(folder, *jobs) as desk:
            await test(desk)

    anyio.run(body)


def test_a_job_that_waits_for_memory_goes_on_when_it_stays_free(tmp_path: Path) -> None:
    async def test(desk: JobDesk) -> None:
        machine = Machine(desk, tmp_path)
        machine.available = 5 * GB
        await machine.ticks(9)
        machine.available = 7 * GB
        await machine.ticks(2)
        machine.available = 5 * GB
        await machine.ticks(1)
        machine.available = 7 * GB
        await machine.ticks(2)
        assert desk.job("j").state is S.PAUSED, "memory comes and goes"
        await machine.ticks(1)
        assert (desk.job("j").state, desk.job("j").by, desk.job("j").held_for) == (S.QUEUED, "memory", "")
        told = [record.text for record in await stored(desk, "j") if isinstance(record, Notice)]
        assert told == [IS_BACK["memory"]]

    run(test, tmp_path, waiting("memory", 6 * GB))


def test_jobs_that_wait_for_a_disk_go_on_one_at_a_time_and_one_for_good_does_not(tmp_path: Path) -> None:
    async def test(desk: JobDesk) -> None:
        machine = Machine(desk, tmp_path)
        await machine.ticks(3)
        assert [desk.job(name).state for name in ("a", "b", "c", "d")] == [
            S.QUEUED,
            S.PAUSED,
            S.PAUSED,
            S.PAUSED,
        ]
        await machine.ticks(9)
        assert [desk.job(name).state for name in ("b", "c", "d")] == [S.QUEUED, S.PAUSED, S.PAUSED]

    petabyte = 1 << 50
    run(
        test,
        tmp_path,
        waiting("disk", 1, "a"),
        waiting("disk", 1, "b"),
        waiting("disk", petabyte, "c"),
        waiting("disk", 0, "d"),
    )


def test_a_disk_that_takes_no_checkpoints_keeps_no_job_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Home, logs and data lie on a small disk."""
    big = tmp_path / "big"
    big.mkdir()

    def usage(path: str) -> SimpleNamespace:
        return SimpleNamespace(total=9 * GB, free=8 * GB if Path(path).is_relative_to(big) else GB)

    monkeypatch.setattr("psutil.disk_usage", usage)

    async def test(desk: JobDesk) -> None:
        places = {"CHECKPOINTS_DIR": str(big / "checkpoints"), "MODELS_DIR": str(big / "models")}
        machine = Machine(desk, tmp_path, **places)
        assert (await machine.guard.seen("j", 1)).disk_free == 8 * GB
        assert machine.witness.where == f"{big / 'checkpoints'} and {big / 'models'}"
        await machine.ticks(9)
        states = {name: desk.job(name).state for name in ("j", "more", "data")}
        assert states == {"j": S.QUEUED, "more": S.PAUSED, "data": S.PAUSED}

    data = msgspec.structs.replace(waiting("disk", 2 * GB, "data"), dataset_size=2 * GB)
    run(test, tmp_path, data, waiting("disk", 9 * GB, "more"), waiting("disk", 2 * GB))


def test_a_quota_that_nobody_tells_of_makes_no_job_go_on_every_moment(tmp_path: Path) -> None:
    async def test(desk: JobDesk) -> None:
        machine = Machine(desk, tmp_path)
        await machine.ticks(3)
        assert desk.job("j").state is S.QUEUED
        await desk.change("j", lambda job: (msgspec.structs.replace(waiting("disk", 1), attempt=2), []))
        await machine.ticks(55)
        assert desk.job("j").state is S.PAUSED
        await machine.ticks(9)
        assert desk.job("j").state is S.QUEUED

    run(test, tmp_path, waiting("disk", 1))


def test_a_start_of_the_agent_does_not_end_the_wait(tmp_path: Path) -> None:
    async def test(desk: JobDesk) -> None:
        await desk.begin()
        assert desk.job("j").state is S.PAUSED
        assert desk.job("k").state is S.QUEUED

    desk_held = job(S.PAUSED, "k", held="The agent was stopped.")

    async def body() -> None:
        async with desk_in(tmp_path, waiting("disk", 1 << 50), desk_held) as desk:
            desk.draining = False
            desk.devices = []
            await test(desk)

    anyio.run(body)


def test_a_machine_that_sleeps_makes_nobody_stand_still(tmp_path: Path) -> None:
    async def test(desk: JobDesk) -> None:
        machine = Machine(desk, tmp_path, STALL_MIN_SECONDS="10", STALL_FACTOR="2")
        ended: list[str] = []

        async def end(job_id: str, attempt: int, sentence: str) -> None:
            ended.append(sentence)

        machine.guard._end = end  # type: ignore[method-assign]  # there is no process here to be ended
        machine.guard.heard("j", 1, Ready(9, 1.0, 0, 9, 0, "cpu", 1, 1, 1, 1))
        for step in range(1, 5):
            await machine.ticks()
            machine.guard.heard("j", 1, Metrics(step, 0.0, 0.0, {"train_loss": 1.0}))
        await machine.ticks(1, seconds=8 * 3600.0)
        assert ended == [], "the night was the machine's"
        await machine.ticks(40)
        assert len(ended) == 1 and "after step 4" in ended[0]
        await machine.ticks(40)
        assert len(ended) == 1

    run(test, tmp_path, job(S.RUNNING))


def test_a_full_journal_or_no_factor_is_no_stall(tmp_path: Path) -> None:
    async def test(desk: JobDesk) -> None:
        off = Machine(desk, tmp_path / "off", STALL_FACTOR="0")
        off.guard.heard("j", 1, Ready(9, 1.0, 0, 9, 0, "cpu", 1, 1, 1, 1))
        assert off.guard._paces == {}

    run(test, tmp_path, job(S.RUNNING))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """NVML of a machine with two cards; its events are the real library's structs."""
    made = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    devices._start.cache_clear()
    return made


@pytest.fixture(autouse=True)
def _forget_nvml() -> Any:
    yield
    devices._start.cache_clear()


CARDS = [Gpu(0, "Card", 24.0, "GPU-100"), Gpu(1, "Card", 24.0, "GPU-101")]


async def hear(desk: JobDesk, machine: Machine, *facts: Fact) -> None:
    send, receive = anyio.create_memory_object_stream[list[Fact]](len(facts))
    hearing = Hearing(desk, lambda event: event)
    hearing.look = machine.guard.seen
    hearing.on_event = machine.guard.heard
    with send:
        for fact in facts:
            await send.send([fact])
    with receive:
        await hearing.run(receive)


def exited(number: int | None = None, left: str = "", need: int = 0) -> Exited:
    return Exited("j", 1, None if number else 1, number, left, True, [], "The trainer ended.", need)


@pytest.mark.parametrize("device", ["0", "GPU-100", "MIG-7"])
def test_a_trainer_that_dies_after_an_error_of_its_card_fails_for_it(
    tmp_path: Path, driver: Driver, device: str
) -> None:
    async def test(desk: JobDesk) -> None:
        machine = Machine(desk, tmp_path)
        machine.witness.know(SimpleNamespace(gpus=CARDS))  # type: ignore[arg-type]
        await machine.ticks()
        driver.events.append(xid_event(0, 79))
        await hear(desk, machine, exited(signal.SIGABRT))
        failed = desk.job("j").failure
        assert failed is not None and failed.reason is R.DRIVER
        assert "XID 79" in failed.sentence and "fallen off the bus" in failed.sentence
        assert "power cables" in failed.advice
        assert failed.evidence is not None and failed.evidence.xid == 79

    run(test, tmp_path, job(S.RUNNING, device=device))


def test_an_error_of_another_card_or_of_long_ago_explains_nothing(tmp_path: Path, driver: Driver) -> None:
    async def test(desk: JobDesk) -> None:
        machine = Machine(desk, tmp_path)
        machine.witness.know(SimpleNamespace(gpus=CARDS))  # type: ignore[arg-type]
        driver.events += [xid_event(0, 79), xid_event(1, 31)]
        await machine.witness.look()
        machine.time += MOMENTS + 1
        driver.events.append(xid_event(0, 48))
        await hear(desk, machine, exited(signal.SIGABRT))
        assert (desk.job("j").state, desk.job("j").detail) == (S.QUEUED, "The trainer ended.")

    run(test, tmp_path, job(S.RUNNING, device="1"))


def test_a_programs_own_error_of_the_card_is_tried_again(tmp_path: Path, driver: Driver) -> None:
    async def test(desk: JobDesk) -> None:
        machine = Machine(desk, tmp_path)
        driver.events.append(xid_event(0, 31))
        await hear(desk, machine, exited(signal.SIGABRT))
        assert desk.job("j").state is S.QUEUED and "XID 31" in desk.job("j").detail

    run(test, tmp_path, job(S.RUNNING, device="0"))


def test_a_failure_is_told_with_the_log_without_its_secrets(tmp_path: Path, driver: Driver) -> None:
    async def test(desk: JobDesk) -> None:
        machine = Machine(desk, tmp_path)
        machine.witness.know(SimpleNamespace(gpus=CARDS))  # type: ignore[arg-type]
        (machine.settings.logs_dir / "j.log").write_text(f"using hf_{'s' * 20}\nlast\n")
        event = Failed(failure(R.DRIVER, "The device reported an error: x."))
        driver.events.append(xid_event(0, 48))
        await hear(desk, machine, Heard("j", 1, Numbered(1, 1, event)))
        failed = desk.job("j").failure
        assert failed is not None and failed.evidence is not None and "XID 48" in failed.sentence
        assert failed.evidence.log_tail[-1] == "last" and "ssss" not in failed.evidence.log_tail[0]
        assert (failed.evidence.host_free_gb, failed.evidence.device_free_gb) == (8, 18)

    run(test, tmp_path, job(S.RUNNING, device="0"))


def test_an_end_is_taken_in_also_where_the_machine_cannot_be_looked_at(tmp_path: Path) -> None:
    async def test(desk: JobDesk) -> None:
        machine = Machine(desk, tmp_path)
        (machine.settings.logs_dir / "j.log").mkdir()
        await hear(desk, machine, exited(signal.SIGSEGV))
        assert desk.job("j").state is S.QUEUED

    run(test, tmp_path, job(S.RUNNING))


def test_logs_that_the_owner_keeps_are_no_evidence(tmp_path: Path) -> None:
    async def test(desk: JobDesk) -> None:
        machine = Machine(desk, tmp_path, SHARE_LOGS="false")
        (machine.settings.logs_dir / "j.log").write_text("mine\n")
        assert (await machine.guard.seen("j", 1)).log_tail == []

    run(test, tmp_path, job(S.RUNNING))


def test_a_kill_of_the_kernels_is_host_memory_when_it_counted_one(tmp_path: Path, monkeypatch: Any) -> None:
    async def test(desk: JobDesk) -> None:
        machine = Machine(desk, tmp_path)
        (tmp_path / "proc").mkdir()
        count = tmp_path / "proc" / "vmstat"
        count.write_text("oom_kill 3\n")
        kills = devices_kills(tmp_path)
        monkeypatch.setattr("agent.runtime.hostmem.oom_kills", kills)
        await machine.ticks(2)
        count.write_text("oom_kill 4\n")
        await hear(desk, machine, exited(signal.SIGKILL))
        detail = desk.job("j").detail
        assert desk.job("j").state is S.QUEUED and "out of memory and its kernel ended the trainer" in detail
        assert "8.0 of 16.0 GB were free" in detail

    run(test, tmp_path, job(S.RUNNING))


def devices_kills(folder: Path) -> Callable[[], int]:
    """The real reader, on a /proc of the test's own: nobody wants this machine to run out of memory."""
    from agent.runtime.hostmem import oom_kills

    return lambda: oom_kills(folder / "proc", folder / "none")


def test_a_job_that_left_for_a_disk_waits_for_what_it_said(tmp_path: Path) -> None:
    async def test(desk: JobDesk) -> None:
        machine = Machine(desk, tmp_path)
        need = 1 << 50
        await hear(desk, machine, exited(left="disk_full", need=need))
        stands = desk.job("j")
        assert (stands.state, stands.by, stands.room) == (S.PAUSED, "disk", need)
        assert f"{need >> 20} MB are needed" in stands.detail

    run(test, tmp_path, job(S.RUNNING))
    assert rest(job(S.RUNNING), "disk", "x", room=1, now=0.0)[0].state is S.PAUSED


def test_a_start_that_finds_no_room_waits_for_it(tmp_path: Path) -> None:
    async def test(desk: JobDesk) -> None:
        await desk.not_started("j", R.DISK_FULL, "The job's folders cannot be made.")
        stands = desk.job("j")
        assert (stands.state, stands.by, stands.failure) == (S.PAUSED, "disk", None)
        assert "256 MB are free; resume it to try at once" in stands.detail

    run(test, tmp_path, job(S.PREPARING))


@pytest.mark.parametrize(("device", "fraction", "told"), [("0", "1", 1), ("1", "0.75", 0), ("cpu", "1", 0)])
def test_a_device_that_others_use_is_told_of_before_a_start(
    tmp_path: Path, driver: Driver, device: str, fraction: str, told: int
) -> None:
    async def test(desk: JobDesk) -> None:
        machine = Machine(desk, tmp_path, GPU_MEMORY_FRACTION=fraction)
        machine.witness.know(SimpleNamespace(gpus=CARDS))  # type: ignore[arg-type]
        await machine.guard.look_at_device(desk.job("j"))
        said = [record.text for record in await stored(desk, "j") if isinstance(record, Notice)]
        assert len(said) == told
        assert not told or "hold 6.0 of the 24.0 GB of GPU 0" in said[0]

    run(test, tmp_path, job(S.PREPARING, device=device))
