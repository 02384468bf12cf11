"""C16 to C34, and C64: records are stored once, in order, and acknowledged when they are."""

import math
import time

import anyio
import pytest
from websockets.exceptions import InvalidStatus

from protocol.messages import SUBPROTOCOL_JSON, SUBPROTOCOL_MSGPACK, Bye, Open, StreamClosed, Tomb
from protocol.records import JobStatus, LogChunk, Notice
from tests.contract.backend import NAMES, Backend, Someone, points, schema

LOGS = 2


def line_of(number: int) -> LogChunk:
    """Record ``number`` of a log: a doubled one shows as a doubled line."""
    return LogChunk(1.0, 1, number, [f"line {number}"])


def lines(first: int, last: int) -> list[LogChunk]:
    return [line_of(number) for number in range(first, last + 1)]


def said(first: int, last: int) -> list[str]:
    return [f"line {number}" for number in range(first, last + 1)]


def test_c16_what_is_acknowledged_is_stored(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, job.id, LOGS, 200)) as (line, _):
            for lo in range(1, 201, 20):
                await line.data(1, lo, *lines(lo, lo + 19))
                await line.acked(1, lo + 19)
                assert backend.logs(job) == said(1, lo + 19)
            # Cut, without a word.
            line.socket.transport.abort()
        async with backend.greeted(agent, agent.head(1, job.id, LOGS, 200)) as (_, positions):
            assert positions == {1: 200}

    anyio.run(main)


def test_c17_what_is_acknowledged_outlives_a_crash(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, job.id, LOGS, 60)) as (line, _):
            await line.data(1, 1, *lines(1, 50))
            await line.acked(1, 50)
            # Of these nobody knows whether they are stored; what WELCOME says decides.
            await line.data(1, 51, *lines(51, 60))
            backend.restart("kill")
        async with backend.greeted(agent, agent.head(1, job.id, LOGS, 60)) as (line, positions):
            assert positions[1] in (50, 60)
            assert backend.logs(job) == said(1, positions[1])
            if positions[1] < 60:
                await line.data(1, 51, *lines(51, 60))
                await line.acked(1, 60)
        assert backend.logs(job) == said(1, 60)

    anyio.run(main)


def test_c18_an_acknowledgement_covers_everything_before_it(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, job.id, LOGS, 300)) as (line, _):
            for number in range(1, 301):
                await line.data(1, number, line_of(number))
            await line.acked(1, 300)
        assert backend.logs(job) == said(1, 300)

    anyio.run(main)


def test_c19_what_is_wholly_old_is_acknowledged_again(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, job.id, LOGS, 9)) as (line, _):
            await line.data(1, 1, *lines(1, 9))
            await line.acked(1, 9)
            for lo, hi in ((1, 9), (4, 6)):
                await line.data(1, lo, *lines(lo, hi))
                await line.acked(1, 9)
            assert backend.logs(job) == said(1, 9)

    anyio.run(main)


def test_c20_of_an_overlap_the_new_part_is_stored(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, job.id, LOGS, 9)) as (line, _):
            await line.data(1, 1, *lines(1, 5))
            # Before the acknowledgement, and after it.
            await line.data(1, 3, *lines(3, 7))
            await line.acked(1, 7)
            await line.data(1, 1, *lines(1, 9))
            await line.acked(1, 9)
            assert backend.logs(job) == said(1, 9)

    anyio.run(main)


def test_c21_a_hole_closes_the_connection(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, job.id, LOGS, 9)) as (line, _):
            await line.data(1, 1, *lines(1, 3))
            await line.acked(1, 3)
            await line.data(1, 5, *lines(5, 9))
            assert (await line.closed())[0] == 4009
        assert backend.logs(job) == said(1, 3)
        async with backend.greeted(agent, agent.head(1, job.id, LOGS, 9)) as (line, positions):
            assert positions == {1: 3}
            await line.data(1, 4, *lines(4, 9))
            await line.acked(1, 9)
        assert backend.logs(job) == said(1, 9)

    anyio.run(main)


def test_c22_a_tombstone_moves_the_number_on(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, job.id, LOGS, 20)) as (line, _):
            await line.data(1, 1, *lines(1, 3))
            await line.say(Tomb(1, 4, 9, "overflow", 6))
            await line.acked(1, 9)
            # An old one, one that overlaps, and records behind it.
            await line.say(Tomb(1, 5, 8, "overflow", 4))
            await line.acked(1, 9)
            await line.say(Tomb(1, 8, 12, "trimmed", 5))
            await line.data(1, 13, *lines(13, 14))
            await line.acked(1, 14)
            await line.say(Tomb(1, 16, 17, "trimmed", 2))
            assert (await line.closed())[0] == 4009
        shown = [text for text in backend.logs(job) if text.startswith("line ")]
        assert shown == said(1, 3) + said(13, 14)

    anyio.run(main)


def test_c23_a_stream_is_opened_and_sends_at_once(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent) as (line, _):
            await line.say(Open(agent.head(5, job.id, LOGS, 9)))
            await line.data(5, 1, *lines(1, 4))
            await line.acked(5, 4)
        # Opened again and sent from the beginning: what is there already is passed over.
        async with backend.greeted(agent) as (line, _):
            await line.say(Open(agent.head(2, job.id, LOGS, 9)))
            await line.data(2, 1, *lines(1, 9))
            await line.acked(2, 9)
        assert backend.logs(job) == said(1, 9)

    anyio.run(main)


def test_c24_a_stream_is_opened_once(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        async with backend.greeted(agent, agent.head(1, last=1)) as (line, _):
            await line.data(2, 1, Notice(1.0, "info", "of no stream"))
            assert (await line.closed())[0] == 4011
        async with backend.greeted(agent, agent.head(1, last=1)) as (line, _):
            await line.say(Open(agent.head(1, lane=1)))
            assert (await line.closed())[0] == 4011

    anyio.run(main)


def test_c25_each_start_of_an_agent_numbers_anew(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        old = agent.head(1, job.id, LOGS, 4)
        async with backend.greeted(agent, old) as (line, _):
            await line.data(1, 1, *lines(1, 4))
            await line.acked(1, 4)
        agent.boot, agent.attempt, agent.epoch = 2, 0, agent.epoch ^ 1
        new = agent.head(2, job.id, LOGS, 4)
        async with backend.greeted(agent, old, new) as (line, positions):
            assert positions == {1: 4, 2: 0}
            await line.data(2, 1, *lines(5, 8))
            await line.acked(2, 4)
        assert backend.logs(job) == said(1, 8)

    anyio.run(main)


def test_c26_a_record_that_cannot_be_read_stops_nothing(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, job.id, LOGS, 9)) as (line, _):
            odd = [
                [24, "not a time"],
                "no record",
                None,
                [31, 1.5, {"of": "tomorrow"}],
                [24, 1.0, 1, 0, 7],
                {},
            ]
            await line.data(1, 1, line_of(1))
            await line.say([3, 1, 2, odd])
            await line.data(1, 8, line_of(2))
            await line.acked(1, 8)
        assert [text for text in backend.logs(job) if text.startswith("line ")] == said(1, 2)

    anyio.run(main)


def test_c27_a_stream_of_anothers_job_is_refused_alone(backend: Backend) -> None:
    async def main() -> None:
        agent, other = Someone(), Someone()
        mine, theirs = backend.job_of(agent), backend.job_of(other)
        heads = [agent.head(1, mine.id, LOGS, 9), agent.head(2, theirs.id, LOGS, 9)]
        async with backend.greeted(agent, *heads) as (line, _):
            refused = await line.hear(StreamClosed)
            assert (refused.sid, bool(refused.reason)) == (2, True)
            await line.data(2, 1, *lines(1, 3))
            for sid, scope in ((3, theirs.id), (4, "no-such-job")):
                await line.say(Open(agent.head(sid, scope, 0, 3)))
                await line.say([3, sid, 1, [[1, time.time(), 1, "completed"]]])
                refused = await line.hear(StreamClosed, lambda one, sid=sid: one.sid == sid)  # type: ignore[misc]
            await line.data(1, 1, *lines(1, 9))
            await line.acked(1, 9)
        assert backend.logs(mine) == said(1, 9)
        assert backend.logs(theirs) == []
        assert backend.status(theirs)["status"] != "completed"

    anyio.run(main)


@pytest.mark.parametrize("subprotocol", [SUBPROTOCOL_MSGPACK, SUBPROTOCOL_JSON])
def test_c28_a_number_that_is_none_is_stored(backend: Backend, subprotocol: str) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        heads = agent.head(1, job.id, 0, 2), agent.head(2, job.id, 1, 3)
        try:
            async with backend.greeted(agent, *heads, subprotocol=subprotocol) as (line, _):
                await line.data(1, 1, schema())
                (first,), (last,) = points(1, loss=2.5), points(3, loss=1.5)
                lost = [*points(2, loss=math.nan), *points(2, loss=math.inf)]
                await line.data(2, 1, first, *lost, last)
                await line.acked(2, 4)
        except InvalidStatus:
            pytest.skip("this backend speaks MessagePack alone")
        curve = {point["step"]: point["train_loss"] for point in backend.curve(job)}
        assert (curve[1], curve[3]) == (2.5, 1.5)
        # How a loss that is none is shown is the backend's affair; that there was a step 2 is not.
        assert not isinstance(curve[2], float) or not math.isfinite(curve[2])

    anyio.run(main)


def test_c29_the_newest_attempt_of_a_step_is_the_curve(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        heads = agent.head(1, job.id, 0, 9), agent.head(2, job.id, 1, 99)
        async with backend.greeted(agent, *heads) as (line, _):
            await line.data(1, 1, schema())
            await line.data(2, 1, *points(1, 2, 3, 4, 5, loss=4.0))
            await line.data(2, 6, *points(3, 4, attempt=2, loss=1.0))
            await line.acked(2, 7)
        curve = {point["step"]: point["train_loss"] for point in backend.curve(job)}
        assert curve == {1: 4.0, 2: 4.0, 3: 1.0, 4: 1.0, 5: 4.0}
        assert len(NAMES) == 2

    anyio.run(main)


def test_c30_a_late_record_of_an_ended_job_is_stored(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        heads = agent.head(1, job.id, 0, 9), agent.head(2, job.id, LOGS, 9)
        async with backend.greeted(agent, *heads) as (line, _):
            now = time.time()
            await line.data(1, 1, JobStatus(now, 1, "running"), JobStatus(now, 1, "finishing"))
            await line.data(1, 3, JobStatus(now, 1, "completed"))
            await line.acked(1, 3)
            assert backend.status(job)["status"] == "completed"
            await line.data(2, 1, *lines(1, 3))
            await line.acked(2, 3)
        async with backend.greeted(agent, *heads) as (line, _):
            await line.data(2, 4, *lines(4, 9))
            await line.acked(2, 9)
        assert backend.logs(job) == said(1, 9)

    anyio.run(main)


def test_c31_bye_closes_nothing(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, job.id, LOGS, 9)) as (line, _):
            await line.say(Bye("the machine goes to sleep", time.time() + 60))
            await line.data(1, 1, *lines(1, 9))
            await line.acked(1, 9)
        async with backend.greeted(agent, agent.head(1, job.id, LOGS, 9)) as (_, positions):
            assert positions == {1: 9}

    anyio.run(main)


def test_c64_names_that_come_later_are_those_of_older_points(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, job.id, 1, 2)) as (line, _):
            await line.data(1, 1, *points(1, 2, loss=2.5))
            await line.acked(1, 2)
        agent.boot, agent.epoch = agent.boot + 1, agent.epoch ^ 1
        async with backend.greeted(agent, agent.head(1, job.id, 0, 1)) as (line, _):
            await line.data(1, 1, schema())
            await line.acked(1, 1)
        assert {point["step"]: point["train_loss"] for point in backend.curve(job)} == {1: 2.5, 2: 2.5}

    anyio.run(main)
