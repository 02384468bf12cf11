"""From a start to the first optimizer step done: a bare TRL script, a cold trainer, a warm one; in turn, same job.

The bare script and the cold trainer are timed from the start of their process; the warm one, which has its imports
behind it, from its Start order. `python -c "from tests.bench.first_step import spawn; spawn(...)"` is the agent's part.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench import job
from tests.bench.figures import Figure, at_most
from tests.support.programs import clean_env

RUNS, ROWS_OF_STEPS = 5, 80
COLD, WARM = 1.1, 0.35


def first_step(folder: Path, runs: int = RUNS) -> dict[str, Figure]:
    """Return the share of the bare script's time; a first round, with cold caches, is not counted."""
    home = folder / "home"
    job.build(home, ROWS_OF_STEPS)
    taken: dict[str, list[float]] = {"bare": [], "cold": [], "warm": []}
    parts: dict[str, list[float]] = {"imports": []}
    for run in range(runs + 1):
        for side in taken:
            if side == "bare":
                seconds = _bare(home)
            else:
                told = _ours(folder, home, f"{side}-{run}", warm=side == "warm")
                seconds = told["first_step"]
                if run and side == "cold":
                    parts["imports"].append(told["imports"])
            if run:
                taken[side].append(seconds)
        if run:
            print(
                "  " + ", ".join(f"{side} {taken[side][-1]:.2f} s" for side in taken),
                file=sys.stderr,
                flush=True,
            )
    bare = statistics.median(taken["bare"])
    cold, warm = statistics.median(taken["cold"]), statistics.median(taken["warm"])
    imports = statistics.median(parts["imports"])
    return {
        "first_step_cold": at_most(
            cold / bare, "of a bare script", COLD, seconds=cold, bare=bare, imports=imports, runs=runs
        ),
        "first_step_warm": at_most(warm / bare, "of a bare script", WARM, seconds=warm, bare=bare, runs=runs),
    }


def _bare(home: Path) -> float:
    began = time.time()
    done = _python("-m", "tests.bench.bare", str(home), "1", "1", "0")
    return float(done.split()[-1]) - began


def _ours(folder: Path, home: Path, name: str, *, warm: bool) -> dict[str, Any]:
    call = (
        f"from tests.bench.first_step import spawn; spawn({str(folder)!r}, {str(home)!r}, {name!r}, {warm})"
    )
    return dict(json.loads(_python("-c", call).splitlines()[-1]))


def _python(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        env=clean_env(OMP_NUM_THREADS=job.threads()),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr[-4000:]}")
    return done.stdout


def spawn(folder: str, home: str, name: str, warm: bool) -> None:
    """Start a trainer as the agent does, and print how long it took to its first step.

    Run with ``-c``: a spawned process imports its parent's main module again, and the agent's imports nothing.
    """
    from agent.runtime import boot
    from agent.runtime.bytequeue import make_queue
    from protocol.worker import Failed, Metrics, Warm, encoder, event_decoder

    place = Path(folder) / name
    place.mkdir()
    ctx = multiprocessing.get_context("spawn")
    orders, events = make_queue(ctx), make_queue(ctx)
    plan = boot.Plan("agent.trainer.entry", str(place / "trainer.log"), dict(os.environ))
    process = ctx.Process(target=boot.main, args=(plan, orders.reading_end(), events.writing_end()))
    order = encoder.encode(_start(Path(home), place))
    began = time.time()
    process.start()
    orders.close_reader()
    events.close_writer()
    if not warm:
        orders.put(order)
    imports = 0.0
    while True:
        event = event_decoder.decode(events.get()).event
        match event:
            case Warm(import_seconds=imports):
                if warm:
                    began = time.time()
                    orders.put(order)
            case Metrics(step=1, time=at):
                print(json.dumps({"first_step": at - began, "imports": imports}))
                break
            case Failed():
                raise RuntimeError(str(event))
            case _:
                pass
    process.kill()
    process.join()


def _start(home: Path, place: Path) -> Any:
    from protocol.jobspec import JobSpec, ModelSpec, TrainingSpec
    from protocol.worker import Limits, Start, Workspace

    training = TrainingSpec(
        max_steps=ROWS_OF_STEPS,
        batch_size=job.BATCH,
        max_length=job.LENGTH,
        learning_rate=job.RATE,
        seed=job.SEED,
        bf16=False,
        logging_steps=1,
        save_steps=100_000,
    )
    workspace = Workspace(
        checkpoints=str(place / "checkpoints"),
        output=str(place / "model"),
        cache=str(place / "cache"),
        model=str(home / "models" / "model"),
        data=str(home / "datasets" / job.ROWS),
    )
    spec = JobSpec(job_id="bench", model=ModelSpec(name="model"), training=training)
    return Start(spec=spec, attempt=1, workspace=workspace, limits=Limits(hub=False))
