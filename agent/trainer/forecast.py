"""The estimate at the start of every job, by formula; and what became of it after the first steps."""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import datasets
import msgspec
import pyarrow.compute  # type: ignore[import-untyped]
import torch
from transformers import TrainerCallback

from agent.trainer import estimate, memory, meter, sizes
from agent.trainer.curve import logger
from agent.trainer.formula import GB, Rows
from agent.trainer.model import Precision
from agent.trainer.progress import Schedule
from protocol.jobspec import JobSpec
from protocol.worker import AnyEvent, Estimate, Estimated, Start

STEPS = 10
"""Steps of this process after which its peak is taken as known."""
MEASURED = "measured peak"
"""Name in the parts of what the process really came to."""
COLUMNS = ("input_ids", "prompt_ids", "chosen_ids", "rejected_ids")


class Forecast:
    """What is told of a job's needs."""

    def __init__(self, start: Start, say: Callable[[AnyEvent], None]) -> None:
        self._start = start
        self._say = say
        self._baseline = meter.resident_now()
        """Bytes of the process with its data, and no model yet."""

    def tell(self, trainer: Any, precision: Precision) -> None:
        """Say what the job will need, and have it compared with what it comes to."""
        start, spec = self._start, self._start.spec
        memory.give_back_freed()  # what loading took and freed, hundreds of MB beside quantised weights
        weights, rows = sizes.loaded(spec, trainer.model), _rows(trainer, spec)
        found = estimate.estimate(
            spec,
            start.workspace,
            start.limits,
            config=trainer.model.config,
            precision=precision,
            sizes=weights,
            rows=rows,
            baseline=self._baseline,
        )
        self._say(Estimated(found))

        def seconds(step: float, evaluation: float) -> float | None:
            return estimate.total_seconds(spec, start.limits, rows, weights, step, evaluation)

        trainer.add_callback(_Reality(found, self._say, trainer.job.schedule, seconds))


class _Reality(TrainerCallback):  # type: ignore[misc]
    """Says once, after the first steps, how far the estimate was from the truth, and how long the job will take."""

    def __init__(
        self,
        told: Estimate,
        say: Callable[[AnyEvent], None],
        schedule: Schedule,
        seconds: Callable[[float, float], float | None],
    ) -> None:
        self._told = told
        self._say = say
        self._schedule = schedule
        self._seconds = seconds
        self._ends: list[float] = []
        """When each step ended."""
        self._weighed: list[bool] = []
        """Whether an evaluation came after it."""
        self._kept: list[bool] = []
        """Whether a checkpoint did."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        made = len(self._ends)
        if made < STEPS:
            if torch.cuda.is_available() and made in (0, STEPS - 1):
                torch.cuda.synchronize()  # the clock starts and stops with the device, and does not wait in between
            self.stepped(int(state.global_step), float(state.epoch or 0.0), time.monotonic())
            if made + 1 == STEPS:
                self._tell()
        return control

    def stepped(self, step: int, epoch: float, now: float) -> None:
        """Take down when a step ended."""
        self._ends.append(now)
        self._weighed.append(self._schedule.evaluates(step, epoch))
        self._kept.append(step % self._schedule.save_steps == 0)

    def _tell(self) -> None:
        told = self._told
        on_device = told.device_gb is not None
        guess = told.device_gb if told.device_gb is not None else told.host_gb
        most = (torch.cuda.max_memory_reserved() if on_device else meter.most_resident()) / GB
        step, evaluation = self._times()
        logger.info(
            "peak memory after %d steps: %.2f GB; estimated %.2f GB (%+.0f %%); a step takes %.3g s",
            STEPS,
            most,
            guess,
            100 * (guess / most - 1),
            step,
        )
        self._say(
            Estimated(
                msgspec.structs.replace(
                    told,
                    parts={**told.parts, MEASURED: most},
                    step_seconds=step,
                    total_seconds=self._seconds(step, evaluation),
                )
            )
        )

    def _times(self) -> tuple[float, float]:
        """Return the seconds of a step, and of an evaluation; 0 where it cannot be told from the steps."""
        apart = [later - earlier for earlier, later in itertools.pairwise(self._ends)]
        between = list(zip(apart, self._weighed, self._kept, strict=False))
        plain = [seconds for seconds, weighed, kept in between if not weighed and not kept]
        step = statistics.fmean(plain or apart)
        evaluations = [seconds - step for seconds, weighed, _ in between if weighed and plain]
        return step, max(0.0, statistics.fmean(evaluations)) if evaluations else 0.0


def _rows(trainer: Any, spec: JobSpec) -> Rows:
    """Return what is known of the rows, which are tokenised by now."""
    training, table, held_out = spec.training, trainer.train_dataset, trainer.eval_dataset
    longest, mean, count = training.max_length, float(training.max_length), 0
    if isinstance(table, datasets.Dataset):
        count = len(table)
        lengths = [_lengths(table, name) for name in COLUMNS if name in table.column_names]
        if lengths:
            # A pair's prompt goes before either side.
            prompt = lengths[0] if len(lengths) > 1 else (0, 0.0)
            rest = lengths[1:] if len(lengths) > 1 else lengths
            longest = min(longest, prompt[0] + max(most for most, _ in rest))
            mean = min(mean, prompt[1] + max(usual for _, usual in rest))
    step = training.batch_size * training.gradient_accumulation_steps
    steps = training.max_steps or math.ceil(math.ceil(count / step) * training.epochs)
    return Rows(count, len(held_out) if held_out is not None else 0, longest, mean, steps)


def _lengths(table: datasets.Dataset, column: str) -> tuple[int, float]:
    """Return the most and the mean tokens of a column, from the offsets of its lists alone."""
    lengths = pyarrow.compute.list_value_length(table.data.column(column))
    most, mean = pyarrow.compute.max(lengths).as_py(), pyarrow.compute.mean(lengths).as_py()
    return int(most or 0), float(mean or 0.0)
