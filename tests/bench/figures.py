"""What a benchmark returns, and how figures are made of samples."""

import math
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.watched_hub import WatchedHub
from tests.support.programs import Agent, wait_until


@dataclass(frozen=True)
class Figure:
    """One measured figure, its target, and what it was made of."""

    value: float
    unit: str
    target: float | None
    ok: bool | None
    """None where there is no target."""
    detail: dict[str, Any] = field(default_factory=dict)

    def public(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "unit": self.unit,
            "target": self.target,
            "ok": self.ok,
            **self.detail,
            "load": round(os.getloadavg()[0], 1),
        }


def at_most(value: float, unit: str, target: float, **detail: Any) -> Figure:
    return Figure(_short(value), unit, target, value <= target, _all_short(detail))


def at_least(value: float, unit: str, target: float, **detail: Any) -> Figure:
    return Figure(_short(value), unit, target, value >= target, _all_short(detail))


def shown(value: float, unit: str, **detail: Any) -> Figure:
    """Return a figure without a target."""
    return Figure(_short(value), unit, None, None, _all_short(detail))


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


def spread(samples: Sequence[float]) -> float:
    """Return (most - least) / median."""
    return (max(samples) - min(samples)) / statistics.median(samples)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _all_short(detail: dict[str, Any]) -> dict[str, Any]:
    return {name: _short(value) if isinstance(value, float) else value for name, value in detail.items()}


@contextmanager
def running(folder: Path, *, fake: bool, **settings: str) -> Iterator[tuple[WatchedHub, Agent]]:
    """Run a hub with a stopwatch and an agent with the default settings."""
    folder.mkdir(parents=True, exist_ok=True)
    hub = WatchedHub(folder / "hub").start()
    agent = Agent(folder / "agent", hub.url, fake=fake, **{**DEFAULTS, **settings}).start()
    try:
        yield hub, agent
    finally:
        for part in (agent, hub):
            if part.process is not None and part.process.poll() is None:
                part.stop()
        hub.http.close()


def await_end(hub: WatchedHub, agent: Agent, job_id: str, within: float = 600) -> None:
    """Wait until a job has completed; an agent that has gone meanwhile, or a job that failed, is an error at once."""

    def there() -> bool:
        assert agent.process is not None
        if agent.process.poll() is not None:
            raise RuntimeError(f"the agent has left: {agent.output[-2000:]}")
        stands = hub.status(job_id)
        if stands["state"] in ("failed", "cancelled"):
            raise RuntimeError(f"the job {stands['state']}: {stands['error']}")
        return bool(stands["state"] == "completed")

    wait_until(there, f"the end of {job_id}", within, every=0.2)


DEFAULTS = {"LOG_LEVEL": "INFO", "GPU_MONITORING_INTERVAL_SECONDS": "5"}
"""Tests have others."""
