"""The fake trainer, with a record of its own: every point it says is in a file before it is said.

The agent reads nothing of it. The file lies beside the job's checkpoints folder and has a line for each point:
attempt, step, and its values; and one for each attempt: its number and the process's.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from agent.trainer import fake
from agent.trainer.line import EventQueue, Line, OrderQueue
from protocol.worker import AnyEvent, Metrics


class Said(msgspec.Struct, array_like=True):
    """A line of the record."""

    attempt: int
    step: int
    values: dict[str, float]


def path_of(checkpoints_dir: Path, job_id: str) -> Path:
    return checkpoints_dir / f"{job_id}.said"


def read(checkpoints_dir: Path, job_id: str) -> Iterator[Said]:
    """Yield what was said so far, and (step 0) who said it."""
    path = path_of(checkpoints_dir, job_id)
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        yield msgspec.json.decode(line, type=Said)


class RecordedLine(Line):
    """Writes down what is about to be said.

    Before and not after: a process that is killed in between repeats the step in its next attempt, and that counts.
    """

    def begin(self, attempt: int, first_event: int, leftovers_folder: str) -> None:
        folder = Path(leftovers_folder)
        self._file = os.open(
            path_of(folder.parent, folder.name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
        )
        self._number = attempt
        self._write(Said(attempt, 0, {"pid": float(os.getpid())}))
        super().begin(attempt, first_event, leftovers_folder)

    def say(self, event: AnyEvent) -> None:
        if isinstance(event, Metrics):
            self._write(Said(self._number, event.step, event.values))
        super().say(event)

    def _write(self, said: Said) -> None:
        os.write(self._file, msgspec.json.encode(said) + b"\n")


def main(orders: OrderQueue, events: EventQueue) -> int:
    """Do as the fake does."""
    fake.Line = RecordedLine  # type: ignore[attr-defined]
    return fake.main(orders, events)
