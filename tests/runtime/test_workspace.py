import json
import os
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.core.ports import CheckpointView
from agent.runtime.workspace import (
    MARKER,
    FolderTaken,
    NotThere,
    OutsideFolder,
    WorkspaceError,
    checkpoints_of,
    data_source,
    free_bytes,
    looks_like_hub_name,
    model_source,
    pin,
    pinned,
    prepare,
    resolve_under,
    unpin,
)
from agent.trainer.checkpoint import Checkpoints, Manifest
from protocol.failures import FailureReason


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of data sets with a neighbour that no job may see."""
    inside = tmp_path / "datasets"
    (inside / "deep").mkdir(parents=True)
    (inside / "train.jsonl").write_text("{}")
    (inside / "deep" / "more.jsonl").write_text("{}")
    (tmp_path / "secret.txt").write_text("not yours")
    (tmp_path / "datasets-of-others").mkdir()
    return inside


def test_a_path_within_the_folder_is_found(folder: Path) -> None:
    for given in ("train.jsonl", "./train.jsonl", "deep/../train.jsonl", str(folder / "train.jsonl")):
        assert resolve_under(folder, given) == (folder / "train.jsonl").resolve()
    (folder / "link").symlink_to("deep")
    assert resolve_under(folder, "link/more.jsonl") == (folder / "deep" / "more.jsonl").resolve()


@pytest.mark.parametrize(
    "given",
    [
        "../secret.txt",
        "deep/../../secret.txt",
        "/etc/passwd",
        "../datasets-of-others",
        "..",
        "out/x",
        "out",
        "loop-out",
    ],
)
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, given: str) -> None:
    (folder / "out").symlink_to(folder.parent)
    (folder / "loop-out").symlink_to("../secret.txt")
    with pytest.raises(
        OutsideFolder, match=r"leads out of .*datasets.* a job may use nothing outside"
    ) as caught:
        resolve_under(folder, given)
    assert caught.value.reason is FailureReason.PERMISSION


@pytest.mark.parametrize("given", ["", "train.jsonl\0.txt", "\0"])
def test_what_is_no_path_is_refused(folder: Path, given: str) -> None:
    with pytest.raises(WorkspaceError, match="Name a file or folder inside"):
        resolve_under(folder, given)


@pytest.mark.parametrize("given", ["none.jsonl", "train.jsonl/x", "x" * 5000, "loop"])
def test_what_is_not_there_is_told_in_a_sentence(folder: Path, given: str) -> None:
    (folder / "loop").symlink_to("loop")
    with pytest.raises(NotThere, match=r"^(There is no data set|The data set) .*\.$") as caught:
        resolve_under(folder, given, "data set")
    assert len(str(caught.value)) < 600 or "x" * 5000 not in str(caught.value)[:500]


@pytest.mark.parametrize(
    ("name", "can_be"),
    [
        ("meta-llama/Llama-3.2-1B", True),
        ("gpt2", True),
        ("org/name_1.5", True),
        ("./local", False),
        ("/abs/path", False),
        ("a/b/c", False),
        ("org/", False),
        ("../up", False),
        ("org/na me", False),
        ("org/a--b", False),
        ("org/repo.git", False),
        ("train.jsonl", False),
        ("data/train.jsonl.GZ", False),
        ("C:\\models", False),
        ("", False),
        ("x" * 97, False),
    ],
)
def test_hub_names_are_told_from_paths(name: str, can_be: bool) -> None:
    assert looks_like_hub_name(name) is can_be


def test_a_local_folder_goes_before_a_hub_name(tmp_path: Path) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert model_source("org/model", tmp_path, hub=True) == str((tmp_path / "org" / "model").resolve())
    assert model_source("org/other", tmp_path, hub=True) == "org/other"


def test_a_source_that_cannot_be_had_says_where_it_was_looked_for(folder: Path) -> None:
    with pytest.raises(NotThere, match=r'no data set "x\.jsonl" in .* DATASETS_DIR is where') as caught:
        data_source("x.jsonl", folder, hub=True)
    assert caught.value.reason is FailureReason.DATA
    with pytest.raises(NotThere, match=r"MODELS_DIR .* Hugging Face Hub, but ALLOW_HUB is off") as caught:
        model_source("org/model", folder, hub=False)
    assert caught.value.reason is FailureReason.MODEL
    with pytest.raises(NotThere, match="names no data set"):
        data_source("", folder, hub=True)
    with pytest.raises(OutsideFolder):
        model_source("/etc", folder, hub=True)


def places(home: Path) -> dict[str, Path]:
    return {
        "models_dir": home / "a" / "models",
        "checkpoints_dir": home / "checkpoints",
        "logs_dir": home / "logs",
        "cache_dir": home / "cache",
    }


def test_a_jobs_folders_are_the_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = prepare("job-1", **places(tmp_path))
    finally:
        os.umask(before)
    assert made.output == tmp_path / "a" / "models" / "job-1"
    assert made.log == tmp_path / "logs" / "job-1.log"
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert {made.checkpoints, made.cache, made.output.parent} <= set(folders)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}
    assert not made.output.exists()


def test_a_job_finds_its_folders_again(tmp_path: Path) -> None:
    made = prepare("job-1", **places(tmp_path))
    (made.checkpoints / "step-5").mkdir()
    (made.output / "weights").mkdir(parents=True)
    assert prepare("job-1", **places(tmp_path)) == made


@pytest.mark.parametrize(
    "taken", ["a/models/llama/config.json", "checkpoints/llama/mine.bin", "a/models/llama"]
)
def test_a_folder_of_somebody_else_is_not_written_to(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).parent.mkdir(parents=True)
    (tmp_path / taken).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        FolderTaken, match=r"llama was there before job llama .* Submit the job under another id"
    ):
        prepare("llama", **places(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_jobs_that_a_disk_cannot_tell_apart_are_told_apart(tmp_path: Path) -> None:
    made = prepare("job", **places(tmp_path))
    (made.checkpoints / MARKER).write_text("Job")
    with pytest.raises(FolderTaken, match="belongs to another job"):
        prepare("job", **places(tmp_path))


@pytest.mark.parametrize("job_id", ["", "..", "a/b", "/abs", ".hidden", "x" * 200, "a\0b"])
def test_a_job_id_cannot_name_another_folder(tmp_path: Path, job_id: str) -> None:
    with pytest.raises(WorkspaceError, match="is no job id"):
        prepare(job_id, **places(tmp_path))
    assert list(tmp_path.iterdir()) == []


def save(folder: Path, step: int, **told: Any) -> None:
    manifest = Manifest(
        **{"job_id": "j", "step": step, "epoch": step / 10, "attempt": 1, "reason": "schedule", "time": 1e9}
        | told
    )
    Checkpoints(folder).save(manifest, lambda into: (into / "weights").write_bytes(b"w" * 100) and None)


def test_checkpoints_of_the_trainer_are_listed(tmp_path: Path) -> None:
    save(tmp_path, 10, eval_loss=2.0, train_loss=2.5)
    save(tmp_path, 20, eval_loss=1.5)
    save(tmp_path, 9, attempt=2, eval_loss=1.5)
    save(tmp_path, 100, eval_loss=float("nan"))
    rows = [msgspec.convert(row, CheckpointView) for row in checkpoints_of(tmp_path)]
    assert [(row.step, row.is_latest, row.is_best) for row in rows] == [
        (9, True, False),
        (100, False, False),
        (20, False, True),
        (10, False, False),
    ]
    assert rows[3] == CheckpointView(
        path=str(tmp_path / "step-10"),
        epoch=1.0,
        step=10,
        eval_loss=2.0,
        train_loss=2.5,
        size_bytes=100,
        created_at="2001-09-09T01:46:40+00:00",
        is_best=False,
        is_latest=False,
    )


def test_the_best_is_the_one_that_the_job_chose_by_its_own_metric(tmp_path: Path) -> None:
    save(tmp_path, 10, eval_loss=2.0, best_step=10)
    save(tmp_path, 20, eval_loss=1.5, best_step=10)
    assert [row["step"] for row in checkpoints_of(tmp_path) if row["is_best"]] == [10]
    save(tmp_path, 30, best_step=25)
    # The one at step 25 is not there: the lowest loss is the best of what is left.
    assert [row["step"] for row in checkpoints_of(tmp_path) if row["is_best"]] == [20]


def test_a_checkpoint_is_pinned_and_unpinned_by_its_name(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    pin(tmp_path, "step-10")
    pin(tmp_path, "step-10")
    assert pinned(tmp_path) == {"step-10"}
    assert [row["is_pinned"] for row in checkpoints_of(tmp_path)] == [False, True]
    unpin(tmp_path, "step-10")
    unpin(tmp_path, "step-10")
    assert pinned(tmp_path) == set()
    for name in ("step-11", "", "..", "../step-10", "step-10/weights", "branched-from"):
        with pytest.raises(NotThere):
            pin(tmp_path, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-20"]


def test_a_manifest_that_tells_little_is_enough(tmp_path: Path) -> None:
    for name, text in {
        "step-7": "{}",
        "step-8": json.dumps({"step": 8, "from_the_future": [1]}),
        "step-9": "not json",
        "step-10": json.dumps({"step": "ten"}),
        "step-x": "{}",
        ".staging-step-11": "{}",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    (tmp_path / "step-12").mkdir()
    rows = checkpoints_of(tmp_path)
    assert [(row["step"], row["size_bytes"]) for row in rows] == [(8, 35), (7, 2)]
    assert not any(row["is_best"] for row in rows)
    assert checkpoints_of(tmp_path / "none") == []


def test_free_space_is_known_before_the_folder_is_there(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") > 0
