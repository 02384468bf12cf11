"""Many agents lose their hub at one moment, and come back without a storm and without a loss."""

from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from tests.support.fleet import POINTS, Fleet
from tests.support.recording import RecordingHub

WINDOW = 60.0
"""Seconds: the widest window that a wait between dials is drawn from."""
AGENTS = 500
"""Fewer would not do: of a hundred, a tenth in a hundred milliseconds is chance."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[RecordingHub]:
    started = RecordingHub(tmp_path / "hub").start()
    yield started
    started.stop()


def test_five_hundred_agents_come_back_as_a_drizzle(hub: RecordingHub) -> None:
    storm = anyio.run(Fleet(hub, AGENTS).storm, 3.0)
    print(storm)
    assert storm.worst_tenth <= AGENTS / 10
    # The longest wait, and what a busy machine needs to connect.
    assert max(storm.returns) - storm.back <= WINDOW + 30
    assert (storm.lost, storm.doubled) == (0, 0)
    assert storm.took.total() == 2 * POINTS * AGENTS
