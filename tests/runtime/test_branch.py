"""The checkpoint of another job is linked into the new one's folder, and stays there."""

import json
import shutil
from pathlib import Path

import pytest

from agent.runtime.branch import FOLDER, take
from agent.runtime.workspace import WorkspaceError, checkpoints_of
from protocol.failures import FailureReason
from protocol.jobspec import BranchSpec


def checkpoint(folder: Path, step: int, eval_loss: float | None = None, attempt: int = 1) -> Path:
    path = folder / "run-1" / f"step-{step}"
    (path / "training").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights" * step)
    (path / "training" / "optimizer.json").write_text("{}")
    told = {"job_id": "run-1", "step": step, "attempt": attempt, "time": 1.0, "eval_loss": eval_loss}
    (path / "manifest.json").write_text(json.dumps(told))
    return path


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    checkpoint(tmp_path, 10, 1.5)
    checkpoint(tmp_path, 20, 1.25)
    checkpoint(tmp_path, 30, 1.75)
    return tmp_path


@pytest.mark.parametrize(("name", "taken"), [("", "step-30"), ("best", "step-20"), ("step-10", "step-10")])
def test_it_is_chosen_by_name_and_costs_no_disk(parent: Path, name: str, taken: str) -> None:
    path = take(BranchSpec(job_id="run-1", checkpoint=name), parent, "run-2")
    assert path == parent / "run-2" / FOLDER / taken
    source = parent / "run-1" / taken
    for file in ("manifest.json", "model.safetensors", "training/optimizer.json"):
        assert (path / file).samefile(source / file)
    assert checkpoints_of(parent / "run-2") == []


def test_it_stays_when_the_other_job_is_deleted(parent: Path) -> None:
    wanted = BranchSpec(job_id="run-1", checkpoint="step-10")
    path = take(wanted, parent, "run-2")
    shutil.rmtree(parent / "run-1")
    assert take(wanted, parent, "run-2") == path
    assert (path / "model.safetensors").read_bytes() == b"weights" * 10


def test_one_that_was_put_aside_is_found_again_at_the_next_start(parent: Path) -> None:
    (parent / "run-1" / "step-10").rename(parent / "run-1" / "kept-step-10-attempt-1")
    wanted = BranchSpec(job_id="run-1", checkpoint="kept-step-10-attempt-1")
    path = take(wanted, parent, "run-2")
    assert path == parent / "run-2" / FOLDER / "step-10"
    shutil.rmtree(parent / "run-1")
    assert take(wanted, parent, "run-2") == path


def test_one_that_was_put_aside_and_does_not_say_its_step_is_refused(parent: Path) -> None:
    aside = (parent / "run-1" / "step-10").rename(parent / "run-1" / "kept-step-10-attempt-1")
    (aside / "manifest.json").write_text("{")
    with pytest.raises(WorkspaceError, match="kept-step-10-attempt-1 cannot be branched from: its manifest"):
        take(BranchSpec(job_id="run-1", checkpoint=aside.name), parent, "run-2")
    assert not list((parent / "run-2" / FOLDER).iterdir())


def test_what_a_kill_left_is_made_anew(parent: Path) -> None:
    half = parent / "run-2" / FOLDER / ".staging-step-30"
    half.mkdir(parents=True)
    (half / "odd").touch()
    path = take(BranchSpec(job_id="run-1"), parent, "run-2")
    assert not (path / "odd").exists()
    assert not half.exists()


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (BranchSpec(job_id="run-9"), "The job run-9 has no checkpoint on this machine"),
        (BranchSpec(job_id="run-1", checkpoint="step-99"), 'There is no checkpoint "step-99"'),
        (BranchSpec(job_id="run-1", checkpoint="../../x"), "leads out of"),
        (BranchSpec(job_id="run-1", checkpoint="step-10/training"), "is no checkpoint; it has step-30, step-20, step-10."),
    ],
)  # fmt: skip
def test_what_cannot_be_branched_from_is_said(parent: Path, wanted: BranchSpec, sentence: str) -> None:
    with pytest.raises(WorkspaceError) as caught:
        take(wanted, parent, "run-2")
    assert sentence in str(caught.value)


def test_without_an_evaluation_there_is_no_best(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    with pytest.raises(WorkspaceError, match="has no best checkpoint") as caught:
        take(BranchSpec(job_id="run-1", checkpoint="best"), tmp_path, "run-2")
    assert caught.value.reason is FailureReason.CHECKPOINT
