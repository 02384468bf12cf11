"""The estimate at the start of every job, by formula; and what became of it after the first steps."""

import math
from collections.abc import Callable
from typing import Any

import datasets
import msgspec
import pyarrow.compute  # type: ignore[import-untyped]
import torch
from transformers import TrainerCallback

from agent.trainer import estimate, meter, sizes
from agent.trainer.curve import logger
from agent.trainer.formula import GB, Rows
from agent.trainer.model import Precision
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
        start = self._start
        found = estimate.estimate(
            start.spec,
            start.workspace,
            start.limits,
            config=trainer.model.config,
            precision=precision,
            sizes=sizes.loaded(start.spec, trainer.model),
            rows=_rows(trainer, start.spec),
            baseline=self._baseline,
        )
        self._say(Estimated(found))
        trainer.add_callback(_Reality(found, self._say))


class _Reality(TrainerCallback):  # type: ignore[misc]
    """Says once, after the first steps, how far the estimate was from the truth."""

    def __init__(self, told: Estimate, say: Callable[[AnyEvent], None]) -> None:
        self._told = told
        self._say = say
        self._steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._steps += 1
        if self._steps == STEPS:
            told = self._told
            on_device = told.device_gb is not None
            guess = told.device_gb if told.device_gb is not None else told.host_gb
            most = (torch.cuda.max_memory_reserved() if on_device else meter.most_resident()) / GB
            logger.info(
                "peak memory after %d steps: %.2f GB; estimated %.2f GB (%+.0f %%)",
                STEPS,
                most,
                guess,
                100 * (guess / most - 1),
            )
            parts = {**told.parts, MEASURED: most}
            self._say(Estimated(msgspec.structs.replace(told, parts=parts)))
        return control


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
