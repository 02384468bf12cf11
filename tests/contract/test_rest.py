"""C48 to C63: the routes that agents call."""

import hashlib
import time

import anyio
import httpx
import pytest

from protocol.messages import SUBPROTOCOL_MSGPACK, Desired
from protocol.records import CommandDone, JobStatus, Notice
from protocol.rest import DATASET, HEADER_AGENT, HEADER_TOMB, POLL, UPLOAD
from tests.contract.backend import Backend, Job, Someone, points, schema
from tests.contract.test_streams import LOGS, lines, said

REFUSED = (401, 403, 404)
ROWS = b"".join(b'{"text": "row %d"}\n' % number for number in range(2000))


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_c48_a_job_is_written_with_its_own_token(backend: Backend) -> None:
    agent = Someone()
    job, other = backend.job_of(agent), backend.job_of(agent)
    for token in ("none", "x" * 43, other.token, backend.key):
        for lane, record in enumerate((JobStatus(time.time(), 1, "completed"), points(1)[0], lines(1, 1)[0])):
            answer = backend.append(job, lane, agent.epoch, 1, record, token=token)
            assert answer.status_code in REFUSED, (lane, answer.text)
    assert backend.status(job)["status"] != "completed"
    assert (backend.steps(job), backend.logs(job)) == ([], [])


def test_c49_an_append_is_answered_with_its_position_and_the_want(backend: Backend) -> None:
    agent = Someone()
    job = backend.job_of(agent)
    now = time.time()
    for lane, records in enumerate(([JobStatus(now, 1, "running"), schema()], points(1, 2, 3), lines(1, 4))):
        answer = backend.append(job, lane, agent.epoch, 1, *records)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["ack"] == len(records)
        assert (body["want"], body["desired_version"] >= 1) == ("run", True)
    assert backend.status(job)["status"] == "running"
    assert (backend.steps(job), backend.logs(job)) == ([1, 2, 3], said(1, 4))
    backend.control(job, "cancel")
    body = backend.append(job, LOGS, agent.epoch, 5, *lines(5, 5)).json()
    assert (body["want"], body["ack"]) == ("cancel", 5)


def test_c50_an_append_that_comes_twice_is_stored_once(backend: Backend) -> None:
    agent = Someone()
    job = backend.job_of(agent)
    for _ in range(3):
        answer = backend.append(job, LOGS, agent.epoch, 1, *lines(1, 4))
        assert (answer.status_code, answer.json()["ack"]) == (200, 4)
    answer = backend.append(job, LOGS, agent.epoch, 3, *lines(3, 6))
    assert (answer.status_code, answer.json()["ack"]) == (200, 6)
    assert backend.logs(job) == said(1, 6)


def test_c51_both_doors_lead_to_one_position(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = backend.job_of(agent)
        head = agent.head(1, job.id, LOGS, 9)
        async with backend.greeted(agent, head) as (line, _):
            await line.data(1, 1, *lines(1, 5))
            await line.acked(1, 5)
        answer = backend.append(job, LOGS, agent.epoch, 1, *lines(1, 7))
        assert answer.json()["ack"] == 7
        async with backend.greeted(agent, head) as (line, positions):
            assert positions == {1: 7}
            # It may come late, after the socket is back.
            answer = backend.append(job, LOGS, agent.epoch, 6, *lines(6, 8))
            assert answer.json()["ack"] == 8
            await line.data(1, 8, *lines(8, 9))
            await line.acked(1, 9)
        assert backend.logs(job) == said(1, 9)

    anyio.run(main)


def test_c52_a_hole_is_answered_with_the_position(backend: Backend) -> None:
    agent = Someone()
    job = backend.job_of(agent)
    backend.append(job, LOGS, agent.epoch, 1, *lines(1, 3))
    answer = backend.append(job, LOGS, agent.epoch, 5, *lines(5, 6))
    assert (answer.status_code, answer.json()["ack"]) == (409, 3)
    assert backend.logs(job) == said(1, 3)


def test_c53_a_range_numbers_the_body(backend: Backend) -> None:
    agent = Someone()
    job = backend.job_of(agent)
    for lo, hi in ((1, 3), (1, 1), (0, 1), (2, 1)):
        answer = backend.append(job, LOGS, agent.epoch, lo, *lines(1, 2), hi=hi)
        assert (answer.status_code, bool(answer.json()["error"])) == (400, True), (lo, hi)
    assert backend.logs(job) == []


def with_rows(backend: Backend, agent: Someone) -> Job:
    """Return a job of this agent whose rows the backend serves."""
    answer = backend.http.post(UPLOAD, content=ROWS, params={"name": "rows.jsonl"})
    if answer.status_code in (404, 405):
        pytest.skip(f"this backend has no POST {UPLOAD} to give it rows by")
    assert answer.status_code in (200, 201), answer.text
    return backend.job_of(agent, dataset_path=answer.json()["storage_path"])


def rows(backend: Backend, job: Job, token: str, **headers: str) -> httpx.Response:
    return backend.http.get(
        DATASET.format(job_id=job.id), headers={**bearer(token), "Accept-Encoding": "identity", **headers}
    )


def test_c54_the_rows_of_a_job_are_served_as_announced(backend: Backend) -> None:
    async def main() -> None:
        agent = Someone()
        job = with_rows(backend, agent)
        async with backend.greeted(agent) as (line, _):
            desired = await line.hear(Desired, lambda one: one.job_id == job.id)
        assert desired.offer is not None and desired.offer.dataset is not None
        told = desired.offer.dataset
        assert (told.sha256, told.size) == (hashlib.sha256(ROWS).hexdigest(), len(ROWS))
        answer = rows(backend, job, desired.offer.job_token)
        assert (answer.status_code, answer.content) == (200, ROWS)

    anyio.run(main)


def test_c55_rows_are_served_from_any_byte_on(backend: Backend) -> None:
    job = with_rows(backend, Someone())
    for first in (1, 777, len(ROWS) - 1):
        answer = rows(backend, job, job.token, Range=f"bytes={first}-")
        assert (answer.status_code, answer.content) == (206, ROWS[first:])


def test_c56_rows_are_for_their_jobs_token(backend: Backend) -> None:
    agent = Someone()
    job, other = with_rows(backend, agent), backend.job_of(agent)
    for token in ("x" * 43, other.token):
        answer = rows(backend, job, token)
        assert answer.status_code in REFUSED
        assert b"row 7" not in answer.content


def test_c57_a_job_is_claimed_by_one_agent(backend: Backend) -> None:
    one, two = Someone(), Someone()
    job = backend.submit()
    first = backend.claim(one, job.id)
    assert (first.status_code, first.json()["job_token"]) == (200, job.token)
    assert backend.claim(two, job.id).status_code == 409
    # Its answer may have been lost on the way.
    again = backend.claim(one, job.id)
    assert (again.status_code, again.json()["job_token"]) == (200, job.token)
    assert backend.claim(one, "no-such-job").status_code == 404


def test_c58_a_poll_is_answered_with_a_job_or_none(backend: Backend) -> None:
    agent = Someone()
    answer = backend.http.get(POLL, headers={HEADER_AGENT: agent.agent_id})
    assert answer.status_code == 200, answer.text
    assert answer.json()["poll_interval_seconds"] > 0
    assert answer.json()["job"] is None or answer.json()["job"]["id"]
    assert backend.http.get(POLL, headers={HEADER_AGENT: "nobody"}).status_code == 400
    refused = backend.http.get(POLL, headers={HEADER_AGENT: agent.agent_id, **bearer("wak_" + "0" * 32)})
    assert refused.status_code in (401, 403)


def test_c59_an_append_may_be_a_tombstone(backend: Backend) -> None:
    agent = Someone()
    job = backend.job_of(agent)
    backend.append(job, LOGS, agent.epoch, 1, *lines(1, 2))
    for _ in range(2):
        answer = backend.append(job, LOGS, agent.epoch, 3, hi=6, **{HEADER_TOMB: "overflow"})
        assert (answer.status_code, answer.json()["ack"]) == (200, 6)
    answer = backend.append(job, LOGS, agent.epoch, 9, hi=9, **{HEADER_TOMB: "overflow"})
    assert (answer.status_code, answer.json()["ack"]) == (409, 6)
    assert backend.append(job, LOGS, agent.epoch, 7, *lines(7, 8)).json()["ack"] == 8
    shown = [text for text in backend.logs(job) if text.startswith("line ")]
    assert shown == said(1, 2) + said(7, 8)


def test_c60_a_poll_says_that_records_are_taken(backend: Backend) -> None:
    answer = backend.http.get(POLL, headers={HEADER_AGENT: Someone().agent_id})
    assert answer.json()["records"] == SUBPROTOCOL_MSGPACK


def test_c61_an_append_of_another_agent_is_refused(backend: Backend) -> None:
    agent = Someone()
    job = backend.job_of(agent)
    other = {HEADER_AGENT: Someone().agent_id}
    answer = backend.append(job, LOGS, agent.epoch, 1, *lines(1, 2), **other)
    assert 400 <= answer.status_code < 500 and answer.json()["error"]
    assert backend.logs(job) == []
    mine = {HEADER_AGENT: agent.agent_id}
    assert backend.append(job, LOGS, agent.epoch, 1, *lines(1, 2), **mine).json()["ack"] == 2


def test_c62_what_an_agent_says_of_itself_is_taken_with_the_api_key(backend: Backend) -> None:
    agent = Someone()
    first, second, third = (Notice(time.time(), "info", text) for text in ("one", "two", "three"))
    for _ in range(2):
        answer = backend.append_own(agent, 1, first, second)
        assert (answer.status_code, answer.json()["ack"]) == (200, 2), answer.text
    answer = backend.append_own(agent, 4, third)
    assert (answer.status_code, answer.json()["ack"]) == (409, 2)
    assert backend.append_own(agent, 3, third, key="wak_" + "0" * 32).status_code in (401, 403)

    async def main() -> None:
        async with backend.greeted(agent, agent.head(1, last=2)) as (_, at):
            assert at == {1: 2}

    anyio.run(main)


def test_c63_a_command_is_in_each_answer_to_a_poll_until_it_is_answered(backend: Backend) -> None:
    agent = Someone()
    job = backend.job_of(agent)
    backend.append(job, 0, agent.epoch, 1, JobStatus(time.time(), 1, "failed"))
    assert backend.commands(agent) == []
    backend.control(job, "retry")
    (command,) = backend.commands(agent)
    assert (command.kind, command.job_id) == ("retry", job.id)
    assert backend.commands(agent) == [command] and backend.commands(Someone()) == []
    done = CommandDone(time.time(), command.command_id, "done")
    assert backend.append_own(agent, 1, done).status_code == 200
    assert backend.commands(agent) == []
