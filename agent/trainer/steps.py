"""The loop over optimizer steps, with out-of-memory healed inside a step and bad steps found one by one.

It takes the place of Trainer's, which counts its place in batches of one size and cannot take a step back.
"""

import math
from dataclasses import dataclass
from typing import Any

import datasets
import msgspec
import torch
from torch.utils.data import SequentialSampler

from agent.trainer import healing
from agent.trainer.batches import ByLength, Feed, Loading, Step, StreamFeed, TableFeed
from agent.trainer.curve import logger
from agent.trainer.errors import TrainerError
from agent.trainer.healing import Asked, RandomStates
from agent.trainer.inbox import Leaving
from agent.trainer.randomness import unmoved
from agent.trainer.rewind import Skip, Skips
from agent.trainer.saving import Saving
from agent.trainer.streaming import Stream
from protocol.failures import FailureReason
from protocol.worker import Note, Parameters, ParametersSet

USUAL = 16
"""Steps before one, whose mean loss tells whether it is a spike."""

MANY = 64
"""Attention masks that are kept before their tokens are summed up, where points are rare."""


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


@dataclass(eq=False)
class Bad(Exception):
    """A finished step that should not have been made."""

    step: Done
    what: str


class Steps(Saving):
    """The stepping part of `agent.trainer.control.ControlledMixin`."""

    control: Any

    def _start_stepping(self) -> None:
        self._skips = Skips(self.job.checkpoints.folder)
        self._asked = Asked(self.job.checkpoints.folder)
        self._trail: list[Done] = []
        self._worked: set[int] = set()
        """Sizes of a micro-batch that have gone through in this process."""
        self._retried = -1
        self._feed: Feed
        self.share = 1.0
        """Rows of the micro-batch in hand, as a part of its step's: the weight of a loss that is a mean over rows."""

    # Called by Trainer

    def get_train_dataloader(self) -> Feed:
        """Return what yields the steps; Trainer asks it for its length alone."""
        args, rows, collate = self.args, self.train_dataset, self.data_collator
        if isinstance(rows, datasets.Dataset):
            rows = self._remove_unused_columns(rows, "training")
        else:
            collate = self._get_collator_with_removed_columns(collate, "training")
        if not hasattr(rows, "__len__"):
            self._feed = StreamFeed(rows, collate, skipped=self._skipped)
            return self._feed
        by_length = None
        if args.train_sampling_strategy == "group_by_length":
            lengths = self._row_lengths()
            together = args.train_batch_size * args.gradient_accumulation_steps
            by_length = ByLength(lengths, together, args.seed)
        self._feed = TableFeed(
            rows,
            collate,
            seed=args.seed,
            batch_size=args.train_batch_size,
            loading=Loading(
                args.dataloader_num_workers, args.dataloader_prefetch_factor, args.dataloader_pin_memory
            ),
            by_length=by_length,
            skipped=self._skipped,
        )
        return self._feed

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler:
        """Return held-out rows in their own order, so that an evaluation sums up the same after a resume.

        Trainer's would group them by length, in an order drawn from the random numbers of training.
        """
        return SequentialSampler(eval_dataset)

    def _row_lengths(self) -> list[int]:
        return [len(ids) for ids in self.train_dataset["input_ids"]]

    def _skipped(self, epoch: int) -> frozenset[int]:
        return self._skips.places(epoch, self.job.progress.place.order)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Restore Trainer's state. Where the job stands in its data is ours to say, so Trainer skips nothing."""
        super()._init_training_state(*args, **kwargs)
        place = self.job.progress.place
        if not place.micro:
            place.micro = self.args.train_batch_size
            place.step_rows = place.micro * self.args.gradient_accumulation_steps
        if place.digest and isinstance(self.train_dataset, Stream):
            self.train_dataset.expect(place.epoch, place.rows, place.digest)
        return 0, 0

    def _store_counters(self) -> None:
        super()._store_counters()
        if isinstance(self.train_dataset, Stream):
            place = self.job.progress.place
            place.digest = self.train_dataset.digest_at(place.rows)

    def _run_epoch(self, *, model: Any, **kwargs: Any) -> None:
        """Train to the last step, over all epochs that are left."""
        place = self.job.progress.place
        while not self.control.should_training_stop:
            step = self._feed.next(place)
            if step is None:
                raise TrainerError(
                    FailureReason.DATA,
                    f"The data set gave no rows in epoch {place.epoch}, so there is nothing to train on.",
                )
            self._make(model, step)

    # One step

    def _make(self, model: Any, step: Step) -> None:
        """Make one optimizer step, and close it."""
        place = self.job.progress.place
        loss, norm = self._accumulate(model, step)
        self._apply(step)
        learning_rate = self._get_learning_rate()
        skipped = bool(self.accelerator.optimizer_step_was_skipped)
        if not skipped:
            self.lr_scheduler.step()
        model.zero_grad()
        self.state.global_step += 1
        place.epoch, place.rows = step.epoch, step.end
        self.state.epoch = step.epoch + self._feed.share(place, self.state.max_steps)
        number = self.state.global_step
        # A stream's rows have no place in a table; each brings its number along.
        rows = step.rows or [int(row["row"]) for row in step.examples if "row" in row]
        self._trail.append(Done(number, loss, norm, skipped, step.epoch, step.first, step.end, rows))
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        self._close_step(learning_rate)

    def _close_step(self, learning_rate: float) -> None:
        raise NotImplementedError

    def _judge_steps(self) -> None:
        raise NotImplementedError

    def _apply(self, step: Step) -> None:
        """Let the optimizer move the weights. It cannot be done again: some of them may have moved already."""
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError, OSError) as error:
            if not healing.is_out_of_memory(error):
                raise
            reason, words = healing.reason_of(error), healing.words_of(error)
        else:
            return
        number = self.state.global_step + 1
        if self._worked and number > self._start_step + 1 and self._asked.for_fresh_process(number):
            self._say_fresh(f"Memory ran out in the middle of the optimizer's step {number} ({words}).")
            raise Leaving("fresh_process", self.state.global_step)
        raise TrainerError(
            reason,
            f"The memory did not suffice for the optimizer's state at step {number}: {words}. "
            "A smaller micro-batch does not help there: use an 8-bit optimizer (adamw_8bit), LoRA, or 4-bit weights.",
            step=number,
        )

    def _accumulate(self, model: Any, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Return loss and gradient norm of a step, with its gradients in place; healed where memory runs out."""
        self._sum_tokens(MANY)
        random, tokens, masks, samples = RandomStates(), self._tokens, len(self._masks), self._samples
        while True:
            try:
                made = self._pass(model, step)
            except (RuntimeError, MemoryError, OSError) as error:
                if not healing.is_out_of_memory(error):
                    raise
                reason, words = healing.reason_of(error), healing.words_of(error)
            else:
                self._worked.add(self.job.progress.place.micro)
                return made
            # Here nothing holds the failed pass any more, and its memory can be given back.
            model.zero_grad()
            healing.forget_unscaled(self.accelerator.scaler)
            healing.make_room()
            self._tokens, self._samples = tokens, samples
            del self._masks[masks:]
            random.restore()
            self._make_smaller(step, reason, words)
            random.restore()

    def _pass(self, model: Any, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a step's micro-batches forward and backward, and clip."""
        total: Any = None
        # What a mean over micro-batches is divided by, where the loss is one.
        self.current_gradient_accumulation_steps = len(step.batches)
        items = self._get_num_items_in_batch(step.batches, self.args.device)
        for number, (batch, size) in enumerate(zip(step.batches, step.sizes, strict=True), 1):
            self.share = size / step.size
            self.accelerator.gradient_state._set_sync_gradients(number == len(step.batches))
            loss = self.training_step(model, batch, items)
            total = loss if total is None else total + loss
        clipped = self._clip_grad_norm(model) if self.args.max_grad_norm > 0 else None
        return total, self._get_grad_norm(model, grad_norm=clipped)

    # Out of memory

    def _make_smaller(self, step: Step, reason: FailureReason, words: str) -> None:
        """Cut a step that did not fit into smaller micro-batches. Raises where there are none."""
        place, number = self.job.progress.place, self.state.global_step + 1
        logger.warning("out of memory at step %d with %d rows at once: %s", number, place.micro, words)
        if place.micro in self._worked and self._retried != number:
            self._retried = number  # it has fitted before: the memory was in pieces, or lent to somebody
            return
        before = min(place.micro, step.size)
        if before == 1:
            self._leave_for_memory(number, reason, words)
        place.micro = -(-before // 2)
        taken = Parameters(
            batch_size=place.micro,
            gradient_accumulation_steps=place.accumulation,
            step_rows=place.step_rows,
        )
        progress, line = self.job.progress, self.job.inbox.line
        progress.parameters = msgspec.structs.replace(
            progress.parameters,
            batch_size=place.micro,
            gradient_accumulation_steps=place.accumulation,
        )
        difference = self._difference(step, before)
        line.say(ParametersSet(number, taken))
        line.say(
            Note(
                "warning",
                f"Memory ran out at step {number} with {before} rows at once ({words}). From this step on there are "
                f"{place.micro}, accumulated {place.accumulation} times: the effective batch stays {place.step_rows}, "
                f"and no step is lost. {difference}",
            )
        )

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _difference(self, step: Step, before: int) -> str:
        """Measure by how much the loss of a step depends on its cut, and leave it in the present one."""
        model, micro = self.model, self.job.progress.place.micro
        losses: list[float] = []
        model.eval()
        try:
            for size in (before, micro):
                self._feed.again(step, size)
                with unmoved(), self.compute_loss_context_manager():
                    parts = [self._weigh(model, self._prepare_inputs(batch)) for batch in step.batches]
                total = sum(float(part["eval_loss"][0].item()) for part in parts)
                losses.append(total / max(1.0, sum(float(part["eval_loss"][1]) for part in parts)))
        except (RuntimeError, MemoryError, OSError) as error:
            if not healing.is_out_of_memory(error):
                raise
        if len(losses) < 2:
            healing.make_room()
            self._feed.again(step, micro)
            return "By how much the sums differ could not be measured for want of memory."
        noise = ", apart from dropout, whose masks are others now" if healing.draws_noise(self.model) else ""
        return (
            f"The loss of this step differs by {abs(losses[0] - losses[1]):.1g} between the two cuts{noise}."
        )

    def _leave_for_memory(self, number: int, reason: FailureReason, words: str) -> None:
        """End this process: for a fresh one, where a single row has fitted before, else for good."""
        if 1 in self._worked and self._asked.for_fresh_process(number):
            self._say_fresh(
                f"Memory ran out at step {number} with a single row, which had fitted before ({words})."
            )
            self._judge_steps()
            self._save_now([("fresh_process", "")])
            raise Leaving("fresh_process", self.state.global_step)
        where = "device's" if reason is FailureReason.DEVICE_MEMORY else "machine's"
        raise TrainerError(
            reason,
            f"The {where} memory did not suffice at step {number} for a micro-batch of a single row of at most "
            f"{self.args.max_length} tokens: {words}. Earlier checkpoints are kept.",
            step=number,
        )

    def _say_fresh(self, why: str) -> None:
        self.job.inbox.line.say(
            Note("warning", f"{why} The job goes on in a new process, whose memory is in one piece.")
        )

    # Steps that went wrong

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
        rows = self._numbers(step.rows)
        listed = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        fed = f" It was fed by rows {listed}." if rows else ""
        made = len(self._skips.entries)
        if schedule.on_bad_loss == "rewind" and made < schedule.max_rewinds:
            self._skips.add(
                Skip(
                    step=step.number,
                    epoch=step.epoch,
                    first=step.first,
                    end=step.end,
                    why=bad.what,
                    rows=rows,
                )
            )
            self.job.inbox.line.say(
                Note(
                    "warning",
                    f"At optimizer step {step.number} the {bad.what}.{fed} Training goes back to the last good "
                    f"checkpoint and leaves these rows out ({made + 1} of at most {schedule.max_rewinds} times).",
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

    def _numbers(self, rows: list[int]) -> list[int]:
        """Return the numbers that the user knows rows by: those in their file, where the data set has them."""
        table = self.train_dataset
        if isinstance(table, datasets.Dataset) and rows and "row" in table.column_names:
            return [int(number) for number in table.select(rows)["row"]]
        return rows
