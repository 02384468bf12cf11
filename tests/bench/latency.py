"""From a step finished in the trainer to its point stored at the hub, and from the pause button to `paused`."""

import os
import select
import statistics
import time
from itertools import pairwise
from pathlib import Path

from tests.bench import job
from tests.bench.figures import Figure, at_most, await_end, percentile, running
from tests.bench.watched_hub import WatchedHub
from tests.support.programs import fake_config, wait_until
from tests.support.trainers import trainer_of

STEPS = 600
STEP = 0.05
SKIPPED = 10
"""The first points, which meet what is done only once."""
PAUSES = 3


def latency(folder: Path, steps: int = STEPS, real: bool = True) -> dict[str, Figure]:
    """Return both percentiles, for a trainer of 20 steps a second and for a real one."""
    with running(folder / "fake", fake=True, METRICS_REPORT_INTERVAL_STEPS="1") as (hub, agent):
        job_id = hub.submit(fake_config(f"step={STEP}", steps))
        await_end(hub, agent, job_id)
        figures = _figures("latency", _delays(hub, job_id, steps))
    if real:
        home = folder / "real" / "agent"
        job.build(home, steps)
        with running(folder / "real", fake=False, OMP_NUM_THREADS=job.threads()) as (hub, agent):
            job_id = hub.submit(job.config(steps // 4, 1), job.ROWS)
            await_end(hub, agent, job_id)
            figures |= _figures("latency_real", _delays(hub, job_id, steps // 4))
    return figures


def _delays(hub: WatchedHub, job_id: str, last: int) -> list[float]:
    """Return milliseconds, one a point."""
    return [1000 * (at - ended) for _, ended, at in hub.points(job_id, last)[SKIPPED:]]


def _figures(name: str, delays: list[float]) -> dict[str, Figure]:
    return {
        f"{name}_p50": at_most(percentile(delays, 0.50), "ms", 20, points=len(delays)),
        f"{name}_p99": at_most(percentile(delays, 0.99), "ms", 100, worst=max(delays)),
    }


def pause(folder: Path, pauses: int = PAUSES) -> dict[str, Figure]:
    """Return how long a real LoRA job takes from the button to its process gone and to `paused`, beyond a step."""
    steps = 2000
    job.build(folder / "agent", 100)
    over: list[float] = []
    whole: list[float] = []
    gone: list[float] = []
    with running(folder, fake=False, OMP_NUM_THREADS=job.threads()) as (hub, agent):
        job_id = hub.submit(job.config(steps, 1, lora=True), job.ROWS)
        at = 0
        for _ in range(pauses):
            hub.wait_step(job_id, at + 15)
            trainer = wait_until(lambda: trainer_of(agent, job_id), "the job's process")
            process = os.pidfd_open(trainer.pid)
            pressed = time.time()
            hub.control(job_id, "pause")
            select.select([process], [], [], 120)
            gone.append(time.time() - pressed - _step_seconds(hub, job_id, pressed))
            os.close(process)
            at = int(hub.wait_state(job_id, "paused")["current_step"])
            reached = next(
                note[1] for note in hub.seen("state") if note[3] == "paused" and note[1] >= pressed
            )
            saved = next(
                one for one in hub.get(f"{_path(job_id)}/checkpoints")["checkpoints"] if _is(one, at)
            )
            took = reached - pressed
            whole.append(took)
            over.append(took - _step_seconds(hub, job_id, pressed) - float(saved["seconds"]))
            hub.control(job_id, "resume")
            hub.wait_step(job_id, at + 1)
        hub.control(job_id, "cancel")
        hub.wait_state(job_id, "cancelled")
    return {
        "pause_gone": at_most(
            statistics.median(gone),
            "s beyond a step, until the process is gone",
            1.5,
            slowest=max(gone),
            pauses=pauses,
        ),
        "pause": at_most(
            statistics.median(over),
            "s beyond a step and the save",
            1.0,
            slowest=max(over),
            from_button_to_paused=statistics.median(whole),
            pauses=pauses,
        ),
    }


def _path(job_id: str) -> str:
    return f"/api/training/local/{job_id}"


def _is(checkpoint: dict[str, object], step: int) -> bool:
    return checkpoint["step"] == step


def _step_seconds(hub: WatchedHub, job_id: str, before: float) -> float:
    """Return the median length of the ten steps before a moment."""
    ended = [end for _, _, name, _, end in hub.seen("point") if name == job_id and end <= before]
    return statistics.median(later - earlier for earlier, later in pairwise(ended[-11:]))
