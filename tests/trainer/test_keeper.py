"""Who learns of what the writing thread meets, and when."""

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from agent.trainer import snapshot
from agent.trainer.checkpoint import Checkpoints, make_manifest
from agent.trainer.disk import NoRoom
from agent.trainer.errors import TrainerError
from agent.trainer.keeper import Keeper, Save
from agent.trainer.snapshot import Content
from agent.trainer.tensorfile import read
from protocol.failures import FailureReason
from protocol.worker import Limits, Note, Saved
from tests.trainer.conftest import RecordingLine


def save(step: int, reason: str = "schedule") -> Save:
    return Save(
        make_manifest("job", step, 0.1, 1, reason),
        Content({"model": {"w": torch.full((3,), float(step))}}),
        [(reason, "")],
        is_best=False,
        keep=set(),
        limit=2,
        began=time.monotonic(),
    )


class Full(Checkpoints):
    """On a disk that is full, whatever it says of itself."""

    full = True

    def save(self, *what: object) -> object:  # type: ignore[override]
        if self.full:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return super().save(*what)  # type: ignore[arg-type]


def test_the_next_step_of_the_optimizer_learns_of_a_full_disk(tmp_path: Path) -> None:
    keeper = Keeper(Full(tmp_path), RecordingLine({}), Limits(), dict)
    keeper.save(save(1))
    keeper.before_step()  # waits for the copy; the write may not be over
    until = time.monotonic() + 60
    with pytest.raises(NoRoom, match="no room for the checkpoint at step 1"):
        while time.monotonic() < until:
            keeper.before_step()
    keeper.before_step()
    keeper.wait()


def test_older_ones_go_first_where_the_disk_is_fuller_than_it_says(tmp_path: Path) -> None:
    store, line = Full(tmp_path), RecordingLine({})
    keeper = Keeper(store, line, Limits(), dict)
    store.full = False
    for step in (1, 2):
        keeper.save(save(step, "pause"))
    store.full = True
    delete = store._delete

    def freeing(path: Path) -> bool:
        store.full = False
        return delete(path)

    store._delete = freeing  # type: ignore[method-assign]
    keeper.save(save(3, "pause"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3"]
    assert [one.step for one in line.of(Saved)] == [1, 2, 3]
    assert not line.of(Note)


def no_memory(size: int) -> torch.Tensor:
    raise RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {size} bytes.")


def test_without_memory_for_a_copy_the_optimizer_waits_for_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow as it is, what the optimizer does after it has waited does not get in."""
    monkeypatch.setattr(snapshot, "_fresh", no_memory)
    write, late = Content.write, threading.Event()

    def write_late(self: Content, folder: Path, **how: Any) -> Any:
        late.wait(0.2)
        return write(self, folder, **how)

    monkeypatch.setattr(Content, "write", write_late)
    line = RecordingLine({})
    keeper = Keeper(Checkpoints(tmp_path), line, Limits(), dict)
    for step in (1, 2):
        saved = save(step)
        keeper.save(saved)
        keeper.before_step()
        saved.content.tensors["model"]["w"].zero_()
    keeper.wait()
    for step in (1, 2):
        assert read(tmp_path / f"step-{step}", "model")["w"].tolist() == [float(step)] * 3
    assert [one.step for one in line.of(Saved)] == [1, 2]
    (note,) = line.of(Note)
    assert "does not fit into this machine's memory" in note.text


def test_a_write_without_memory_is_no_lack_of_the_optimizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Content, folder: Path, **how: Any) -> Any:
        no_memory(1)

    monkeypatch.setattr(Content, "write", fail)
    line = RecordingLine({})
    keeper = Keeper(Checkpoints(tmp_path), line, Limits(), dict)
    keeper.save(save(1))
    keeper.before_step()
    keeper.wait()
    (note,) = line.of(Note)
    assert "checkpoint at step 1 could not be written: memory ran out" in note.text
    assert "tries again at the next checkpoint" in note.text
    with pytest.raises(TrainerError, match="step 2 could not be written") as caught:
        keeper.save(save(2, "pause"))
    assert caught.value.reason is FailureReason.HOST_MEMORY
    assert not list(tmp_path.iterdir())
