"""Tokens per second of a job under the whole agent, against a bare TRL script with the same arguments.

Both run in fresh processes, in turn, on the same model, rows and threads: hub, agent and trainer on one side,
one Python on the other. The first steps are left out on both sides; what it costs to log and report is not.
"""

import statistics
import subprocess
import sys
from pathlib import Path

from tests.bench import job
from tests.bench.figures import Figure, at_least, await_end, running, spread
from tests.support.programs import clean_env

RUNS, STEPS, WARM_UP = 5, 80, 10
RUNS_EVERY_STEP = 5


def throughput(folder: Path, runs: int = RUNS, steps: int = STEPS) -> dict[str, Figure]:
    """Return the share of bare TRL's tokens per second, logging at every tenth step and at every one."""
    home = folder / "agent"
    job.build(home, steps)
    return {
        "throughput": _compare(folder, runs, steps, logging_steps=10),
        "throughput_every_step": _compare(folder, min(runs, RUNS_EVERY_STEP), steps, logging_steps=1),
    }


def _compare(folder: Path, runs: int, steps: int, logging_steps: int) -> Figure:
    ours: list[float] = []
    bare: list[float] = []
    for run in range(runs):
        # In turn, and each first every other time, so that a busy machine hits both alike.
        for agents in (True, False) if run % 2 else (False, True):
            if agents:
                ours.append(_under_the_agent(folder, steps, logging_steps))
            else:
                bare.append(_bare(folder / "agent", steps, logging_steps))
        print(f"  agent {ours[-1]:.0f}, bare {bare[-1]:.0f} tokens/s", file=sys.stderr, flush=True)
    return at_least(
        statistics.median(ours) / statistics.median(bare),
        "of bare TRL",
        _target(),
        tokens_per_second=round(statistics.median(ours)),
        bare=round(statistics.median(bare)),
        spread=spread(ours),
        bare_spread=spread(bare),
        runs=runs,
        threads=job.threads(),
    )


def _target() -> float:
    """Return the bound: higher where a GPU computes, whose waits between micro-batches are spared."""
    import torch  # not at the top: most benchmarks have no use for it

    return 1.05 if torch.cuda.is_available() else 1.0


def _bare(home: Path, steps: int, logging_steps: int) -> float:
    numbers = [str(number) for number in (steps, logging_steps, WARM_UP)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.bare", str(home), *numbers],
        env=clean_env(OMP_NUM_THREADS=job.threads()),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the bare script failed:\n{done.stderr[-4000:]}")
    return float(done.stdout.split()[-1])


def _under_the_agent(folder: Path, steps: int, logging_steps: int) -> float:
    with running(folder, fake=False, OMP_NUM_THREADS=job.threads()) as (hub, agent):
        job_id = hub.submit(job.config(steps, logging_steps), job.ROWS)
        await_end(hub, agent, job_id)
        times = {step: ended for step, ended, _ in hub.points(job_id, steps)}
        tokens = {point["step"]: float(point["tokens_seen"]) for point in hub.metrics(job_id)}
    return (tokens[steps] - tokens[WARM_UP]) / (times[steps] - times[WARM_UP])
