"""Checkpoints are whole or absent."""

import errno
import shutil
from pathlib import Path

import pytest

from agent.trainer.checkpoint import (
    MANIFEST,
    BadCheckpoint,
    Checkpoints,
    Found,
    is_disk_full,
    make_manifest,
    verify,
)
from agent.trainer.errors import TrainerError
from protocol.failures import FailureReason


def save(store: Checkpoints, step: int, attempt: int = 1, content: bytes = b"weights") -> Found:
    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(content * 100)
        (folder / "part").mkdir()
        (folder / "part" / "optimizer.pt").write_bytes(b"state of %d" % step)

    return store.save(make_manifest("job", step, step / 10, attempt, "schedule"), fill)


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def steps(store: Checkpoints) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in store.folder.glob("step-*"))


def test_a_saved_checkpoint_verifies_and_is_found(store: Checkpoints) -> None:
    saved = save(store, 3)
    found, passed = store.newest_good()
    assert found == saved
    assert found.manifest.files.keys() == {"model.safetensors", "part/optimizer.pt"}
    assert found.size == 700 + len(b"state of 3")
    assert passed == []
    assert [path.name for path in store.folder.iterdir()] == ["step-3"]


def test_there_may_be_none(store: Checkpoints) -> None:
    assert store.newest_good() == (None, [])


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: (path / "part/optimizer.pt").unlink(), "its file part/optimizer.pt is missing"),
        (lambda path: (path / "model.safetensors").write_bytes(b"short"), "has 5 bytes where 700 were saved"),
        (lambda path: flip(path / "model.safetensors"), "the contents of its file model.safetensors"),
        (lambda path: (path / MANIFEST).unlink(), "its save was never finished"),
        (lambda path: flip(path / MANIFEST), "its manifest"),
        (lambda path: swap(path / MANIFEST, '"step": 9', '"step": 8'), "its manifest is not what was saved"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(damage, why, store: Checkpoints) -> None:
    older = save(store, 5)
    damage(save(store, 9).path)
    found, passed = store.newest_good()
    assert found == older
    (sentence,) = passed
    assert sentence.startswith("Checkpoint step-9 was passed over: ")
    assert why in sentence


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_save_that_was_killed_leaves_the_older_ones(store: Checkpoints) -> None:
    older = save(store, 5)
    torn = store.folder / ".staging-step-6"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert store.newest_good() == (older, [])
    store.sweep()
    assert not torn.exists()
    assert steps(store) == [5]


def test_a_save_killed_just_before_its_rename_is_taken_over(store: Checkpoints) -> None:
    save(store, 6).path.rename(store.folder / ".staging-step-6")
    store.sweep()
    assert steps(store) == [6]


def test_a_save_killed_while_it_replaced_another_leaves_one(store: Checkpoints) -> None:
    save(store, 6).path.rename(store.folder / ".doomed-step-6")
    store.sweep()
    found, _ = store.newest_good()
    assert found is not None
    assert found.manifest.step == 6


def test_a_full_disk_is_said_and_leaves_nothing_half(store: Checkpoints) -> None:
    older = save(store, 5)

    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrainerError) as caught:
        store.save(make_manifest("job", 6, 0.6, 1, "schedule"), fill)
    assert caught.value.reason is FailureReason.DISK_FULL
    assert "checkpoint at step 6" in caught.value.sentence
    assert [path.name for path in store.folder.iterdir()] == ["step-5"]
    assert store.newest_good() == (older, [])


def test_another_error_of_a_save_is_not_a_full_disk(store: Checkpoints) -> None:
    def fill(folder: Path) -> None:
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        store.save(make_manifest("job", 6, 0.6, 1, "schedule"), fill)
    assert list(store.folder.iterdir()) == []


def test_libraries_say_a_full_disk_in_words(tmp_path: Path) -> None:
    wrapped = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert is_disk_full(wrapped, tmp_path)
    outer = RuntimeError("outer")
    outer.__cause__ = wrapped
    assert is_disk_full(outer, tmp_path)
    assert not is_disk_full(RuntimeError("PytorchStreamWriter failed writing file"), tmp_path)


def test_the_oldest_go_and_those_in_use_stay(store: Checkpoints) -> None:
    for step in range(1, 7):
        save(store, step)
    store.in_use = {store.path(2)}
    store.retain(3)
    assert steps(store) == [2, 4, 5, 6]
    assert not list(store.folder.glob(".*"))


def test_a_checkpoint_is_replaced_by_one_of_the_same_step(store: Checkpoints) -> None:
    save(store, 6)
    again = save(store, 6, attempt=2, content=b"another")
    assert store.newest_good() == (again, [])
    assert not list(store.folder.glob(".*"))


def test_after_going_back_the_abandoned_steps_are_not_chosen(store: Checkpoints) -> None:
    for step in (2, 4, 6):
        save(store, step)
    store.note_origin(2, store.path(4))
    found, _ = store.newest_good()
    assert found is not None
    assert found.manifest.step == 4
    newer = save(store, 5, attempt=2)
    assert store.newest_good() == (newer, [])
    shutil.rmtree(newer.path)
    shutil.rmtree(store.path(4))
    found, _ = store.newest_good()
    assert found is not None
    assert found.manifest.step == 6


def test_a_missing_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint):
        verify(tmp_path / "nothing")
