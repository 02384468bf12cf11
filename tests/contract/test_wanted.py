"""C32 to C48: what is wanted of jobs, life signs, limits, growth."""

import json
import time

import anyio
import msgspec
import pytest

from protocol.failures import FailureReason, failure
from protocol.fields import MAX_FRAME
from protocol.messages import Command, Desired, Goaway, Heartbeat, HeartbeatAck, JobSeen, Welcome
from protocol.records import CommandDone, JobStatus, Notice
from tests.contract.backend import CONFIG, Backend, Job, Line, Someone


async def wanted(line: Line, job: Job, version: int = 0) -> Desired:
    """Return what is wanted of a job, from a version on."""
    return await line.hear(Desired, lambda one: one.job_id == job.id and one.version >= version)


def states(*names: str, attempt: int = 1) -> list[JobStatus]:
    return [JobStatus(time.time(), attempt, name) for name in names]


def test_c32_what_is_wanted_is_said_on_each_connection(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        one, two = backend.job_of(agent), backend.job_of(agent)
        versions = {}
        async with backend.greeted(agent) as (line, _):
            for job in (one, two):
                desired = await wanted(line, job, 1)
                assert desired.want == "run"
                versions[job.id] = desired.version
        seen = tuple(JobSeen(job.id, 1, "running", versions[job.id]) for job in (one, two))
        async with backend.greeted(agent, jobs=seen) as (line, _):
            for job in (one, two):
                # Nothing has changed, so the version has not.
                assert (await wanted(line, job)).version == versions[job.id]

    anyio.run(main)


def test_c33_an_ended_job_is_wanted_no_more(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        done, other = backend.job_of(agent), backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, done.id, 0, 3)) as (line, _):
            await line.data(1, 1, *states("running", "finishing", "completed"))
            await line.acked(1, 3)
        async with backend.greeted(agent) as (line, _):
            await wanted(line, other)
            await line.lives()
            assert not [one for one in line.heard if isinstance(one, Desired) and one.job_id == done.id]

    anyio.run(main)


def test_c34_a_change_is_said_at_once_with_a_higher_version(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, job.id, 0, 9)) as (line, _):
            version = (await wanted(line, job)).version
            await line.data(1, 1, *states("running"))
            await line.acked(1, 1)
            for action, want, said in (
                ("pause", "pause", ("pausing", "paused")),
                ("resume", "run", ("queued",)),
            ):
                backend.control(job, action)
                desired = await wanted(line, job, version + 1)
                assert desired.want == want
                version = desired.version
                lo = 2 if action == "pause" else 4
                await line.data(1, lo, *states(*said))
                await line.acked(1, lo + len(said) - 1)
            # A backend that comes from a backup has forgotten versions that the agent has seen.
            await line.data(1, 5, JobStatus(time.time(), 1, "running", observed=version + 20))
            await line.acked(1, 5)
            backend.control(job, "pause")
            version = (await wanted(line, job, version + 21)).version
        seen = JobSeen(job.id, 1, "running", version + 20)
        async with backend.greeted(agent, jobs=(seen,)) as (line, _):
            backend.control(job, "cancel")
            assert (await wanted(line, job, version + 21)).want == "cancel"

    anyio.run(main)


def test_c35_the_offer_holds_the_job(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent, dataset_path="rows.jsonl")
        async with backend.greeted(agent, agent.head(1, job.id, 2, 1)) as (line, _):
            offer = (await wanted(line, job)).offer
        assert offer is not None
        config = json.loads(offer.config)
        assert config["model"] == CONFIG["model"]
        assert offer.dataset_path == "rows.jsonl"
        assert offer.job_token == job.token
        answer = backend.append(job, 0, agent.epoch, 1, *states("running"), token=offer.job_token)
        assert answer.status_code == 200, answer.text

    anyio.run(main)


def test_c36_parameters_add_up(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, job.id, 0, 9)) as (line, _):
            version = (await wanted(line, job)).version
            await line.data(1, 1, *states("running"))
            await line.acked(1, 1)
            for change in ({"learning_rate": 1e-5}, {"eval_steps": 7}):
                answer = backend.http.patch(job.path("update-params"), json=change)
                assert answer.status_code == 200, answer.text
                desired = await wanted(line, job, version + 1)
                version = desired.version
            assert (desired.parameters.learning_rate, desired.parameters.eval_steps) == (1e-5, 7)

    anyio.run(main)


def test_c37_a_job_stands_where_its_agent_says(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, job.id, 0, 20)) as (line, _):
            way = (("running", "running"), ("pausing", "running"), ("paused", "paused"), ("queued", "queued"))
            for number, (state, shown) in enumerate(
                (*way, ("preparing", "running"), ("running", "running")), 1
            ):
                await line.data(1, number, *states(state))
                await line.acked(1, number)
                assert backend.status(job)["status"] == shown, state
            broken = failure(FailureReason.DATA, "Row 57 of train.jsonl is broken.")
            await line.data(1, 7, JobStatus(time.time(), 1, "failed", failure=broken))
            await line.acked(1, 7)
        shown = backend.status(job)
        assert shown["status"] == "failed"
        assert "Row 57 of train.jsonl is broken." in str(shown)

    anyio.run(main)


def test_c38_late_news_of_a_job_are_passed_over(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, job.id, 0, 20)) as (line, _):
            await line.data(1, 1, *states("running", "cancelling", "cancelled"))
            await line.data(1, 4, *states("running", "completed"))
            await line.acked(1, 5)
        assert backend.status(job)["status"] == "cancelled"

    anyio.run(main)


def test_c39_a_command_is_said_until_it_is_answered(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        head = agent.head(1, job.id, 0, 20)
        async with backend.greeted(agent, head) as (line, _):
            broken = failure(FailureReason.DATA, "Row 57 is broken.")
            await line.data(1, 1, *states("running"), JobStatus(time.time(), 1, "failed", failure=broken))
            await line.acked(1, 2)
            backend.control(job, "retry")
            command = await line.hear(Command)
            assert (command.kind, command.job_id) == ("retry", job.id)
        async with backend.greeted(agent, head) as (line, _):
            assert (await line.hear(Command)).command_id == command.command_id
            done = CommandDone(time.time(), command.command_id, "done")
            await line.data(1, 3, done, *states("queued", attempt=2))
            await line.acked(1, 4)
        async with backend.greeted(agent, head) as (line, _):
            await wanted(line, job)
            await line.lives()
            assert not [one for one in line.heard if isinstance(one, Command)]

    anyio.run(main)


def test_c40_a_heartbeat_is_answered_with_its_nonce(backend: Backend) -> None:
    async def main() -> None:
        async with backend.greeted(Someone()) as (line, _):
            for nonce in (1, 2**40, 3):
                await line.say(Heartbeat(nonce, time.time(), [0, 7, 0]))
                assert (await line.hear(HeartbeatAck)).nonce == nonce

    anyio.run(main)


@pytest.mark.slow
def test_c41_silence_ends_a_connection(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        async with backend.line(agent) as line:
            await line.say(agent.hello())
            welcome = await line.hear(Welcome)
            # An agent that says something each interval is never too late.
            await line.stays(1.5 * welcome.heartbeat_s)
            with anyio.fail_after(welcome.heartbeat_s + 20):
                while True:
                    try:
                        await line.closed()
                    except TimeoutError:
                        continue
                    return

    anyio.run(main)


def test_c42_a_deployment_says_goodbye(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        async with backend.greeted(agent, agent.head(1, last=1)) as (line, _):
            await line.data(1, 1, Notice(1.0, "info", "before"))
            await line.acked(1, 1)
            await anyio.to_thread.run_sync(backend.restart, "stop")
            goaway = await line.hear(Goaway)
            assert goaway.reason
            assert (await line.closed())[0] in (4000, 1012)
        async with backend.greeted(agent, agent.head(1, last=1)) as (_, positions):
            assert positions == {1: 1}

    anyio.run(main)


def test_c43_a_frame_of_tomorrow_is_passed_over(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        async with backend.greeted(agent, agent.head(1, last=1)) as (line, _):
            await line.say([7], [64, {"of": ["tomorrow"]}, None], [99, 1.5])
            await line.lives()
            await line.data(1, 1, Notice(1.0, "info", "heard"))
            await line.acked(1, 1)

    anyio.run(main)


def test_c44_fields_of_tomorrow_are_passed_over(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        hello = msgspec.msgpack.decode(msgspec.msgpack.encode(agent.hello(agent.head(1, last=2))))
        hello[6].append("a field of the machine")
        hello[7][0].append("a field of a stream")
        async with backend.line(agent) as line:
            await line.say([*hello, {"of": "tomorrow"}])
            await line.hear(Welcome)
            await line.say([3, 1, 1, [[8, 1.0, "info", "text", 0, "more"]], "more"])
            await line.acked(1, 1)
            await line.say([10, 5, 0.0, [], "more"])
            assert (await line.hear(HeartbeatAck)).nonce == 5

    anyio.run(main)


def test_c45_a_frame_has_a_limit(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        async with backend.greeted(agent, agent.head(1, last=1)) as (line, _):
            frame = [3, 1, 1, [[8, 1.0, "info", "x" * 60_000]] * 4]
            room = MAX_FRAME - len(msgspec.msgpack.encode([*frame, ""])) - 2
            await line.say([*frame, "x" * room])
            await line.acked(1, 4)
            await line.say([*frame, "x" * (room + 200)])
            assert (await line.closed())[0] in (1009, 4513)

    anyio.run(main)


BAD = {
    "nothing": b"",
    "noise": b"\xc1\xff\x00",
    "no array": b"\x81\xa1a\x01",
    "a wrong type": msgspec.msgpack.encode([3, "sid", 1, [[8, 1.0, "info", "x"]]]),
    "a field too few": msgspec.msgpack.encode([3, 1]),
    "more than it holds": b"\x94\x03\x01\x01\xdd\xff\xff\xff\xff",
    "no end": msgspec.msgpack.encode([3, 1, 1, [[8, 1.0, "info", "x"]]])[:-1],
    "deep nesting": b"\x93\x0a\x01" + b"\x91" * 200_000,
    "a tombstone that ends before it begins": msgspec.msgpack.encode([4, 1, 5, 2, "overflow", 1]),
}


@pytest.mark.parametrize("what", BAD)
def test_c46_a_frame_that_cannot_be_read_closes_its_connection_alone(backend: Backend, what: str) -> None:
    async def main() -> None:
        agent, other = Someone(), Someone()
        async with backend.greeted(other) as (neighbour, _):
            async with backend.greeted(agent, agent.head(1, last=1)) as (line, _):
                await line.say(BAD[what])
                code, reason = await line.closed()
                assert (code, bool(reason)) == (4011, True)
            await neighbour.lives()
        async with backend.greeted(agent, agent.head(1, last=1)) as (line, _):
            await line.lives()

    anyio.run(main)


BEYOND = {
    "an epoch of 64 bits": [14, [2, 2**64 - 1, "", 0, 1, 1]],
    "a tombstone to the end of all numbers": [4, 1, 1, 2**64 - 1, "overflow", 1],
}


@pytest.mark.parametrize("what", BEYOND)
def test_c47_a_number_that_cannot_be_stored_closes_its_connection_alone(backend: Backend, what: str) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        async with backend.greeted(agent, agent.head(1, last=1), agent.head(9, job.id)) as (line, _):
            await line.say(BEYOND[what])
            code, reason = await line.closed()
            assert (code, bool(reason)) == (4011, True)
        async with backend.greeted(agent, agent.head(1, last=1)) as (_, positions):
            assert positions == {1: 0}

    anyio.run(main)
