"""Checkpoints are whole or absent."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import xxhash

from agent.runtime import workspace
from agent.trainer import checkpoint
from agent.trainer.checkpoint import (
    MANIFEST,
    BadCheckpoint,
    Checkpoints,
    Found,
    make_manifest,
    verify,
)
from agent.trainer.reading import reading


def save(
    store: Checkpoints, step: int, attempt: int = 1, content: bytes = b"weights", job_id: str = "job"
) -> Found:
    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(content * 100)
        (folder / "part").mkdir()
        (folder / "part" / "optimizer.pt").write_bytes(b"state of %d" % step)

    return store.save(make_manifest(job_id, step, step / 10, attempt, "schedule"), fill)


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
        (
            lambda path: loop(path / "model.safetensors"),
            "its file model.safetensors cannot be read (Too many levels",
        ),
        (lambda path: cover(path / "part"), "its file part/optimizer.pt cannot be read (Not a directory"),
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


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def cover(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file of /proc that opens and cannot be read")
def test_a_disk_that_cannot_read_a_file_makes_it_no_checkpoint(store: Checkpoints) -> None:
    def fill(folder: Path) -> None:
        (folder / "state").touch()

    older = save(store, 5)
    newer = store.save(make_manifest("job", 6, 0.6, 1, "schedule"), fill)
    (newer.path / "state").unlink()
    (newer.path / "state").symlink_to("/proc/self/mem")
    found, (sentence,) = store.newest_good()
    assert found == older
    assert "its file state cannot be read (Input/output error)" in sentence


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


def test_a_save_that_finds_no_room_leaves_nothing_half(store: Checkpoints) -> None:
    older = save(store, 5)

    def fill(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.save(make_manifest("job", 6, 0.6, 1, "schedule"), fill)
    assert [path.name for path in store.folder.iterdir()] == ["step-5"]
    assert store.newest_good() == (older, [])


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


def test_of_one_that_its_writer_has_hashed_nothing_is_read_again(store: Checkpoints) -> None:
    def fill(folder: Path) -> dict[str, checkpoint.FileRecord]:
        (folder / "weights").write_bytes(b"abc")
        return {"weights": checkpoint.FileRecord(3, "of the writer's own")}

    found = store.save(make_manifest("job", 1, 0.1, 1, "schedule"), fill)
    assert found.manifest.files["weights"].xxh3_128 == "of the writer's own"


def test_the_pinned_and_the_one_being_read_stay(store: Checkpoints) -> None:
    for step in range(1, 6):
        save(store, step)
    workspace.pin(store.folder, "step-1")
    # Another process: a replay, or a job that branches off.
    code = (
        "import sys, pathlib\nfrom agent.trainer.reading import reading\n"
        f"with reading(pathlib.Path({str(store.path(2))!r})):\n    print('in', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        assert reader.stdout.readline() == "in\n"
        store.retain(1)
        assert steps(store) == [1, 2, 5]
        reader.kill()
    store.retain(1)
    assert steps(store) == [1, 5]
    workspace.unpin(store.folder, "step-1")
    store.retain(1)
    assert steps(store) == [5]


def test_one_that_must_stay_gets_another_name_when_its_step_comes_again(store: Checkpoints) -> None:
    pinned, read = save(store, 4), save(store, 5)
    workspace.pin(store.folder, "step-4")
    again = save(store, 4, attempt=2, content=b"another")
    with reading(read.path):
        save(store, 5, attempt=2)
    assert verify(store.folder / "kept-step-4-attempt-1").manifest == pinned.manifest
    assert verify(store.folder / "kept-step-5-attempt-1").manifest == read.manifest
    assert verify(store.path(4)) == again
    # It is the other one that was pinned.
    assert workspace.pinned(store.folder) == set()
    store.retain(0)
    assert steps(store) == []
    assert len(list(store.folder.glob("kept-*"))) == 2


def test_each_that_must_stay_gets_a_name_of_its_own(store: Checkpoints) -> None:
    kept = []
    for content in (b"one", b"two", b"three"):
        kept.append(save(store, 4, content=content))
        workspace.pin(store.folder, "step-4")
    save(store, 4)
    names = ["kept-step-4-attempt-1", "kept-step-4-attempt-1-2", "kept-step-4-attempt-1-3"]
    assert [verify(store.folder / name).manifest for name in names] == [one.manifest for one in kept]


def test_one_that_this_process_reads_stays_too(store: Checkpoints) -> None:
    save(store, 1)
    save(store, 2)
    with reading(store.path(1)):
        store.retain(1)
        assert steps(store) == [1, 2]
    store.retain(1)
    assert steps(store) == [2]


def test_room_is_made_of_the_oldest_and_never_of_the_newest_good_one(store: Checkpoints) -> None:
    for step in range(1, 6):
        save(store, step)
    flip(store.path(5) / "model.safetensors")
    store.in_use = {store.path(1)}
    assert store.make_room(lambda: True) == 0
    assert store.make_room(lambda: False, most=1) == 1
    assert steps(store) == [1, 3, 4, 5]
    store.make_room(lambda: False)
    assert steps(store) == [1, 4]


def test_one_of_another_job_is_passed_over_and_outlives_this_one(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints", "other")
    theirs = save(store, 3)
    assert store.newest_good() == (
        None,
        ["Checkpoint step-3 was passed over: it is a checkpoint of another job (job)."],
    )
    with pytest.raises(BadCheckpoint, match="another job"):
        verify(store.path(3), "other")
    outlived(store, theirs, job_id="other")
    assert verify(store.folder / "kept-step-3-attempt-1", "job").manifest == theirs.manifest


def outlived(store: Checkpoints, theirs: Found, *, job_id: str) -> None:
    """Do all that a job does with old checkpoints, and see that this one is kept, byte for byte."""
    before = contents_of(theirs.path)
    step, older = theirs.manifest.step, theirs.manifest.step - 1
    save(store, older, attempt=2, job_id=job_id)
    save(store, step + 1, attempt=2, job_id=job_id)
    store.retain(1)
    assert steps(store) == [step, step + 1]
    store.make_room(lambda: False)
    store.retain(0)
    assert steps(store) == [step]
    store.sweep()
    assert contents_of(theirs.path) == before
    again = save(store, step, attempt=3, job_id=job_id)
    (kept,) = store.folder.glob("kept-*")
    assert contents_of(kept) == before
    assert store.newest_good() == (again, [])


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("prefix", [".staging-", ".doomed-"])
@pytest.mark.parametrize("again", [False, True])
def test_what_a_killed_process_left_of_a_newer_agent_is_not_swept_away(
    prefix: str, again: bool, store: Checkpoints
) -> None:
    rewrite(save(store, 6).path / MANIFEST, format=99)
    before = contents_of(store.path(6))
    store.path(6).rename(store.folder / f"{prefix}step-6")
    if again:
        save_elsewhere(store, 6)
    store.sweep()
    # Not under its own name: whether it is whole, only whoever wrote it knows.
    assert contents_of(store.folder / "kept-step-6-attempt-1") == before
    assert store.path(6).exists() is again


def save_elsewhere(store: Checkpoints, step: int) -> None:
    """Put a checkpoint where a finished one would be, without touching what else lies there."""
    other = Checkpoints(store.folder.with_name("elsewhere"))
    save(other, step).path.rename(store.path(step))


def rewrite(path: Path, **changes: object) -> None:
    """Seal a manifest anew with other words in it, as another version of the agent would."""
    told = json.loads(path.read_text()) | changes | {"check": ""}
    told["check"] = xxhash.xxh3_128_hexdigest(msgspec.json.encode(told))
    path.write_text(json.dumps(told))


def test_one_of_a_newer_format_is_passed_over_with_its_number(store: Checkpoints) -> None:
    older = save(store, 3)
    newer = save(store, 4)
    rewrite(newer.path / MANIFEST, format=3, files="in a way that nobody knows yet")
    found, (sentence,) = store.newest_good()
    assert found == older
    assert "newer version of the agent (format 3; this one reads up to 2)" in sentence


def test_one_of_a_newer_format_is_never_replaced_or_deleted(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints", "job")
    newer = save(store, 4)
    rewrite(newer.path / MANIFEST, format=99)
    outlived(store, newer, job_id="job")
    # An agent that knows the format finds it whole.
    kept = store.folder / "kept-step-4-attempt-1"
    rewrite(kept / MANIFEST, format=2)
    assert verify(kept, "job").manifest == newer.manifest


def test_one_whose_manifest_the_disk_does_not_give_is_not_taken_for_rubbish(store: Checkpoints) -> None:
    newer = save(store, 4)
    loop(newer.path / MANIFEST)
    save(store, 5, attempt=2)
    store.retain(1)
    store.make_room(lambda: False)
    assert steps(store) == [4, 5]
    save(store, 4, attempt=2)
    (kept,) = store.folder.glob("kept-*")
    assert (kept / "model.safetensors").read_bytes() == b"weights" * 100


@pytest.mark.parametrize(
    "damage", [lambda path: (path / MANIFEST).unlink(), lambda path: flip(path / MANIFEST)]
)
def test_one_with_a_broken_manifest_takes_no_good_ones_place(damage, store: Checkpoints) -> None:
    damage(save(store, 9).path)
    save(store, 2, attempt=2)
    store.retain(2)
    # Nothing is in want of its place yet.
    assert steps(store) == [2, 9]
    save(store, 4, attempt=2)
    store.retain(2)
    assert steps(store) == [2, 4]


def test_room_is_first_made_of_those_with_a_broken_manifest(store: Checkpoints) -> None:
    for step in (2, 4, 9):
        save(store, step)
    flip(store.path(9) / MANIFEST)
    assert store.make_room(lambda: False, most=1) == 1
    assert steps(store) == [2, 4]


def test_a_manifest_with_any_bit_flipped_is_a_broken_one(store: Checkpoints) -> None:
    good, saved = save(store, 2), save(store, 4)
    path = saved.path / MANIFEST
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in (1, 128):  # another character, and no character at all
            path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            try:
                told = verify(path.parent, "job").manifest
            except BadCheckpoint as wrong:
                # Nobody is told to update the agent for it.
                assert not isinstance(wrong, checkpoint.NotOurs)
            else:
                assert told == saved.manifest  # the last digit of a float
            workspace.checkpoints_of(store.folder)
    path.write_bytes(whole[:-9] + b"\xff" + whole[-8:])
    assert store.newest_good()[0] == good
    store.retain(1)
    assert steps(store) == [2]


def test_one_with_a_field_that_this_version_does_not_know_is_whole(store: Checkpoints) -> None:
    path = save(store, 3).path / MANIFEST
    rewrite(path, forecast=["a", 1.5])
    assert verify(path.parent).manifest.step == 3
    swap(path, "1.5", "2.5")
    with pytest.raises(BadCheckpoint, match="its manifest is not what was saved"):
        verify(path.parent)


def test_one_of_format_1_is_still_whole(tmp_path: Path) -> None:
    """As the first release wrote it."""
    path = tmp_path / "step-6"
    path.mkdir()
    (path / "optimizer.pt").write_bytes(b"pickled")
    told = {
        "format": 1,
        "job_id": "job",
        "step": 6,
        "epoch": 0.5,
        "attempt": 2,
        "reason": "pause",
        "time": 1795450000.25,
        "train_loss": 2.5,
        "eval_loss": None,
        "versions": {"torch": "2.13"},
        "inputs": {"seed": "42"},
        "files": {"optimizer.pt": {"size": 7, "xxh3_128": xxhash.xxh3_128_hexdigest(b"pickled")}},
        "check": "",
    }
    told["check"] = xxhash.xxh3_128_hexdigest(msgspec.json.encode(told))
    (path / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(told)))
    assert verify(path).manifest.attempt == 2


def test_a_folder_that_vanished_is_made_again_as_the_agents_own(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / workspace.MARKER).write_text("job")
    store = Checkpoints(folder)
    save(store, 1)
    assert not store.restore()
    shutil.rmtree(folder)
    assert store.restore()
    assert (folder / workspace.MARKER).read_text() == "job"
    save(store, 2)
    assert steps(store) == [2]


def test_agent_and_trainer_mean_the_same_files() -> None:
    assert workspace.MARKER == checkpoint.JOB_MARKER
    assert workspace.PINNED == checkpoint.PINNED
