"""The desk and what stands around it, on a real journal: commands, exits, what the owner keeps."""

import errno
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from agent.errors import NotPossible
from agent.hearing import NOT_PROVED, Hearing
from agent.launch import FETCHED, Launching
from agent.runtime.journal import JournalRefused
from agent.runtime.redact import Redactor
from agent.runtime.supervisor import Exited, Fact, Heard
from agent.watch import Watch
from protocol.lifecycle import JobState, Want
from protocol.messages import Command, Lane
from protocol.records import CommandDone, Notice, Schema
from protocol.worker import Metrics, Numbered
from tests.support.broken_disk import needs_descriptors, unwritable
from tests.support.desks import desk_in, job, settings, stored, uplink_of


def test_a_link_that_breaks_in_a_command_leaves_it_done_and_answered(tmp_path: Path) -> None:
    async def test() -> None:
        async with desk_in(tmp_path, job(JobState.FAILED)) as desk:
            uplink = uplink_of(desk)
            retry = Command("c-1", "retry", "j")
            async with anyio.create_task_group() as connection:
                connection.start_soon(uplink.commanded, retry)
                await anyio.lowlevel.checkpoint()
                connection.cancel_scope.cancel()
            assert desk.job("j").state is JobState.QUEUED
            # The backend had no answer and asks again: it hears the same, and nothing is done twice.
            await uplink.commanded(retry)
            answers = [record for record in await stored(desk, "") if isinstance(record, CommandDone)]
            assert [answer.status for answer in answers] == ["done", "done"]

    anyio.run(test)


@pytest.mark.parametrize("released", [True, False])
def test_memory_that_was_not_seen_to_leave_the_device_is_told(tmp_path: Path, released: bool) -> None:
    async def test() -> None:
        async with desk_in(tmp_path, job(JobState.PAUSING, want=Want.PAUSE)) as desk:
            desk.held["j"] = "0"
            send, facts = anyio.create_memory_object_stream[list[Fact]](1)
            with send:
                await send.send([Exited("j", 1, 0, None, "paused", released, [], "The trainer left.")])
            with facts:
                await Hearing(desk, lambda event: event).run(facts)
            assert desk.job("j").state is JobState.PAUSED
            assert desk.held == {}
            told = [record.text for record in await stored(desk, "j") if isinstance(record, Notice)]
            assert told == ([] if released else [NOT_PROVED])

    anyio.run(test)


def test_devices_are_the_owners_choice_then_cudas_then_what_there_is(tmp_path: Path) -> None:
    async def test() -> None:
        async with desk_in(tmp_path) as desk:
            plain = Watch(desk, settings(tmp_path), Redactor())
            assert plain.devices(None) == ["cpu"]
            assert plain.devices("1, GPU-abc") == ["1", "GPU-abc"]
            assert plain.devices("") == ["cpu"]
            chosen = Watch(desk, settings(tmp_path, DEVICES="3"), Redactor())
            assert chosen.devices("1") == ["3"]

    anyio.run(test)


def test_logs_that_the_owner_keeps_are_not_sent_on_demand_either(tmp_path: Path) -> None:
    async def test() -> None:
        async with desk_in(tmp_path, job(JobState.COMPLETED)) as desk:
            watch = Watch(desk, settings(tmp_path, SHARE_LOGS="false"), Redactor())
            with pytest.raises(NotPossible, match="SHARE_LOGS"):
                await watch.send_log_from("j", 0)

    anyio.run(test)


def test_a_fetched_data_set_is_kept_for_as_long_as_a_job_may_need_it(tmp_path: Path) -> None:
    async def test() -> None:
        needed, done = "a" * 64, "b" * 64
        jobs = [
            job(JobState.FAILED, dataset_sha256=needed),
            job(JobState.COMPLETED, "k", dataset_sha256=done),
        ]
        async with desk_in(tmp_path, *jobs) as desk:
            folder = tmp_path / "datasets" / FETCHED
            folder.mkdir(parents=True)
            for name in (needed, done):
                (folder / f"{name}.data").write_text("rows")
            Launching(desk, settings(tmp_path), tmp_path, {}, Redactor(), "test").prune()
            assert [path.stem for path in folder.iterdir()] == [needed]

    anyio.run(test)


@needs_descriptors
def test_what_a_trainer_says_outlasts_a_disk_that_refuses_writes_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.desk.REFUSED_RETRY", 0.05)

    async def test() -> None:
        async with desk_in(tmp_path, job(JobState.RUNNING)) as desk, anyio.create_task_group() as group:
            send, facts = anyio.create_memory_object_stream[list[Fact]](1)
            hearing = Hearing(desk, lambda event: event)
            tries, thrice = 0, anyio.Event()

            def tried(*_: object) -> None:
                nonlocal tries
                tries += 1
                if tries == 3:
                    thrice.set()

            hearing.on_event = tried
            with send, facts:
                group.start_soon(hearing.run, facts)
                point = Metrics(1, 0.1, 100.0, {"loss": 2.0})
                with unwritable(tmp_path / "journal.sqlite-wal"), anyio.fail_after(30):
                    await send.send([Heard("j", 1, Numbered(1, 1, point))])
                    await thrice.wait()
                with anyio.fail_after(30):
                    while not await stored(desk, "j", Lane.METRICS):  # noqa: ASYNC110 - a journal tells nobody
                        await anyio.sleep(0.01)
                # Its names were refused with it, and are worth as much.
                assert [one.names for one in await stored(desk, "j") if isinstance(one, Schema)] == [["loss"]]
                group.cancel_scope.cancel()

    anyio.run(test)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_disk_that_refuses_for_good_is_not_insisted_on_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    monkeypatch.setattr("agent.desk.REFUSED_RETRY", 0.01)
    monkeypatch.setattr("agent.desk.REFUSED_WITHIN", 0.2)
    refused = JournalRefused(tmp_path, None if elsewhere else OSError(errno.EIO, "Input/output error"))

    async def test() -> None:
        tries = 0

        async def act() -> None:
            nonlocal tries
            tries += 1
            raise refused

        async with desk_in(tmp_path) as desk:
            with anyio.fail_after(30), pytest.raises(JournalRefused):
                await desk.insist(act)
        # One whose folder refuses writes too gets no second try: its trainers save and leave now.
        assert (tries > 1) is elsewhere

    anyio.run(test)
