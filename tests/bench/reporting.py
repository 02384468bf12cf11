"""What reporting each step costs the training thread of a real trainer, in microseconds: counting its rows, and
all that closes it, the look for orders included. The point itself is made in another thread.

The module is also the trainer's program in the child: it puts a stopwatch on the methods that count, measure and
say, and prints what it saw into the job's log.
"""

import json
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.runtime import boot
from agent.runtime.bytequeue import make_queue
from protocol.jobspec import DataSpec, JobSpec, ModelSpec, TrainingSpec
from protocol.worker import Committed, Failed, Limits, Start, Workspace, encoder, event_decoder
from tests.bench import job
from tests.bench.figures import Figure, at_most, percentile
from tests.support.programs import clean_env

STEPS, SKIPPED = 150, 20
TARGET = 50
MARK = "reporting cost "


def reporting(folder: Path, steps: int = STEPS) -> dict[str, Figure]:
    """Return what a step's report costs the training thread."""
    home = folder / "agent"
    job.build(home, steps)
    spent = _train(folder, home, steps)

    def each(*names: str) -> list[float]:
        return [1e6 * sum(seconds.get(name, 0.0) for name in names) for seconds in spent[SKIPPED:]]

    whole = each("_count", "_close_step")
    return {
        "reporting": at_most(
            statistics.median(whole),
            "us a step on the training thread",
            TARGET,
            p99=percentile(whole, 0.99),
            count=statistics.median(each("_count")),
            hand_over=statistics.median(each("_report_beside")),
        )
    }


def _train(folder: Path, home: Path, steps: int) -> list[dict[str, float]]:
    """Run a job in a trainer that counts, its events committed here."""
    log = folder / "job.log"
    ctx = multiprocessing.get_context("spawn")
    orders, events = make_queue(ctx), make_queue(ctx)
    plan = boot.Plan(
        module="tests.bench.reporting", log=str(log), env=clean_env(OMP_NUM_THREADS=job.threads())
    )
    child = ctx.Process(target=boot.main, args=(plan, orders.reading_end(), events.writing_end()))
    child.start()
    orders.close_reader()
    events.close_writer()
    orders.put(encoder.encode(_start(folder, home, steps)))
    while True:
        try:
            numbered = event_decoder.decode(events.get())
        except EOFError:
            break
        if numbered.number:
            orders.put(encoder.encode(Committed(numbered.number)))
        if isinstance(numbered.event, Failed):
            raise RuntimeError(numbered.event.failure.sentence)
    child.join()
    orders.close()
    events.close()
    line = next(line for line in log.read_text().splitlines() if line.startswith(MARK))
    return list(json.loads(line.removeprefix(MARK)))


def _start(folder: Path, home: Path, steps: int) -> Start:
    return Start(
        spec=JobSpec(
            job_id="reporting",
            model=ModelSpec(name="model"),
            data=DataSpec(path=job.ROWS),
            training=TrainingSpec(
                max_steps=steps, batch_size=1, max_length=64, learning_rate=job.RATE, logging_steps=1
            ),
        ),
        attempt=1,
        workspace=Workspace(
            checkpoints=str(folder / "checkpoints"),
            output=str(folder / "output"),
            cache=str(folder / "cache"),
            model=str(home / "models" / "model"),
            data=str(home / "datasets" / job.ROWS),
        ),
        limits=Limits(hub=False),
    )


def main(orders: Any, events: Any) -> int:
    """Run the real trainer with a stopwatch on what reports."""
    from agent.trainer import entry
    from agent.trainer.control import ControlledMixin

    steps: list[dict[str, float]] = []
    spent: dict[str, float] = {}
    training = threading.main_thread()

    def timed(owner: type, name: str) -> None:
        whole: Callable[..., Any] = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return whole(*args, **kwargs)
            finally:
                if threading.current_thread() is training:  # a point is made in another one
                    spent[name] = spent.get(name, 0.0) + time.perf_counter() - began

        setattr(owner, name, measured)

    for name in ("_count", "_report_beside", "_close_step"):
        timed(ControlledMixin, name)
    boundary = ControlledMixin._close_step

    def closing(*args: Any, **kwargs: Any) -> Any:
        try:
            return boundary(*args, **kwargs)
        finally:
            if "_report_beside" in spent:
                steps.append(dict(spent))
            spent.clear()

    ControlledMixin._close_step = closing  # type: ignore[method-assign]
    try:
        return entry.main(orders, events)
    finally:
        print(MARK + json.dumps(steps), flush=True)
