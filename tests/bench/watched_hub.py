"""The real hub with a stopwatch: it notes when a socket opened, a point was committed, a state was reached.

Started as `agent.hub` is; the notes go to `seen.jsonl` in its data folder, one array a line:
``["open", t, agent]``, ``["point", t, job, step, time of the step]``, ``["state", t, job, state]``.
"""

import json
import sys
import time
from pathlib import Path
from typing import IO, Any

from agent.hub import agents
from agent.hub.__main__ import main
from agent.hub.hub import Hub
from agent.hub.ingest import Applied
from tests.support import programs

FILE = "seen.jsonl"


class WatchedHub(programs.Hub):
    """Starts this module, and reads its notes."""

    module = "tests.bench.watched_hub"

    def seen(self, kind: str) -> list[list[Any]]:
        """Return the notes of one kind so far."""
        try:
            lines = (self.data / FILE).read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []
        notes = [json.loads(line) for line in lines]
        return [note for note in notes if note[0] == kind]

    def points(self, job_id: str, last: int) -> list[tuple[int, float, float]]:
        """Return step, end of the step and moment of its commit of a job's points; waits for step ``last``.

        A job's state goes before its points, so that they may lack for a moment when it has completed.
        """

        def found() -> list[tuple[int, float, float]]:
            return [(step, ended, at) for _, at, name, step, ended in self.seen("point") if name == job_id]

        programs.wait_until(lambda: any(step == last for step, _, _ in found()), f"step {last} at the hub")
        return found()


def watch(notes: IO[str]) -> None:
    """Have the hub's classes write notes."""
    stored, run = Hub.stored, agents.Connection.run

    async def noted_stored(self: Hub, applied: Applied) -> None:
        # Called when the commit has returned, on the hub's loop: never earlier than what it measures.
        now = time.time()
        if applied.job is not None:
            for point, _ in applied.points:
                notes.write(f'["point", {now}, "{applied.job.id}", {point.step}, {point.time}]\n')
            notes.write(f'["state", {now}, "{applied.job.id}", "{applied.job.state}"]\n')
        await stored(self, applied)

    async def noted_run(self: agents.Connection) -> None:
        notes.write(f'["open", {time.time()}, "{self._named}"]\n')
        await run(self)

    Hub.stored = noted_stored  # type: ignore[method-assign]
    agents.Connection.run = noted_run  # type: ignore[method-assign]


if __name__ == "__main__":
    folder = Path(sys.argv[sys.argv.index("--data-dir") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a", buffering=1) as file:
        watch(file)
        code = main()
    sys.exit(code)
