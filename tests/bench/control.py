"""How long a control message takes to the trainer and back while a backlog of points drains on the same socket.

The message is live parameters: durable at the agent before the trainer has them, its answer durable at the agent
before it is sent, and at the hub before it counts. The module is also the hub, with a stopwatch.
"""

import signal
import statistics
import sys
import time
from pathlib import Path
from typing import IO, Any

from agent.hub.__main__ import main
from agent.hub.agents import Connection
from agent.hub.hub import Hub
from agent.hub.ingest import Applied
from protocol.messages import Desired
from tests.bench.figures import DEFAULTS, Figure, at_most, percentile
from tests.bench.link import PointsAgent
from tests.support import programs
from tests.support.programs import fake_config, wait_until

POINTS = 300_000
FILE = "notes"
TARGET = 50
LOOK = 0.002
"""Seconds between looks for an answer."""


class AnsweringHub(programs.Hub):
    """A hub that notes when it said something to an agent, had stored the answer to it, and the last of the points."""

    module = "tests.bench.control"


def control(folder: Path, points: int = POINTS) -> dict[str, Figure]:
    """Return the round trip of live parameters while a backlog drains."""
    folder.mkdir(parents=True, exist_ok=True)
    hub = AnsweringHub(folder / "hub").start()
    settings = {
        **DEFAULTS,
        "METRICS_REPORT_INTERVAL_STEPS": "1",
        "BACKEND_TRANSPORT": "websocket",
        "MAX_CONCURRENT_JOBS": "2",
        "DEVICES": "0,1",
    }
    agent = PointsAgent(folder / "agent", hub.url, **settings).start()
    try:
        talks = hub.submit({**fake_config(steps=1), "name": "talks"})
        waits = hub.submit({**fake_config(steps=points), "name": "waits"})
        hub.wait_step(talks, 1)
        hub.wait_step(waits, 1)
        hub.stop(signal.SIGKILL)
        with agent.api() as api:
            path = f"/api/training/status/{waits}"
            wait_until(lambda: api.get(path).json()["current_step"] == points, "the last step without a hub")
        hub.start()
        with (hub.data / FILE).open() as notes:
            trips = _trips(hub, talks, notes)
    finally:
        for part in (agent, hub):
            if part.process is not None and part.process.poll() is None:
                part.stop()
    said = [1e3 * (answered - spoken) for _, spoken, answered in trips]
    asked = [1e3 * (answered - began) for began, _, answered in trips]
    return {
        "control": at_most(
            percentile(said, 0.99),
            "ms from the hub to the trainer and back (p99) while a backlog drains",
            TARGET,
            median=statistics.median(said),
            slowest=max(said),
            since_request_p99=percentile(asked, 0.99),
            trips=len(trips),
            backlog=points,
        )
    }


Trip = tuple[float, float, float]
"""When it was asked for, said by the hub, and answered: Unix seconds."""


def _trips(hub: programs.Hub, job_id: str, notes: IO[str]) -> list[Trip]:
    """Return the round trips that began before the last point was stored."""
    trips: list[Trip] = []
    url = f"{hub.url}/api/training/local/{job_id}/update-params"
    seen: dict[str, float] = {}
    number = 0
    while True:
        number += 1
        began = time.time()
        answer = hub.http.patch(url, json={"early_stopping_patience": number}).raise_for_status().json()
        if not answer["agent_told"]:  # it has not dialled again yet
            continue
        while f"answered {number}" not in seen:
            time.sleep(LOOK)
            for line in notes.readlines():
                what, _, at = line.rstrip().rpartition(" ")
                seen[what] = float(at)
        if seen.get("last", began) < began:
            return trips
        trips.append((began, seen[f"said {number}"], seen[f"answered {number}"]))


def watch(notes: IO[str], points: int) -> None:
    """Have the hub write down what `_trips` waits for; ``points``: the last step."""
    stored, say = Hub.stored, Connection.say
    known = 0

    async def noted(self: Hub, applied: Applied) -> None:
        nonlocal known
        if applied.points:
            if applied.points[-1][0].step == points:
                notes.write(f"last {time.time()}\n")
        elif (
            applied.job is not None and (number := applied.job.applied.early_stopping_patience or 0) != known
        ):
            known = number
            notes.write(f"answered {number} {time.time()}\n")
        await stored(self, applied)

    def saying(self: Connection, message: Any) -> None:
        if isinstance(message, Desired) and (number := message.parameters.early_stopping_patience):
            notes.write(f"said {number} {time.time()}\n")
        say(self, message)

    Hub.stored = noted  # type: ignore[method-assign]
    Connection.say = saying  # type: ignore[method-assign]


if __name__ == "__main__":
    folder = Path(sys.argv[sys.argv.index("--data-dir") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a", buffering=1) as file:
        watch(file, POINTS)
        code = main()
    sys.exit(code)
