"""A job's samples at the platform, which inserts whatever it is sent."""

from typing import Any

import msgspec
import pytest

from agent.net.predictions import rows_of
from protocol.records import Result
from tests.net.kept import Kept, deliver, kept
from tests.support.platform import Platform

SAMPLES: list[dict[str, str | float]] = [
    {
        "prompt": f"Question {number}?",
        "answer": "Yes.",
        "before": "zz\x00z",
        "after": " Yes. " if number % 2 else "No.",
        "log_likelihood_before": -4.5,
        "log_likelihood_after": -0.5,
    }
    for number in range(16)
]
RESULT = Result(1e9, 1, "model", "", "abc", 30, {"train_loss": 0.5}, SAMPLES)


def completed(platform: Platform, result: Result = RESULT) -> Kept:
    store = kept(platform)
    store.held[store.job_id] = msgspec.structs.replace(store.held[store.job_id], epoch=2.0, step=30)
    store.add(store.control, result)
    store.status("completed")
    return store


def test_a_sample_is_two_predictions() -> None:
    with Platform() as platform:
        store = completed(platform)
        deliver(platform, store)
        assert platform.rows[store.job_id]["status"] == "completed"
        assert len(platform.predictions) == 32
        assert platform.predictions[2:4] == [
            {
                "job_id": store.job_id,
                "user_id": "u1",
                "epoch": 0,
                "step": 0,
                "sample_index": 1,
                "prompt": "Question 1?",
                "prediction": "zzz",
                "do_sample": False,
                "ground_truth": "Yes.",
                "exact_match": 0.0,
            },
            {
                "job_id": store.job_id,
                "user_id": "u1",
                "epoch": 2,
                "step": 30,
                "sample_index": 1,
                "prompt": "Question 1?",
                "prediction": " Yes. ",
                "do_sample": False,
                "ground_truth": "Yes.",
                "exact_match": 1.0,
            },
        ]


@pytest.mark.parametrize("fault", ["lost", "dropped", "late", "slow", "502", "gateway"])
def test_each_is_there_once_whatever_becomes_of_an_answer(fault: str) -> None:
    with Platform() as platform:
        platform.late = 0.6
        store = completed(platform)
        platform.fault("predictions", fault)
        platform.fault("read-predictions", fault)
        deliver(platform, store, within=0.4, settle=0.8)
        shown = [(row["step"], row["sample_index"]) for row in platform.predictions]
        assert sorted(shown) == sorted((step, index) for step in (0, 30) for index in range(16))
        # Told again by an agent that has forgotten that it was told: nothing is doubled.
        store.add(store.control, RESULT)
        deliver(platform, store)
        assert len(platform.predictions) == 32
        assert platform.rows[store.job_id]["status"] == "completed"


def test_more_than_a_page_that_others_wrote_is_read() -> None:
    with Platform() as platform:
        store = completed(platform)
        others: list[dict[str, Any]] = [
            {"job_id": store.job_id, "step": 500 + number, "sample_index": 0} for number in range(70)
        ]
        mine = rows_of(RESULT, store.job_id, "u1", 2)
        platform.predictions += [*others, *mine[:5]]
        deliver(platform, store)
        assert len(platform.predictions) == 70 + 32


def test_a_job_without_samples_asks_for_nothing() -> None:
    with Platform() as platform:
        store = completed(platform, msgspec.structs.replace(RESULT, samples=[]))
        deliver(platform, store)
        assert platform.seen["read-predictions"] == platform.seen["predictions"] == 0
