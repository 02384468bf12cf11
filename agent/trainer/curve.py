"""The curve: what is counted in each micro-batch, the points that are sent, and the held-out loss.

TRL waits for the device several times in every micro-batch to log entropy and accuracy. Here losses and counts
stay on the device until a point is due.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from agent.trainer import healing, memory
from agent.trainer.errors import TrainerError
from agent.trainer.inbox import Leaving
from agent.trainer.progress import perplexity
from agent.trainer.randomness import unmoved
from protocol.failures import FailureReason
from protocol.worker import Metrics, Note

if TYPE_CHECKING:
    _Trainer = Any  # one of TRL's, which stands behind this class in the list of bases
else:
    _Trainer = object

logger = logging.getLogger("agent.trainer")


LOG_EVERY = 1.0
"""Seconds between lines on the curve in the job's log: the points themselves are sent, and a line costs
a fast step more than all the rest of its report."""


class _PutOff(Exception):
    """An evaluation was given up because the process must leave."""


class Moment(msgspec.Struct, frozen=True):
    """The end of a step, as far as its point needs it."""

    step: int
    epoch: float
    time: float
    clock: float
    """Of time.monotonic."""
    tokens: int
    """Since the last point, without those of ``masks``."""
    masks: list[torch.Tensor]
    """Attention masks of micro-batches whose tokens are not yet summed up."""
    samples: int
    learning_rate: float


def _tokens_of(masks: list[torch.Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks)


class Curve(_Trainer):  # type: ignore[misc]
    """The measuring half of `agent.trainer.control.ControlledMixin`; ``self.job`` is set there."""

    def _start_counting(self) -> None:
        self._tokens = 0
        self._masks: list[torch.Tensor] = []
        self._samples = 0
        self._norm: float | None = None
        self._window_began = self._began = self._steps_began = time.monotonic()
        self._elapsed_before = self.job.progress.elapsed
        self._start_step = 0
        self._held_out: Any = None
        self._evaluated = False
        """Whether an evaluation has gone through with batches of this size."""
        self._logged_at = -LOG_EVERY

    def _resume_counting(self) -> None:
        """Take up the counters where the checkpoint left them."""
        progress = self.job.progress
        self._start_step = self.state.global_step
        self._tokens, self._samples = progress.window_tokens, progress.window_samples

    def _start_clock(self) -> None:
        """Begin to count the time of steps; what came before is not training."""
        self._steps_began = time.monotonic()
        self._window_began = self._steps_began - self.job.progress.window_seconds

    def _store_counters(self) -> None:
        """Bring the counters up to date for a checkpoint of this step."""
        progress = self.job.progress
        self._sum_tokens()
        progress.window_tokens, progress.window_samples = self._tokens, self._samples
        progress.window_seconds = time.monotonic() - self._window_began if progress.window_steps else 0.0
        self.finish_counters()

    def finish_counters(self) -> None:
        """Bring the total time up to date."""
        self.job.progress.elapsed = self._elapsed_before + time.monotonic() - self._began

    def _count(self, inputs: Any) -> None:
        """Count the real tokens and rows of a micro-batch, while it is still in host memory."""
        mask = inputs.get("attention_mask")
        if mask is not None:
            # Summed up where the point is made: the training thread does not wait for a figure.
            self._masks.append(mask)
            self._samples += mask.shape[0]
        else:  # packed: no padding, and the documents' borders come with the batch
            self._tokens += inputs["input_ids"].numel()
            self._samples += inputs["cu_seq_lens_q"].numel() - 1

    def _sum_tokens(self, at_least: int = 1) -> None:
        """Sum up the tokens of the masks at hand, where they are so many."""
        if len(self._masks) < at_least:
            return
        masks, self._masks = self._masks, []
        self._tokens += _tokens_of(masks)

    def _moment(self, learning_rate: float) -> Moment:
        """Take down what this step's point is made of, apart from what is still on the device."""
        tokens, masks, samples = self._tokens, self._masks, self._samples
        self._tokens, self._masks, self._samples = 0, [], 0
        state = self.state
        return Moment(
            state.global_step,
            state.epoch or 0.0,
            time.time(),
            time.monotonic(),
            tokens,
            masks,
            samples,
            learning_rate,
        )

    def _measure(self, at: Moment) -> dict[str, float]:
        """Return the train values since the last point, and count them."""
        progress = self.job.progress
        tokens = at.tokens + _tokens_of(at.masks)
        loss = progress.window_loss / max(1, progress.window_steps)
        seconds = max(1e-9, at.clock - self._window_began)
        values = {
            "train_loss": loss,
            "train_perplexity": perplexity(loss),
            "learning_rate": at.learning_rate,
            "samples_per_second": at.samples / seconds,
            "tokens_per_second": tokens / seconds,
        }
        if self._norm is not None:
            values["grad_norm"] = self._norm
        values |= self._extra()
        progress.add_train_loss(loss)
        progress.tokens_seen += tokens
        progress.window_loss, progress.window_steps = 0.0, 0
        self._window_began = at.clock
        return values

    def _say_point(self, step: int, values: dict[str, float], at: Moment | None = None) -> None:
        """Send one point of the curve with the counters that belong to each."""
        progress = self.job.progress
        now = at.clock if at is not None else time.monotonic()
        done = step - self._start_step
        total = max(1, self.state.max_steps)
        epoch = at.epoch if at is not None else float(self.state.epoch or 0.0)
        wall = at.time if at is not None else time.time()
        common = {
            "epoch": epoch,
            "progress": 100.0 * step / total,
            "elapsed_seconds": self._elapsed_before + now - self._began,
            "tokens_seen": float(progress.tokens_seen),
            "epochs_without_improvement": float(progress.without_improvement),
            **memory.figures(),
        }
        if done > 0:
            common["eta_seconds"] = (now - self._steps_began) / done * max(0, self.state.max_steps - step)
        if progress.best_eval_loss is not None:
            common["best_eval_loss"] = progress.best_eval_loss
            common["best_step"] = float(progress.best_step)
            common["best_epoch"] = progress.best_epoch
        self.job.inbox.line.say(Metrics(step, epoch, wall, {**common, **values}, progress.trend()))
        if now - self._logged_at >= LOG_EVERY or "eval_loss" in values or step >= self.state.max_steps:
            self._logged_at = now
            shown = ", ".join(
                f"{k} {v:.4g}" for k, v in values.items() if k.endswith(("loss", "rate", "norm"))
            )
            logger.info("step %d of %d: %s", step, self.state.max_steps, shown)

    def _lacks_evaluation(self) -> bool:
        return self.eval_dataset is not None and self.job.progress.eval_step != self.state.global_step

    def _evaluate_first(self) -> None:
        """Measure the held-out loss of the untrained model."""
        if self.eval_dataset is None:
            return
        try:
            measures = self._held_out_measures()
        except _PutOff:
            # Nothing has been trained: the next attempt begins anew and loses nothing.
            raise Leaving(self.job.inbox.leaving, 0) from None
        progress, loss = self.job.progress, measures["eval_loss"]
        progress.initial_eval_loss = progress.eval_loss = loss
        progress.eval_step = 0
        self._say_point(0, measures)

    def _evaluate_at(self, step: int, values: dict[str, float]) -> bool:
        """Evaluate and send one point with ``values``; False if it was put off because the process must leave."""
        job, progress = self.job, self.job.progress
        with self._off_the_clock():
            try:
                if job.inbox.leaving:
                    raise _PutOff
                measures = self._held_out_measures()
            except _PutOff:
                if values:
                    self._say_point(step, values)
                progress.owed = values
                return False
        progress.owed = None
        job.inbox.evaluations.clear()
        progress.add_evaluation(measures, step, float(self.state.epoch or 0.0), job.schedule)
        self._say_point(step, {**values, **measures})
        return True

    def _extra(self) -> dict[str, float]:
        """Return what a method measures at training beside the loss, since the last point."""
        return {}

    def _weigh(self, model: Any, inputs: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return a held-out batch's measures by name, each as a sum and a count; `eval_loss` is one of them."""
        raise NotImplementedError

    def _held_out_measures(self) -> dict[str, float]:
        """Return the means over everything held out, in smaller batches where memory runs out.

        Raises _PutOff if the process must leave meanwhile.
        """
        again = False
        while True:
            if self._held_out is None:
                self._held_out = self.get_eval_dataloader()
            try:
                measures: dict[str, float] = self._weigh_all()
            except (RuntimeError, MemoryError, OSError) as error:
                if not healing.is_out_of_memory(error):
                    raise
                reason, words = healing.reason_of(error), healing.words_of(error)
            else:
                measures["perplexity"] = perplexity(measures["eval_loss"])
                return measures
            healing.make_room()
            if again or not self._evaluated:
                self._evaluate_smaller(reason, words)
            again = True

    def _evaluate_smaller(self, reason: FailureReason, words: str) -> None:
        args, progress, step = self.args, self.job.progress, self.state.global_step
        before = args.per_device_eval_batch_size
        if before == 1 and self._evaluated and self._asked.for_fresh_process(step):
            self._say_fresh(
                f"Memory ran out in the evaluation at step {step} with a single row, which had fitted before ({words})."
            )
            self.job.inbox.fresh = True
            raise _PutOff
        if before == 1:
            raise TrainerError(
                reason,
                f"The memory did not suffice to evaluate a single row at step {step}: {words}. "
                "Lower training.max_length, or set eval_strategy to no.",
                step=step,
            )
        args.per_device_eval_batch_size = progress.eval_batch = -(-before // 2)
        self._held_out = None
        self.job.inbox.line.say(
            Note(
                "warning",
                f"Memory ran out in the evaluation at step {step} with {before} rows at once ({words}); from here on "
                f"there are {progress.eval_batch}. The held-out loss is the same.",
            )
        )

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _weigh_all(self) -> dict[str, float]:
        model, inbox = self.model, self.job.inbox
        model.eval()
        wide = torch.float64 if self.args.device.type != "mps" else torch.float32
        sums: dict[str, Any] = {}
        counts: dict[str, Any] = {}
        with unmoved():
            for batch in self._held_out:
                inbox.listen()
                if inbox.leaving:
                    raise _PutOff
                with self.compute_loss_context_manager():
                    measures = self._weigh(model, self._prepare_inputs(batch))
                for name, (total, count) in measures.items():
                    sums[name] = sums.get(name, 0) + total.to(wide)
                    counts[name] = counts.get(name, 0) + count
        self._evaluated = True
        return {name: float(total.item() / max(1, counts[name].item())) for name, total in sums.items()}

    @contextlib.contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Keep what is done inside out of the tokens per second."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._window_began += time.monotonic() - began
