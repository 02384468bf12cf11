"""Many agents lose their hub at one moment, and come back without a storm and without a loss."""

import anyio

from tests.support.fleet import POINTS, Fleet
from tests.support.programs import Hub

WINDOW = 60.0
"""Seconds: the widest window that a wait between dials is drawn from."""
AGENTS = 500
"""Fewer would not do: of a hundred, a tenth in a hundred milliseconds is chance."""


def test_five_hundred_agents_come_back_as_a_drizzle(hub: Hub) -> None:
    storm = anyio.run(Fleet(hub, AGENTS).storm, 3.0)
    print(storm)
    assert storm.worst_tenth <= AGENTS / 10
    assert max(storm.returns) - storm.back <= WINDOW + 5
    assert (storm.lost, storm.doubled) == (0, 0)
    assert sum(map(len, storm.points.values())) == 2 * POINTS * AGENTS
