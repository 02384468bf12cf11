"""Which job runs next, and where."""

from typing import Any

from agent.core.agenda import due, queue
from agent.core.job import Job
from protocol.lifecycle import JobState


def job(job_id: str, order: int = 0, state: JobState = JobState.QUEUED, **fields: Any) -> Job:
    return Job(job_id=job_id, config="{}", order=order, state=state, **fields)


def test_jobs_wait_in_their_order_and_only_those_that_wait() -> None:
    jobs = [
        job("c", 3),
        job("a", -1),
        job("b", 2),
        job("p", 0, JobState.PAUSED),
        job("r", 1, JobState.RUNNING),
    ]
    assert [one.job_id for one in queue(jobs)] == ["a", "b", "c"]


def test_one_job_at_a_time_on_a_processor() -> None:
    jobs = [job("a", 1), job("b", 2)]
    assert due(jobs, {}, ["cpu"], 1) == [("a", "cpu")]
    assert due(jobs, {"a": "cpu"}, ["cpu"], 1) == []


def test_a_processor_takes_as_many_as_are_allowed() -> None:
    jobs = [job("a", 1), job("b", 2), job("c", 3)]
    assert due(jobs, {}, ["cpu"], 2) == [("a", "cpu"), ("b", "cpu")]


def test_a_device_each() -> None:
    jobs = [job("a", 1), job("b", 2), job("c", 3)]
    assert due(jobs, {}, ["0", "1"], 4) == [("a", "0"), ("b", "1")]
    assert due(jobs, {"x": "0"}, ["0", "1"], 4) == [("a", "1")]
    assert due(jobs, {"x": "0"}, ["0", "1"], 1) == []


def test_a_job_goes_back_to_its_device_if_that_is_free() -> None:
    jobs = [job("a", 1, device="1"), job("b", 2, device="1")]
    assert due(jobs, {}, ["0", "1"], 2) == [("a", "1"), ("b", "0")]
    assert due([job("a", device="7")], {}, ["0"], 1) == [("a", "0")], (
        "a device that is gone is no reason to wait"
    )


def test_a_job_whose_old_process_still_lives_waits_for_its_end() -> None:
    jobs = [job("a", 1), job("b", 2)]
    assert due(jobs, {"a": "0"}, ["0", "1"], 2) == [("b", "1")]


def test_a_device_is_free_when_its_process_is_gone_and_not_before() -> None:
    jobs = [job("a", 1, JobState.FAILED), job("b", 2)]
    assert due(jobs, {"a": "0"}, ["0"], 2) == []
