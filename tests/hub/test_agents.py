"""The socket that agents dial: who is let in, what is stored, and what a bad peer gets."""

import json
import time
from typing import Literal

import anyio
import httpx
import msgspec
import pytest
from websockets.exceptions import ConnectionClosed

from protocol.failures import FailureReason, failure
from protocol.fields import MAX_FRAME
from protocol.messages import SUBPROTOCOL_JSON, SUBPROTOCOL_MSGPACK
from protocol.records import (
    CommandDone,
    Figures,
    JobFacts,
    JobStatus,
    LogChunk,
    Notice,
    Point,
    Result,
    Schema,
)
from tests.hub.support import (
    HubProcess,
    adjust,
    an_agent,
    control,
    curve_of,
    logs_of,
    report,
    seen_agent,
    status_of,
    submit,
)
from tests.support.scripted_agent import machine


@pytest.mark.parametrize("subprotocol", [SUBPROTOCOL_MSGPACK, SUBPROTOCOL_JSON])
def test_a_run_is_told_in_either_encoding(hub: HubProcess, client: httpx.Client, subprotocol: str) -> None:
    async def main() -> None:
        job_id, token = submit(client)
        agent = an_agent(hub, subprotocol=subprotocol)
        async with agent.connected():
            desired = await agent.until_wanted(job_id)
            assert desired.offer is not None
            assert desired.offer.job_token == token
            assert json.loads(desired.offer.config)["model"] == {"name": "tiny"}
            agent.add(Figures(time.time(), {"cpu_percent": 12.5}))
            report(agent, job_id, range(1, 4))
            agent.add(JobFacts(time.time(), 1, 4, 1.0, 0, 90, 10, 2, 3, 1e-4, "cpu"), job_id)
            agent.add(LogChunk(time.time(), 1, 0, ["one", "two"]), job_id)
            agent.add(LogChunk(time.time(), 1, 8, ["three"], dropped=5), job_id)
            await agent.until_acked()
            running = status_of(client, job_id)
            assert running["status"] == running["state"] == "running"
            assert running["current_step"] == 3
            assert running["progress"] == 75
            assert running["total_steps"] == 4
            assert running["remaining_seconds"] == 5.0
            agent.add(JobStatus(time.time(), 1, "finishing"), job_id)
            agent.add(Point(time.time() + 9, 1, 4, 0.4, 1, [float("nan"), 1e-4, 0.0]), job_id)
            agent.add(Result(time.time(), 1, "/models/j", "", "ab12", 4, {"eval_loss": 0.5}), job_id)
            agent.add(JobStatus(time.time(), 1, "completed"), job_id)
            await agent.until_acked()
        done = status_of(client, job_id)
        assert (done["status"], done["progress"], done["weights_hash"]) == ("completed", 100, "ab12")
        points = curve_of(client, job_id)
        assert [point["step"] for point in points] == [1, 2, 3, 4]
        assert points[1]["train_loss"] == 0.5
        assert points[1]["epoch"] == 0.2
        assert points[3]["train_loss"] is None
        answer = logs_of(client, job_id, limit=3, offset=1)
        assert answer["logs"] == ["two", "[5 lines dropped here]", "three"]
        assert answer["total_lines"] == 4
        seen = seen_agent(client, agent)
        assert seen["figures"] == {"cpu_percent": 12.5}
        assert (seen["hostname"], seen["completed_jobs"]) == ("box", 1)

    anyio.run(main)


def test_what_was_not_acknowledged_is_sent_again_and_stored_once(
    hub: HubProcess, client: httpx.Client
) -> None:
    async def main() -> None:
        job_id, _ = submit(client)
        agent = an_agent(hub)
        async with agent.connected():
            await agent.until_wanted(job_id)
            report(agent, job_id, range(1, 50))
            agent.add(LogChunk(1.0, 1, 0, ["a line"]), job_id)
            await agent.until_acked()
        # As if every acknowledgement had been lost with the link.
        agent.ackeds.clear()
        async with agent.connected():
            await agent.until_acked()
            # The hub said in WELCOME what it holds: nothing had to be sent twice, and nothing is.
            report(agent, job_id, range(50, 60))
            await agent.until_acked()
        assert [point["step"] for point in curve_of(client, job_id)] == list(range(1, 60))
        assert logs_of(client, job_id)["total_lines"] == 1

    anyio.run(main)


def test_a_gap_closes_the_session_and_stores_nothing(hub: HubProcess, client: httpx.Client) -> None:
    async def main() -> None:
        job_id, _ = submit(client)
        agent = an_agent(hub)
        async with agent.connected():
            await agent.until_wanted(job_id)
            report(agent, job_id, range(1, 3))
            await agent.until_acked()
            assert agent.socket is not None
            sid = next(head.sid for head in agent.hello().streams if head.lane == 1)
            body = msgspec.msgpack.encode(Point(1.0, 1, 9, 0.0, 1, [1.0, 1.0, 1.0]))
            await agent.socket.send(msgspec.msgpack.encode([3, sid, 9, [msgspec.Raw(body)]]))
            code, reason = await agent.until_closed()
        assert code == 4009
        assert "9" in reason
        assert [point["step"] for point in curve_of(client, job_id)] == [1, 2]

    anyio.run(main)


def test_a_newer_attempt_goes_over_the_older_one(hub: HubProcess, client: httpx.Client) -> None:
    async def main() -> None:
        job_id, _ = submit(client)
        agent = an_agent(hub)
        async with agent.connected():
            await agent.until_wanted(job_id)
            report(agent, job_id, range(1, 7), attempt=1, loss=10.0)
            agent.add(Schema(2, ["eval_loss"]), job_id)
            agent.add(Point(time.time() + 1e6, 1, 4, 0.5, 2, [9.0]), job_id)
            report(agent, job_id, range(4, 6), attempt=2, loss=1.0)
            # Late news of the first attempt change nothing.
            agent.add(JobStatus(time.time(), 1, "failed"), job_id)
            agent.add(Point(1.0, 2, 5, 0.5, 3, [0.25]), job_id)
            # Names may come behind the points that use them, after a reconnect of lanes.
            agent.add(Schema(3, ["eval_loss"]), job_id)
            await agent.until_acked()
        points = {point["step"]: point for point in curve_of(client, job_id)}
        assert points[3]["train_loss"] == pytest.approx(10 / 3)
        assert (points[4]["train_loss"], points[4]["eval_loss"]) == (0.25, None)
        # A train and an evaluation point of one step are one row of the curve.
        assert (points[5]["train_loss"], points[5]["eval_loss"]) == (0.2, 0.25)
        assert (points[5]["attempt"], points[6]["attempt"]) == (2, 1)
        assert status_of(client, job_id)["status"] == "running"
        assert status_of(client, job_id)["current_step"] == 5

    anyio.run(main)


def test_names_that_come_with_a_later_start_are_those_of_older_points_too(
    hub: HubProcess, client: httpx.Client
) -> None:
    async def main() -> None:
        job_id, _ = submit(client)
        agent = an_agent(hub)
        async with agent.connected():
            await agent.until_wanted(job_id)
            # Its schema was in what this hub lost.
            agent.add(Point(1.0, 1, 1, 0.5, 3, [0.25]), job_id)
            await agent.until_acked()
        agent.reborn()
        agent.add(Schema(3, ["eval_loss"]), job_id)
        agent.add(Schema(4, ["train_loss"]), job_id)
        async with agent.connected():
            await agent.until_acked()
        [point] = curve_of(client, job_id)
        assert point["eval_loss"] == 0.25

    anyio.run(main)


def test_another_agents_job_cannot_be_written(hub: HubProcess, client: httpx.Client) -> None:
    async def main() -> None:
        job_id, _ = submit(client)
        owner, other = an_agent(hub), an_agent(hub)
        async with owner.connected():
            await owner.until_wanted(job_id)
            other.add(Figures(1.0, {"x": 1.0}))
            async with other.connected():
                report(other, job_id, range(1, 5))
                await other.until_acked()
                assert "is not a job of" in next(iter(other.dropped.values()))
                # Its other streams live on.
                other.add(Figures(2.0, {"x": 2.0}))
                await other.until_acked()
        assert curve_of(client, job_id) == []
        assert status_of(client, job_id)["status"] == "pending"

    anyio.run(main)


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\xc1", 4011),
        (b"not msgpack at all", 4011),
        (msgspec.msgpack.encode([3, 77, 1, [[1]]]), 4011),
        (b"\x91" * 3000, 4011),
        (b"x" * (2 * 1024 * 1024), 1009),
        (msgspec.msgpack.encode([1, "agent_wrong", "x"]), 4011),
    ],
    ids=["invalid", "text", "unopened stream", "deep", "2 MiB", "bad hello"],
)
def test_a_bad_frame_ends_that_session_alone(hub: HubProcess, frame: bytes, code: int) -> None:
    async def main() -> None:
        good, bad = an_agent(hub), an_agent(hub)
        async with good.connected(), bad.connected():
            assert bad.socket is not None
            with pytest.raises(ConnectionClosed):
                await bad.socket.send(frame)
                await bad.until_closed()
                raise ConnectionClosed(None, None)
            got, reason = await bad.until_closed()
            assert got == code
            assert reason or code == 1009
            good.add(Figures(1.0, {"x": 1.0}))
            await good.until_acked()

    anyio.run(main)


def test_messages_and_records_of_the_future_are_passed_over(hub: HubProcess, client: httpx.Client) -> None:
    async def main() -> None:
        job_id, _ = submit(client)
        agent = an_agent(hub)
        async with agent.connected():
            await agent.until_wanted(job_id)
            assert agent.socket is not None
            await agent.socket.send(msgspec.msgpack.encode([200, "new", {"things": 1}]))
            agent.add_body(msgspec.msgpack.encode([15, "a record of the future"]), job_id, 0)
            # Known by its tag, and not to be read: it is left out, said so, and blocks nothing.
            agent.add_body(msgspec.msgpack.encode([1, "yesterday"]), job_id, 0)
            agent.add(Notice(1.0, "info", "hello"), job_id)
            await agent.until_acked()
        notes = status_of(client, job_id)["notes"]
        assert [note["text"] for note in notes] == [
            "A report of the agent could not be read by this hub and was left out.",
            "hello",
        ]

    anyio.run(main)


def test_control_reaches_the_agent_at_once_and_again_after_a_reconnect(
    hub: HubProcess, client: httpx.Client
) -> None:
    async def main() -> None:
        job_id, _ = submit(client)
        agent = an_agent(hub)
        async with agent.connected():
            first = await agent.until_wanted(job_id)
            answer = control(client, job_id, "pause").json()
            assert answer["success"] is True
            assert answer["result"]["agent_told"] is True
            paused = await agent.until_wanted(job_id, "pause")
            assert paused.version == first.version + 1
            asked = adjust(client, job_id, learning_rate=1e-5)
            assert asked.status_code == 200
            desired = await agent.until_wanted(job_id, "pause", paused.version + 1)
            assert desired.parameters.learning_rate == 1e-5
        agent.desired.clear()
        told = control(client, job_id, "resume").json()
        assert told["result"]["agent_told"] is False
        async with agent.connected():
            again = await agent.until_wanted(job_id, "run")
            assert again.version == desired.version + 1
            assert again.parameters.learning_rate == 1e-5

    anyio.run(main)


def test_a_failed_job_says_why_and_can_be_retried(hub: HubProcess, client: httpx.Client) -> None:
    async def main() -> None:
        job_id, _ = submit(client)
        agent = an_agent(hub)
        why = failure(FailureReason.DATA, "data.jsonl row 57: text is null.")
        async with agent.connected():
            await agent.until_wanted(job_id)
            report(agent, job_id, range(1, 3))
            agent.add(JobStatus(time.time(), 1, "failed", failure=why), job_id)
            agent.add(JobStatus(time.time(), 1, "running"), job_id)
            await agent.until_acked()
            failed = status_of(client, job_id)
            assert (failed["status"], failed["error"]) == ("failed", why.sentence)
            assert failed["failure"]["advice"] == why.advice
            refused = control(client, job_id, "pause")
            assert refused.status_code == 409
            assert "cannot be paused" in refused.json()["error"]
            control(client, job_id, "retry")
            await agent.until(lambda: bool(agent.commands))
            command = agent.commands[0]
            assert (command.kind, command.job_id) == ("retry", job_id)
            agent.add(CommandDone(time.time(), command.command_id, "done"))
            report(agent, job_id, range(3, 5), attempt=2)
            await agent.until_acked()
        retried = status_of(client, job_id)
        assert (retried["status"], retried["error"], retried["attempt"]) == ("running", None, 2)
        agent.commands.clear()
        async with agent.connected():
            await agent.until_wanted(job_id)
        assert agent.commands == []

    anyio.run(main)


def test_figures_follow_the_points_where_a_state_is_ahead_of_them(
    hub: HubProcess, client: httpx.Client
) -> None:
    async def main() -> None:
        job_id, _ = submit(client)
        agent = an_agent(hub)
        async with agent.connected():
            await agent.until_wanted(job_id)
            agent.add(JobStatus(1.0, 1, "running"), job_id)
            agent.add(Schema(1, ["train_loss"]), job_id)
            agent.add(Point(1.0, 1, 10, 0.1, 1, [3.0]), job_id)
            await agent.until_acked()
            agent.add(JobStatus(3.0, 1, "paused", step=57), job_id)
            await agent.until_acked()
            assert (status_of(client, job_id)["current_step"], status_of(client, job_id)["loss"]) == (57, 3.0)
            for step, loss in ((20, 2.0), (50, 1.0)):
                agent.add(Point(2.0, 1, step, 0.2, 1, [loss]), job_id)
            await agent.until_acked()
        seen = status_of(client, job_id)
        assert (seen["current_step"], seen["loss"]) == (57, 1.0)

    anyio.run(main)


@pytest.mark.parametrize("answer", ["refused", "expired", "unknown"])
def test_a_retry_that_is_not_carried_out_leaves_the_job_failed(
    answer: Literal["refused", "expired", "unknown"], hub: HubProcess, client: httpx.Client
) -> None:
    async def main() -> None:
        job_id, _ = submit(client)
        agent = an_agent(hub)
        async with agent.connected():
            await agent.until_wanted(job_id)
            report(agent, job_id, range(1, 3))
            agent.add(
                JobStatus(time.time(), 1, "failed", failure=failure(FailureReason.DATA, "Bad.")), job_id
            )
            await agent.until_acked()
            control(client, job_id, "retry")
            await agent.until(lambda: bool(agent.commands))
            assert status_of(client, job_id)["state"] == "queued"
            agent.add(CommandDone(time.time(), agent.commands[0].command_id, answer, "It came to nothing."))
            await agent.until_acked()
            left = status_of(client, job_id)
            assert (left["state"], left["error"]) == ("failed", "It came to nothing.")
            assert left["notes"][-1]["text"].startswith("The command retry ")
            # An answer may have been lost where the command was not: the reports tell.
            agent.add(JobStatus(time.time(), 2, "queued"), job_id)
            await agent.until_acked()
            assert (status_of(client, job_id)["state"], status_of(client, job_id)["error"]) == (
                "queued",
                None,
            )

    anyio.run(main)


def test_an_agent_gets_one_job_more_than_it_runs_and_the_next_on_an_end(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    async def main(hub: HubProcess) -> None:
        with hub.client() as client:
            ids = [submit(client)[0] for _ in range(3)]
            agent = an_agent(hub)
            cannot = an_agent(hub, box=machine(methods=("orpo",)))
            async with cannot.connected(), agent.connected():
                await agent.until_wanted(ids[1])
                assert ids[2] not in agent.desired
                agent.add(JobStatus(time.time(), 1, "completed"), ids[0])
                await agent.until_wanted(ids[2])
                assert cannot.desired == {}

    with HubProcess(tmp_path_factory.mktemp("hub"), "--no-page") as hub:
        anyio.run(main, hub)


def test_the_frame_limit_is_the_protocols() -> None:
    assert MAX_FRAME == 256 * 1024
