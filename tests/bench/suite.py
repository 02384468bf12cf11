"""Every benchmark by its name."""

from collections.abc import Callable
from pathlib import Path

from tests.bench import (
    compression,
    control,
    estimate,
    first_step,
    latency,
    link,
    reporting,
    saving,
    start,
    throughput,
)
from tests.bench.figures import Figure

BENCHMARKS: dict[str, Callable[[Path], dict[str, Figure]]] = {
    "start": start.start,
    "idle": start.idle,
    "throughput": throughput.throughput,
    "latency": latency.latency,
    "pause": latency.pause,
    "first_step": first_step.first_step,
    "reporting": reporting.reporting,
    "ingest": link.ingest,
    "wire": link.wire,
    "backlog": link.backlog,
    "control": control.control,
    "redial": link.redial,
    "save": saving.save,
    "compress": compression.compress,
    "estimate": estimate.estimate,
}
"""What can be asked for by name; each is given an empty folder."""
