"""The benchmark suite: `python -m tests.bench`. No test fails because of a figure."""

from collections.abc import Callable
from pathlib import Path

from tests.bench import start
from tests.bench.figures import Figure

BENCHMARKS: dict[str, Callable[[Path], dict[str, Figure]]] = {
    "start": start.start,
    "idle": start.idle,
}
"""What can be asked for by name; each is given an empty folder."""
