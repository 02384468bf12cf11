"""The config of a job that begins with another one's checkpoint."""

import pytest

from protocol.branching import branched, dotted
from protocol.jobspec import BadSpec, BranchSpec
from protocol.trainingconfig import job_spec

CONFIG = {
    "model": {"name": "m"},
    "training": {"learning_rate": 1e-3, "seed": 7},
    "branch": {"job_id": "older"},
}


def test_adjustments_are_laid_over_key_by_key() -> None:
    made = branched(CONFIG, {"training": {"learning_rate": 1e-4, "seed": None}}, "run-1", "best")
    assert made["training"] == {"learning_rate": 1e-4}
    assert CONFIG["training"] == {"learning_rate": 1e-3, "seed": 7}
    spec = job_spec("run-2", made)
    assert spec.branch == BranchSpec(job_id="run-1", checkpoint="best")
    assert spec.training.learning_rate == 1e-4


def test_where_it_branches_off_is_said_once() -> None:
    with pytest.raises(BadSpec, match=r"^branch: "):
        branched(CONFIG, {"branch": {}}, "run-1", "")


def test_paths_with_dots_are_a_tree() -> None:
    assert dotted({"training.seed": 1, "training.lora_r": 8, "name": "x"}) == {
        "training": {"seed": 1, "lora_r": 8},
        "name": "x",
    }
    with pytest.raises(BadSpec, match=r"^a\.b: "):
        dotted({"a": 1, "a.b": 2})
