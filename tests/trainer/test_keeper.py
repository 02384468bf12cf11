"""Who learns of what the writing thread meets, and when."""

import errno
import time
from pathlib import Path

import pytest
import torch

from agent.trainer.checkpoint import Checkpoints, make_manifest
from agent.trainer.disk import NoRoom
from agent.trainer.keeper import Keeper, Save
from agent.trainer.snapshot import Content
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
