"""What Prometheus may scrape: the agent's health and the newest values of its live jobs."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from agent.core.ports import Desk
from protocol.lifecycle import TERMINAL
from protocol.messages import Lane

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "finetunelab_agent"


class Exporter:
    """Figures of one desk, gathered when they are asked for."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._registry: Any = None

    def text(self) -> bytes:
        """Return the exposition."""
        # Imported at the first scrape: most agents are never scraped, and memory is promised.
        from prometheus_client import CollectorRegistry, generate_latest

        if self._registry is None:
            self._registry = CollectorRegistry(auto_describe=False)
            self._registry.register(self)
        return generate_latest(self._registry)

    def collect(self) -> "Iterator[Metric]":
        """Yield every family; called by the registry."""
        from prometheus_client.metrics_core import GaugeMetricFamily

        def gauge(name: str, text: str, value: float) -> "Metric":
            return GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)

        now = self._desk.health()
        about = GaugeMetricFamily(f"{PREFIX}_info", "1, with the agent's version.", labels=["version"])
        about.add_metric([now.version], 1)
        yield about
        yield gauge("connected", "1 while the link to the backend stands.", float(now.link == "connected"))
        yield gauge("uptime_seconds", "Since the agent started.", now.uptime_seconds)
        yield gauge("active_jobs", "Jobs with a trainer.", now.active_jobs)
        yield gauge("queued_jobs", "Jobs that wait.", now.queued_jobs)
        yield gauge("draining", "1 while the agent takes no more work.", float(now.draining))
        backlog = GaugeMetricFamily(
            f"{PREFIX}_backlog_records", "Records not yet acknowledged by the backend.", labels=["lane"]
        )
        for lane, count in zip(Lane, now.backlog, strict=False):
            backlog.add_metric([lane.name.lower()], count)
        yield backlog
        yield from self._jobs()

    def _jobs(self) -> "Iterator[Metric]":
        from prometheus_client.metrics_core import GaugeMetricFamily

        jobs = self._desk.jobs()
        states = GaugeMetricFamily(f"{PREFIX}_jobs", "Jobs by state.", labels=["state"])
        counts: dict[str, int] = {}
        for job in jobs:
            counts[job.state] = counts.get(job.state, 0) + 1
        for state, count in sorted(counts.items()):
            states.add_metric([state], count)
        yield states

        steps = GaugeMetricFamily(f"{PREFIX}_job_step", "Optimizer steps done.", labels=["job_id"])
        totals = GaugeMetricFamily(f"{PREFIX}_job_total_steps", "Optimizer steps in all.", labels=["job_id"])
        values = GaugeMetricFamily(
            f"{PREFIX}_job_value", "The newest value of a metric.", labels=["job_id", "metric"]
        )
        for job in jobs:
            # A job that has ended would stay in the scrape for ever.
            if job.state in TERMINAL:
                continue
            steps.add_metric([job.job_id], job.step)
            totals.add_metric([job.job_id], job.total_steps)
            for metric, value in job.values.items():
                values.add_metric([job.job_id, metric], value)
        yield from (steps, totals, values)
