"""The hub with a record of all that it stores, which keeps nothing out that comes twice; its own tables may."""

import sqlite3
from collections import Counter

from protocol.messages import Lane
from tests.support.programs import Hub


class RecordingHub(Hub):
    """The hub of `tests.link.hub`."""

    module = "tests.link.hub"

    def start(self) -> "RecordingHub":
        """Start it, on the port it had before if it had one."""
        super().start()
        return self

    def took(self, lane: Lane) -> Counter[str]:
        """Return how many records of a lane were stored of each job, each as often as it was."""
        with sqlite3.connect(f"file:{self.data / 'hub.sqlite3'}?mode=ro", uri=True) as db:
            rows = db.execute(
                "SELECT scope, count(*) FROM link_took WHERE lane=? AND digest IS NOT NULL GROUP BY scope",
                (int(lane),),
            )
            return Counter(dict(rows.fetchall()))
