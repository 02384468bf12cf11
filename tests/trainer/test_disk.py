"""Disks that refuse, in sentences."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.trainer import disk
from agent.trainer.disk import NoRoom, check_writable, has_room, is_disk_full, need_room, refusals_told
from agent.trainer.errors import TrainerError
from protocol.failures import FailureReason
from tests.support.mounts import needs_mounts
from tests.support.programs import ROOT, clean_env


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


READ_ONLY = """
import subprocess, sys
from pathlib import Path
from agent.trainer.disk import check_writable
from agent.trainer.errors import TrainerError
from agent.trainer.reasons import explain

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], check=True)
check_writable(disk / "job", "the job's checkpoints")
subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
for folder in (disk / "job", disk / "another"):
    try:
        check_writable(folder, "the job's checkpoints")
    except TrainerError as error:
        print(error.reason, error.sentence, sep="|")
try:
    (disk / "job" / "cache").write_text("")
except OSError as error:
    print(*explain(error), sep="|")
"""


def test_a_disk_that_is_mounted_read_only_is_said_to_be_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [*needs_mounts(), sys.executable, "-c", READ_ONLY, str(tmp_path)],
        cwd=ROOT,
        env=clean_env(),
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    said = [line.split("|") for line in done.stdout.splitlines()]
    for (reason, sentence), name in zip(said[:2], ("job", "another"), strict=True):
        assert reason == "permission"
        assert sentence.startswith(
            f"The job's checkpoints cannot be written to {tmp_path / name}: Read-only file system."
        )
        assert "mount the disk again" in sentence
    reason, sentence, advice = said[2]
    assert reason == "permission" and "mount the disk again" in advice
    where = tmp_path / "job" / "cache"
    assert sentence.startswith(f"{where} cannot be used: the disk is mounted read-only.")
