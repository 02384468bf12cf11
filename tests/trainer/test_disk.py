"""Disks that refuse, in sentences."""

import errno
import os
from pathlib import Path

import pytest

from agent.trainer import disk
from agent.trainer.disk import NoRoom, check_writable, has_room, is_disk_full, need_room, refusals_told
from agent.trainer.errors import TrainerError
from protocol.failures import FailureReason


def test_libraries_say_a_full_disk_in_words(tmp_path: Path) -> None:
    wrapped = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert is_disk_full(wrapped, tmp_path)
    outer = RuntimeError("outer")
    outer.__cause__ = wrapped
    assert is_disk_full(outer, tmp_path)
    assert not is_disk_full(RuntimeError("PytorchStreamWriter failed writing file"), tmp_path)


def test_a_full_disk_says_what_it_needs_and_where(tmp_path: Path) -> None:
    free = disk.free_bytes(tmp_path / "not" / "yet")
    assert has_room(tmp_path, 1) and not has_room(tmp_path, 2 * free)
    with pytest.raises(NoRoom) as caught:
        need_room(tmp_path, "the checkpoint at step 4", 2 * free)
    assert caught.value.reason is FailureReason.DISK_FULL
    assert caught.value.needed == 2 * free + disk.SLACK
    sentence = caught.value.sentence
    assert sentence.startswith("There is no room for the checkpoint at step 4: about ")
    assert f"MB are free on the disk of {tmp_path}." in sentence


@pytest.mark.parametrize(
    ("error", "told", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), NoRoom, "about 5 MB are needed"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), NoRoom, "no room for the model"),
        (OSError(errno.EROFS, "Read-only file system"), TrainerError, "written to .*: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied"), TrainerError, "The model cannot be written to"),
        (ValueError("a bug"), ValueError, "a bug"),
    ],
)
def test_a_refusal_becomes_a_sentence(
    error: Exception, told: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(told, match=says), refusals_told(tmp_path, "the model", 5_000_000):
        raise error


def test_a_place_is_tried_before_it_is_needed(tmp_path: Path) -> None:
    check_writable(tmp_path / "new", "the model")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainerError, match="The model cannot be written to"):
        check_writable(tmp_path / "file" / "below", "the model")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(TrainerError, match="Permission denied"):
            check_writable(tmp_path, "the model")
    finally:
        tmp_path.chmod(0o700)
