"""Steps that went wrong: found by their own figures, and answered with a way back or with the job's end."""

import itertools
import math
from dataclasses import dataclass

import datasets
import msgspec
import torch

from agent.trainer import healing
from agent.trainer.errors import TrainerError
from agent.trainer.inbox import Leaving
from agent.trainer.rewind import Skip, Skips
from agent.trainer.saving import Saving
from agent.trainer.tables import NUMBER
from protocol.failures import FailureReason
from protocol.worker import Note

USUAL = 16
"""Steps before one, whose mean loss tells whether it is a spike."""


class Done(msgspec.Struct, frozen=True):
    """A finished step, whose figures are still on the device."""

    number: int
    loss: torch.Tensor
    norm: torch.Tensor
    skipped: bool
    """The gradient scaler passed the step over: its gradient had overflowed, and nothing is harmed."""
    epoch: int
    first: int
    end: int
    rows: list[int]
    """Places in the table of what it was fed with; of a stream none."""
    numbers: list[int | list[int]]
    """Of a stream: by what numbers the user knows what it was fed with, the rows of a packed sequence together."""


@dataclass(eq=False)
class Bad(Exception):
    """A finished step that should not have been made."""

    step: Done
    what: str


class Judging(Saving):
    """The judging part of `agent.trainer.control.ControlledMixin`."""

    def _start_judging(self) -> None:
        self._skips = Skips(self.job.checkpoints.folder)
        self._trail: list[Done] = []

    def _judge_steps(self) -> None:
        raise NotImplementedError

    def _taken_trail(self) -> list[Done]:
        done, self._trail = self._trail, []
        return done

    def _first_bad(self, done: list[Done]) -> Bad | None:
        """Bring the figures of steps over from the device, and judge each."""
        if not done:
            return None
        progress = self.job.progress
        # The one wait for the device.
        tensors = [figure for step in done for figure in (step.loss, step.norm)]
        try:
            figures = torch.stack([figure.float() for figure in tensors]).tolist()
        except RuntimeError as error:
            if not healing.is_out_of_memory(error):
                raise
            figures = [float(figure.item()) for figure in tensors]  # slower, and takes no memory
        bad: Bad | None = None
        for at, step in enumerate(done):
            loss, norm = figures[2 * at], figures[2 * at + 1]
            progress.window_loss += loss
            progress.window_steps += 1
            self._norm = norm
            if bad is None:
                what = self._fault(step, loss, norm)
                bad = Bad(step, what) if what else None
            if bad is None:
                progress.add_steps([(step.number, loss)])
        return bad

    def _fault(self, step: Done, loss: float, norm: float) -> str:
        if not math.isfinite(loss):
            return "loss is not a finite number"
        if not math.isfinite(norm) and not step.skipped:
            return "gradient is not a finite number"
        factor = self.job.schedule.spike_factor
        recent = [value for _, value in self.job.progress.trail[-USUAL:]]
        if factor is not None and len(recent) == USUAL and loss > factor * sum(recent) / USUAL:
            return f"loss is {loss:.4g}, more than {factor:g} times its mean of the {USUAL} steps before"
        return ""

    def _answer_to(self, bad: Bad) -> Exception:
        """Return what to raise for a bad step: back before it without its rows where the job says so, else the end."""
        step, schedule = bad.step, self.job.schedule
        rows = self._numbers(step)
        fed, left_out = "", "these rows"
        if rows:
            listed = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
            fed = f" It was fed by rows {listed}."
            if self._packs:
                sequences = len(step.rows or step.numbers)
                one = sequences == 1
                fed = (
                    f" It was fed by {'a packed sequence' if one else f'{sequences} packed sequences'} of the "
                    f"{len(rows)} rows {listed}."
                )
                left_out = f"{'this sequence' if one else 'these sequences'} of {len(rows)} rows"
        made = len(self._skips.entries)
        if schedule.on_bad_loss == "rewind" and made < schedule.max_rewinds:
            self._skips.add(
                Skip(
                    step=step.number,
                    epoch=step.epoch,
                    first=step.first,
                    end=step.end,
                    why=bad.what,
                    order=self.job.progress.place.order,
                    rows=rows,
                )
            )
            self.job.inbox.line.say(
                Note(
                    "warning",
                    f"At optimizer step {step.number} the {bad.what}.{fed} Training goes back to the last good "
                    f"checkpoint and leaves {left_out} out ({made + 1} of at most {schedule.max_rewinds} times).",
                )
            )
            return Leaving("fresh_process", step.number - 1)
        gone_back = f" Training has gone back {made} times before this." if made else ""
        return TrainerError(
            FailureReason.NON_FINITE_LOSS,
            f"At optimizer step {step.number} the {bad.what}, so the weights are of no use from there on.{fed}"
            f"{gone_back} Lower the learning rate ({self._get_learning_rate():.3g} now), raise warmup_steps, or look "
            "at these rows; the last checkpoint is from before that step.",
            rows=rows,
            step=step.number,
        )

    @property
    def _packs(self) -> bool:
        return bool(getattr(self.args, "packing", False))

    def _numbers(self, step: Done) -> list[int]:
        """Return the numbers that the user knows rows by: those in their file, where the data set has them."""
        table, found = self.train_dataset, step.numbers
        if isinstance(table, datasets.Dataset) and step.rows:
            if NUMBER not in table.column_names:
                return [] if self._packs else step.rows
            found = table.select(step.rows)[NUMBER]
        # A row that is cut in two may be in a sequence twice, or in two of them.
        parts = itertools.chain.from_iterable(one if isinstance(one, list) else [one] for one in found)
        return list(dict.fromkeys(map(int, parts)))
