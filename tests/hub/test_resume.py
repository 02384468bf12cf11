"""Resumes, retries and branches as the hub passes them on, and what is reported of them."""

import time
from typing import Any

import anyio
import httpx
import msgspec

from protocol.codec import encode_record
from protocol.failures import FailureReason, failure
from protocol.messages import JobSeen
from protocol.records import Checkpoint, CommandDone, JobEstimate, JobStatus, ResumeCheck
from protocol.worker import Estimate
from tests.hub.support import HubProcess, adjust, an_agent, curve_of, job_path, report, status_of, submit
from tests.support.scripted_agent import machine


def post(client: httpx.Client, job_id: str, tail: str, body: dict[str, Any]) -> httpx.Response:
    return client.post(job_path(job_id, tail), json=body)


def append(client: httpx.Client, job_id: str, headers: dict[str, str], body: bytes) -> httpx.Response:
    return client.patch(job_path(job_id, "status"), headers=headers, content=body)


def test_the_users_word_goes_with_a_resume_and_a_retry_and_is_spent(
    hub: HubProcess, client: httpx.Client
) -> None:
    async def main() -> None:
        job_id, _ = submit(client)
        agent = an_agent(hub)
        why = failure(FailureReason.CHECKPOINT, "The data set has other rows.")
        async with agent.connected():
            await agent.until_wanted(job_id)
            report(agent, job_id, range(1, 3))
            agent.add(JobStatus(time.time(), 1, "paused"), job_id)
            await agent.until_acked()
            resume = {"action": "resume", "accept_changes": True}
            assert post(client, job_id, "control", resume).status_code == 200
            await agent.until(lambda: agent.desired[job_id].accept_changes)
            agent.add(Checkpoint(time.time(), 1, "step-3", 3, 0.4, 10, 0.1, "pause"), job_id)
            await agent.until_acked()
            adjust(client, job_id, save_steps=50)
            await agent.until(lambda: agent.desired[job_id].parameters.save_steps == 50)
            assert agent.desired[job_id].accept_changes
            agent.add(Checkpoint(time.time(), 2, "step-4", 4, 0.5, 10, 0.1, "schedule"), job_id)
            agent.add(JobStatus(time.time(), 2, "failed", failure=why), job_id)
            await agent.until_acked()
            adjusted = adjust(client, job_id, learning_rate=1e-5)
            assert adjusted.status_code == 400
            retry = {"action": "retry", "accept_changes": True, "checkpoint_path": "step-4"}
            assert post(client, job_id, "control", retry).status_code == 200
            await agent.until(lambda: bool(agent.commands))
            assert agent.commands[0].args == {"checkpoint": "step-4", "accept_changes": 1}
            # The agent answers what is wanted before it comes to the command: that is no end.
            agent.add(JobStatus(time.time(), 2, "failed", observed=9, failure=why), job_id)
            await agent.until_acked()
            assert status_of(client, job_id)["state"] == "queued"
            agent.add(CommandDone(time.time(), agent.commands[0].command_id, "done"))
            report(agent, job_id, range(3, 5), attempt=3)
            agent.add(Checkpoint(time.time(), 3, "step-5", 5, 0.6, 10, 0.1, "schedule"), job_id)
            await agent.until_acked()
            # The checkpoint holds the new; what comes later must not be accepted unasked.
            adjust(client, job_id, learning_rate=1e-5)
            await agent.until(lambda: agent.desired[job_id].parameters.learning_rate == 1e-5)
            assert not agent.desired[job_id].accept_changes

    anyio.run(main)


def test_a_branch_goes_to_the_agent_that_has_the_checkpoint(hub: HubProcess, client: httpx.Client) -> None:
    async def main() -> None:
        job_id, _ = submit(client)
        assert post(client, job_id, "branch", {}).status_code == 409
        agent, other = an_agent(hub), an_agent(hub)
        async with agent.connected():
            await agent.until_wanted(job_id)
            report(agent, job_id, range(1, 3))
            await agent.until_acked()
            async with other.connected():
                wish = {"checkpoint": "step-2", "config_adjustments": {"training": {"learning_rate": 1e-4}}}
                answer = post(client, job_id, "branch", {**wish, "job_id": f"{job_id}-twig"}).json()
                twig = answer["job_id"]
                assert answer["resumed_from_job_id"] == job_id
                await agent.until_wanted(twig)
                offer = agent.desired[twig].offer
                assert offer is not None
                assert msgspec.json.decode(offer.config) == {
                    "model": {"name": "tiny"},
                    "training": {"max_steps": 4, "learning_rate": 1e-4},
                    "branch": {"job_id": job_id, "checkpoint": "step-2"},
                }
                assert twig not in other.desired
        assert post(client, job_id, "branch", {**wish, "job_id": twig}).status_code == 409
        bad = post(client, job_id, "branch", {"config_adjustments": {"trainign": {}}})
        assert (bad.status_code, bad.json()["error"][:9]) == (400, "trainign:")
        assert status_of(client, twig)["resumed_from_job_id"] == job_id

    anyio.run(main)


def test_what_was_estimated_and_checked_is_kept(hub: HubProcess, client: httpx.Client) -> None:
    async def main() -> None:
        job_id, _ = submit(client)
        agent = an_agent(hub)
        needs = Estimate(device="cpu", host_gb=3.5, disk_gb=1.0, free_host_gb=9.0, free_disk_gb=9.0)
        async with agent.connected():
            await agent.until_wanted(job_id)
            agent.add(JobEstimate(time.time(), 1, needs), job_id)
            agent.add(ResumeCheck(time.time(), 2, 5, 6, False, 0.25, "Bad luck."), job_id)
            await agent.until_acked()
        status = status_of(client, job_id)
        assert status["estimate"]["host_gb"] == 3.5
        assert status["resume_check"] == {
            "attempt": 2,
            "first": 5,
            "last": 6,
            "equal": False,
            "difference": 0.25,
            "detail": "Bad luck.",
            "text": "Steps 5 to 6 replayed: they differ by 0.25. Bad luck.",
        }

    anyio.run(main)


def test_a_job_that_the_hub_forgot_is_taken_up_where_it_is_submitted_again(
    hub: HubProcess, client: httpx.Client
) -> None:
    async def main() -> None:
        agent = an_agent(hub)
        job_id = f"{agent.agent_id}-job"
        async with agent.connected():
            # What it took before the backup was made that this hub comes from.
            report(agent, job_id, range(1, 3))
            await agent.until_acked()
            assert set(agent.dropped.values()) == {f"there is no job {job_id} at this hub"}
            assert submit(client, job_id=job_id)[0] == job_id
            code, reason = await agent.until_closed()
            assert (code, job_id in reason) == (4000, True)
        agent.dropped.clear()
        agent.jobs = [JobSeen(job_id, 1, "running", 7)]
        async with agent.connected():
            await agent.until_acked()
        assert not agent.dropped
        assert status_of(client, job_id)["status"] == "running"
        assert [point["step"] for point in curve_of(client, job_id)] == [1, 2]

    anyio.run(main)


def test_a_job_submitted_again_while_its_agent_was_away_is_given_to_that_agent(
    hub: HubProcess, client: httpx.Client
) -> None:
    async def main() -> None:
        agent, other = an_agent(hub), an_agent(hub)
        job_id = f"{agent.agent_id}-job"
        assert submit(client, job_id=job_id)[0] == job_id
        report(agent, job_id, range(1, 3))
        agent.jobs = [JobSeen(job_id, 1, "running", 7)]
        async with agent.connected(), other.connected():
            await agent.until_acked()
            await agent.until_wanted(job_id)
            assert not agent.dropped and job_id not in other.desired
        assert [point["step"] for point in curve_of(client, job_id)] == [1, 2]
        # Only what nobody has.
        other.add(JobStatus(time.time(), 1, "failed"), job_id)
        async with other.connected():
            await other.until_acked()
            assert "is not a job of" in next(iter(other.dropped.values()))

    anyio.run(main)


def test_a_jobs_stream_answers_no_command_of_another_job(hub: HubProcess, client: httpx.Client) -> None:
    async def main() -> None:
        agent = an_agent(hub, box=machine(at_once=2))
        async with agent.connected():
            (one, token), (other, _) = submit(client), submit(client)
            await agent.until_wanted(one)
            await agent.until_wanted(other)
            agent.add(JobStatus(time.time(), 1, "failed"), other)
            await agent.until_acked()
            assert post(client, other, "control", {"action": "retry"}).status_code == 200
            await agent.until(lambda: bool(agent.commands))
            done = CommandDone(time.time(), agent.commands[0].command_id, "refused", "No.")
            headers = {
                "Authorization": f"Bearer {token}",
                "Content-Type": "application/msgpack",
                "X-Stream": "5/0",
                "X-Range": "1-1",
            }
            body = msgspec.msgpack.encode([msgspec.Raw(encode_record(done))])
            answer = append(client, one, headers, body)
            assert (answer.status_code, answer.json()["ack"]) == (200, 1)
            assert status_of(client, other)["state"] == "queued"
            # In its own it does, and in the agent's.
            agent.add(done, other)
            await agent.until_acked()
            assert status_of(client, other)["state"] == "failed"

    anyio.run(main)
