"""The platform's words."""

import msgspec
import pytest

from protocol.lifecycle import TERMINAL, JobState
from protocol.rest import (
    CLAIM,
    DATASET,
    JOB,
    METRIC_NAMES,
    STATUS,
    Control,
    Execute,
    SubmitJob,
)


def test_every_state_has_a_word_of_the_platform() -> None:
    assert set(STATUS) == set(JobState)
    ended = {"completed", "failed", "cancelled"}
    assert {state for state in JobState if STATUS[state] in ended} == TERMINAL
    # A retry after a lost worker passes through "queued", and never through a false failure.
    assert STATUS[JobState.PREPARING] == STATUS[JobState.PAUSING] == "running"


def test_paths_belong_to_a_job() -> None:
    assert (
        DATASET.format(job_id="j") == "/api/training/local/j/dataset" == JOB.format(job_id="j") + "/dataset"
    )
    assert CLAIM.format(job_id="j").endswith("/claim/j")


def test_metric_names_are_each_there_once() -> None:
    assert len(set(METRIC_NAMES)) == len(METRIC_NAMES)
    assert {"train_loss", "eval_loss", "perplexity", "learning_rate", "grad_norm", "progress"} <= set(
        METRIC_NAMES
    )


def test_a_submitted_job_may_carry_keys_that_only_the_page_knows() -> None:
    body = msgspec.json.decode(b'{"config": {}, "user_id": "u", "status": "pending"}', type=SubmitJob)
    assert body.config == {}
    assert body.job_id is None


def test_only_known_actions_are_taken() -> None:
    assert msgspec.json.decode(b'{"action": "stop"}', type=Control).action == "stop"
    with pytest.raises(msgspec.ValidationError, match="explode"):
        msgspec.json.decode(b'{"action": "explode"}', type=Control)
    with pytest.raises(msgspec.ValidationError, match="config"):
        msgspec.json.decode(b"{}", type=Execute)
