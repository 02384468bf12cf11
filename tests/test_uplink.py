"""What a backend wants, on a real journal: hostile ids, logs on demand, and the end of a token."""

from pathlib import Path
from typing import Literal
from unittest.mock import ANY

import anyio
import anyio.to_thread
import msgspec
import pytest

from agent.core.job import Job
from agent.desk import JobDesk
from agent.hearing import Hearing
from agent.ledger import scrub_told
from agent.program import DAMAGED
from agent.runtime.redact import Redactor
from agent.runtime.supervisor import Fact, Heard
from agent.watch import Watch
from protocol.lifecycle import JobState
from protocol.messages import Command, Desired, Lane, Offer
from protocol.records import CommandDone, LogChunk, Notice, Schema
from protocol.session import Key
from protocol.worker import Metrics, Numbered
from tests.net.backend import Backend, serving
from tests.protocol.golden import MACHINE
from tests.support.desks import EPOCH, desk_in, job, settings, stored, uplink_of
from tests.support.programs import Agent


@pytest.mark.parametrize("want", ["run", "cancel"])
@pytest.mark.parametrize("name", ["{outside}", "../outside", "x/../../outside", "..", "", "a\0b", "j\n"])
def test_no_file_is_read_or_cut_through_the_id_of_a_job(
    tmp_path: Path, name: str, want: Literal["run", "cancel"]
) -> None:
    outside = tmp_path / "outside.log"
    outside.write_text("root's\n")
    job_id = name.format(outside=outside.with_suffix(""))

    async def test() -> None:
        async with desk_in(tmp_path) as desk:
            watch = Watch(desk, settings(tmp_path), Redactor())
            (tmp_path / "logs").mkdir()
            uplink = uplink_of(desk, watch.send_log_from)
            # Neither a config that could be run nor one that must be refused makes it a job.
            await uplink.desired(Desired(job_id, 1, want, Offer("{}", job_token="t")))
            assert desk.jobs == {}
            await uplink.commanded(Command("c-1", "send_log", job_id, args={"offset": 0}))
            [answer] = await stored(desk, "")
            assert isinstance(answer, CommandDone) and answer.status == "refused"
            assert desk.ledger.backlog[Lane.LOGS] == [0, 0]

    anyio.run(test)
    assert outside.read_text() == "root's\n"


def test_a_job_that_an_older_agent_took_under_such_an_id_has_no_log_elsewhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside.log"
    outside.write_text("root's\n")

    async def test() -> None:
        names = [str(outside.with_suffix("")), "../outside", "link"]
        async with desk_in(tmp_path, *(job(JobState.FAILED, name) for name in names)) as desk:
            watch = Watch(desk, settings(tmp_path), Redactor())
            logs = tmp_path / "logs"
            logs.mkdir()
            (logs / "link.log").symlink_to(outside)
            uplink = uplink_of(desk, watch.send_log_from)
            for number, name in enumerate(names):
                await uplink.commanded(Command(f"c-{number}", "send_log", name))
            answers = await stored(desk, "")
            assert [answer.status for answer in answers] == ["refused"] * 3
            assert all("leads out of" in answer.detail for answer in answers)
            assert desk.ledger.backlog[Lane.LOGS] == [0, 0]

    anyio.run(test)


def test_a_log_that_cannot_be_sent_is_answered_with_a_sentence(tmp_path: Path) -> None:
    async def test() -> None:
        async with desk_in(tmp_path, job(JobState.FAILED)) as desk:
            watch = Watch(desk, settings(tmp_path), Redactor())
            uplink = uplink_of(desk, watch.send_log_from)
            # Nothing printed yet is nothing to send.
            await uplink.commanded(Command("c-1", "send_log", "j"))
            (tmp_path / "logs" / "j.log").mkdir(parents=True)
            await uplink.commanded(Command("c-2", "send_log", "j"))
            await uplink.commanded(Command("c-3", "send_log", "j", args={"offset": -1}))
            answers = [record for record in await stored(desk, "") if isinstance(record, CommandDone)]
            assert [answer.status for answer in answers] == ["done", "refused", "refused"]
            assert answers[1].detail == "The job's log cannot be read: Is a directory."
            assert str(tmp_path) not in answers[1].detail

    anyio.run(test)


def test_a_token_is_kept_until_the_last_line_of_the_log_has_arrived(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "j.log"
    log.parent.mkdir()
    log.write_text("one\nTraceback")

    async def test() -> None:
        async with desk_in(tmp_path) as desk:
            watch = Watch(desk, settings(tmp_path), Redactor())
            uplink = uplink_of(desk, watch.send_log_from)
            for name in ("j", "k"):
                await desk.add(job(JobState.RUNNING, name), secrets={"job_token": "t"})
                watch.printing(desk.job(name))
                await desk.change(name, lambda job: (as_failed(job), []))
                # All that was said of it has arrived before anybody looked at its log.
                await uplink.acked(Key(EPOCH, name, Lane.CONTROL), 1)
                assert await uplink.token(name) == "t"
            await watch.look_at_logs()
            # One printed nothing, so nothing more of it will be acknowledged.
            assert await uplink.token("k") == ""
            assert await uplink.token("j") == "t"
            await uplink.acked(Key(EPOCH, "j", Lane.LOGS), 2)
            assert await uplink.token("j") == ""

    anyio.run(test)


def test_a_retry_has_its_token_whatever_is_acknowledged_before_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with desk_in(tmp_path) as desk:
            uplink = uplink_of(desk)
            await desk.add(job(JobState.FAILED), secrets={"job_token": "t"})
            control = Key(EPOCH, "j", Lane.CONTROL)
            await uplink.acked(control, 1)
            assert await uplink.token("j") == ""
            await uplink.desired(Desired("j", 2, "run", Offer("{}", job_token="t")))
            # What answers DESIRED arrives ahead of the command, and is the last that was not acknowledged.
            await uplink.acked(control, 2)
            await uplink.commanded(Command("c-1", "retry", "j"))
            assert desk.job("j").state is JobState.QUEUED
            assert await uplink.token("j") == "t"
            # One who looked before the retry, and scrubs after it.
            await desk.ledger.journal.write(lambda tx: scrub_told(tx, ["j"]))
            await uplink.acked(control, 3)
            assert await uplink.token("j") == "t"
            # With its next end it goes like any other.
            await desk.change("j", lambda job: (as_failed(job), []))
            await desk.ledger.journal.write(lambda tx: scrub_told(tx, ["j"]))
            assert await uplink.token("j") == ""

    anyio.run(test)


def as_failed(running: Job) -> Job:
    return msgspec.structs.replace(running, state=JobState.FAILED)


async def hear_a_point(desk: JobDesk) -> None:
    hearing = Hearing(desk, lambda event: event)
    send, facts = anyio.create_memory_object_stream[list[Fact]](1)
    with send:
        metrics = Metrics(step=1, epoch=0.1, time=1.0, values={"loss": 1.0})
        await send.send([Heard("j", 1, Numbered(1, 1, metrics))])
    with facts:
        await hearing.run(facts)


def test_the_names_of_points_are_said_again_where_they_were_lost(tmp_path: Path) -> None:
    async def test() -> None:
        async with desk_in(tmp_path, job(JobState.RUNNING, worker_pid=1)) as desk:
            uplink = uplink_of(desk)
            await hear_a_point(desk)
            [_, schema] = await stored(desk, "j")
            assert isinstance(schema, Schema)
            control = Key(EPOCH, "j", Lane.CONTROL)
            # A backend that comes from a backup had acknowledged them, so they are deleted here.
            await uplink.acked(control, 2)
            for key, reason in (
                (Key(EPOCH, "j", Lane.LOGS), "trimmed"),
                (Key(EPOCH, "", Lane.CONTROL), "trimmed"),
                (control, "oversize"),
            ):
                await uplink.buried(key, reason)
                assert await stored(desk, "j") == []
            await uplink.buried(control, "trimmed")
            [again, state] = await stored(desk, "j")
            assert again == schema
            # That it runs was among what is lost there, perhaps.
            assert (state.state, state.attempt) == ("running", 1)

    anyio.run(test)


def test_points_that_outlived_a_start_of_the_agent_have_their_names_said_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with desk_in(tmp_path, job(JobState.RUNNING, worker_pid=1)) as desk:
            await hear_a_point(desk)
            [_, schema] = await stored(desk, "j")
            assert isinstance(schema, Schema)
            # All but the point has arrived, and nothing is left of it: it may be gone there by now.
            await uplink_of(desk).acked(Key(EPOCH, "j", Lane.CONTROL), 2)
        async with desk_in(tmp_path, epoch=EPOCH + 1) as desk:
            uplink, control = uplink_of(desk), Key(EPOCH + 1, "j", Lane.CONTROL)
            assert await stored(desk, "j", epoch=EPOCH + 1) == [schema]
            # And again where the backup came later.
            await uplink.acked(control, 1)
            await uplink.buried(control, "trimmed")
            assert (await stored(desk, "j", epoch=EPOCH + 1))[0] == schema
            await uplink.acked(control, 3)
            await uplink.acked(Key(EPOCH, "j", Lane.METRICS), 1)
        async with desk_in(tmp_path, epoch=EPOCH + 2) as desk:
            # No point is left that would need them.
            assert await stored(desk, "j", epoch=EPOCH + 2) == []

    anyio.run(test)


def test_a_backend_that_takes_a_job_for_alive_hears_of_its_end(tmp_path: Path) -> None:
    async def test() -> None:
        async with desk_in(tmp_path, job(JobState.COMPLETED, observed=4)) as desk:
            uplink = uplink_of(desk)
            await uplink.acked(Key(EPOCH, "j", Lane.CONTROL), 1)
            # It comes from a backup: the end was acknowledged, and is forgotten.
            await uplink.desired(Desired("j", 2, "run", Offer("{}")))
            [told] = await stored(desk, "j")
            assert (told.state, told.observed) == ("completed", 4)

    anyio.run(test)


def test_the_owner_reads_that_a_backend_takes_no_more_of_a_job(tmp_path: Path) -> None:
    async def test() -> None:
        names = ["j", "k"]
        async with desk_in(tmp_path, *(job(JobState.RUNNING, name, worker_pid=1) for name in names)) as desk:
            uplink = uplink_of(desk, box=MACHINE)
            await uplink.hello()
            for lane in (Lane.CONTROL, Lane.LOGS):
                await uplink.dropped(Key(EPOCH, "j", lane), "there is no job j at this hub")
            [note] = desk.job("j").notes
            assert "there is no job j at this hub" in note and "submit it there again" in note
            [told] = await stored(desk, "")
            assert isinstance(told, Notice) and told.text.startswith("Job j: ") and note in told.text
            assert desk.ledger.backlog[Lane.CONTROL][0] == 2
            # What it says from here on must not fill the quota of the others.
            await desk.append("j", Lane.LOGS, [LogChunk(1.0, 1, 0, ["x" * 1000])])
            await desk.append("j", Lane.CONTROL, [Notice(1.0, "info", "a")])
            await uplink.acked(Key(EPOCH, "k", Lane.CONTROL), 1)
            await uplink.acked(Key(EPOCH, "", Lane.CONTROL), 1)
            assert [desk.ledger.backlog[lane] for lane in Lane] == [[0, 0]] * 3
            # The next connection asks again.
            uplink.ended()
            await desk.append("j", Lane.CONTROL, [Notice(1.0, "info", "b")])
            await uplink.dropped(Key(EPOCH, "j", Lane.CONTROL), "there is no job j at this hub")
            assert len(desk.job("j").notes) == 1

    anyio.run(test)


@pytest.mark.parametrize("by", ["rest", "socket"])
def test_what_is_refused_once_and_then_taken_loses_nothing(tmp_path: Path, by: str) -> None:
    logs = Key(EPOCH, "j", Lane.LOGS)

    def line(number: int) -> LogChunk:
        return LogChunk(1.0, 1, 0, [f"line {number}"])

    async def test() -> None:
        async with desk_in(tmp_path, job(JobState.RUNNING, worker_pid=1)) as desk:
            uplink = uplink_of(desk, box=MACHINE)
            if by == "socket":
                await uplink.hello()
            await desk.append("j", Lane.LOGS, [line(0)])
            await uplink.dropped(logs, "there is no job j at this hub")
            assert await stored(desk, "j", Lane.LOGS) == []
            if by == "socket":
                # REST has its turn, and begins with the stream of the agent.
                uplink.ended()
            for number in range(10):
                await desk.append("j", Lane.LOGS, [line(number)])
            await uplink.acked(Key(EPOCH, "", Lane.CONTROL), 1)
            # A socket that takes the stream after all, in the middle of it.
            await uplink.hello()
            await uplink.acked(logs, 3)
            assert await stored(desk, "j", Lane.LOGS) == [line(number) for number in range(2, 10)]

    anyio.run(test)


def test_a_stream_that_is_acknowledged_on_its_connection_is_refused_no_more(tmp_path: Path) -> None:
    async def test() -> None:
        async with desk_in(tmp_path, job(JobState.RUNNING, worker_pid=1)) as desk:
            uplink, logs = uplink_of(desk, box=MACHINE), Key(EPOCH, "j", Lane.LOGS)
            await uplink.hello()
            await desk.append("j", Lane.LOGS, [LogChunk(1.0, 1, 0, ["a"])])
            await uplink.dropped(logs, "there is no job j at this hub")
            for _ in range(3):
                await desk.append("j", Lane.LOGS, [LogChunk(1.0, 1, 0, ["b"])])
            await uplink.acked(logs, 2)
            assert len(await stored(desk, "j", Lane.LOGS)) == 2
            await uplink.acked(Key(EPOCH, "j", Lane.CONTROL), 1)
            assert len(await stored(desk, "j", Lane.LOGS)) == 2

    anyio.run(test)


@pytest.mark.parametrize(("state", "versions"), [("failed", (1, 2)), ("running", (1,)), ("paused", (1,))])
def test_a_backend_that_asks_over_and_over_where_a_job_stands_fills_no_disk(
    tmp_path: Path, state: str, versions: tuple[int, ...]
) -> None:
    control = Key(EPOCH, "j", Lane.CONTROL)

    async def test() -> None:
        async with desk_in(tmp_path, job(JobState(state), observed=2)) as desk:
            uplink = uplink_of(desk)
            await uplink.acked(control, 1)
            for version in versions:
                for _ in range(20):
                    await uplink.desired(Desired("j", version, "run", Offer("{}")))
            [told] = await stored(desk, "j")
            assert (told.state, told.observed) == (state, 2)
            # What was answered and is asked again was lost once more.
            await uplink.acked(control, 2)
            await uplink.desired(Desired("j", 1, "run", Offer("{}")))
            assert await stored(desk, "j") == [msgspec.structs.replace(told, time=ANY)]
            await uplink.acked(control, 3)
            if state != "failed":
                # Each connection says so of a job that lives.
                await uplink.desired(Desired("j", 2, "run", Offer("{}")))
                assert await stored(desk, "j") == []

    anyio.run(test)


def test_a_backend_hears_nothing_of_a_job_that_is_not_its_own(tmp_path: Path) -> None:
    mine = Job(
        job_id="mine",
        config="{}",
        from_backend=False,
        attempt=1,
        state=JobState.FAILED,
        observed=2,
        detail="private",
    )

    async def test() -> None:
        async with desk_in(tmp_path, mine) as desk:
            for version in (1, 2, 3, 3):
                await uplink_of(desk).desired(Desired("mine", version, "run", None))
            assert await stored(desk, "mine") == []
            # Nor can it steer one, whose id it may have guessed.
            await uplink_of(desk).desired(Desired("mine", 9, "cancel", None))
            await uplink_of(desk).commanded(Command("c-1", "retry", "mine"))
            assert desk.job("mine") == mine
            (done,) = [record for record in await stored(desk, "") if isinstance(record, CommandDone)]
            assert (done.status, "by its owner" in done.detail) == ("refused", True)

    anyio.run(test)


def test_a_backend_is_told_that_the_journal_was_damaged(tmp_path: Path) -> None:
    home = tmp_path / "agent"
    home.mkdir()
    (home / "journal.sqlite").write_bytes(b"no database" * 1000)

    async def test() -> None:
        backend = Backend()
        async with serving(backend, answer=lambda socket, request: None):
            agent = Agent(home, backend.url, BACKEND_TRANSPORT="websocket").start()
            try:
                await backend.until(lambda: any(DAMAGED in texts for texts in backend.stored.values()))
            finally:
                await anyio.to_thread.run_sync(agent.stop)
        [key] = [key for key, texts in backend.stored.items() if DAMAGED in texts]
        assert (key.scope, key.lane) == ("", Lane.CONTROL)

    anyio.run(test, backend="asyncio")
