"""The loop over optimizer steps, with out-of-memory healed inside a step and bad steps found one by one.

It takes the place of Trainer's, which counts its place in batches of one size and cannot take a step back.
"""

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
from agent.trainer.judging import Done, Judging
from agent.trainer.randomness import unmoved
from agent.trainer.streaming import Stream
from agent.trainer.tables import NUMBER
from protocol.failures import FailureReason
from protocol.worker import Note, Parameters, ParametersSet

MANY = 64
"""Attention masks that are kept before their tokens are summed up, where points are rare."""


class Steps(Judging):
    """The stepping part of `agent.trainer.control.ControlledMixin`."""

    control: Any

    def _start_stepping(self) -> None:
        self._start_judging()
        self._asked = Asked(self.job.checkpoints.folder)
        self._worked: set[int] = set()
        """Sizes of a micro-batch that have gone through in this process."""
        self._began_with = 0
        """The size of a micro-batch with which the step in hand began."""
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
        self._trail.append(
            Done(
                number,
                loss,
                norm,
                skipped,
                step.epoch,
                step.first,
                step.end,
                step.rows,
                # A stream's rows have no place in a table; each brings its number along.
                [example[NUMBER] for example in step.examples if NUMBER in example],
            )
        )
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        self._close_step(learning_rate)

    def _close_step(self, learning_rate: float) -> None:
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
            self._say_fresh(
                f"Memory ran out in the middle of the optimizer's step {number} ({words}), where some weights may have "
                "moved already.",
                "The job goes back to its last checkpoint (or to its beginning, where it has none)",
            )
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
        self._began_with = self.job.progress.place.micro
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
        taken = self._take_at_once(-(-before // 2))
        difference = self._difference(step, before)
        line = self.job.inbox.line
        line.say(ParametersSet(number, taken))
        line.say(
            Note(
                "warning",
                f"Memory ran out at step {number} with {before} rows at once ({words}). From this step on there are "
                f"{place.micro}, accumulated {place.accumulation} times: the effective batch stays {place.step_rows}, "
                f"and no step is lost. {difference}",
            )
        )

    def _take_at_once(self, micro: int) -> Parameters:
        """Cut the steps from the next one on into micro-batches of ``micro`` rows, and return what is to be said."""
        place, progress = self.job.progress.place, self.job.progress
        place.micro = micro
        progress.parameters = msgspec.structs.replace(
            progress.parameters, batch_size=micro, gradient_accumulation_steps=place.accumulation
        )
        return Parameters(
            batch_size=micro, gradient_accumulation_steps=place.accumulation, step_rows=place.step_rows
        )

    def _difference(self, step: Step, before: int) -> str:
        """Measure by how much the loss of a step depends on its cut, and leave it in the present one."""
        micro, noise = self.job.progress.place.micro, healing.draws_noise(self.model)
        plain: float | None = None
        noisy: float | None = None
        try:
            plain = self._loss_between(step, (before, micro), noisy=False)
            noisy = self._loss_between(step, (before, micro), noisy=True) if noise else None
        except (RuntimeError, MemoryError, OSError) as error:
            if not healing.is_out_of_memory(error):
                raise
        if plain is None or (noise and noisy is None):
            healing.make_room()
            self._feed.again(step, micro)
        if plain is None:
            return "By how much the sums differ could not be measured for want of memory."
        if noisy is None:
            apart = ", apart from dropout, whose masks are others from here on" if noise else ""
            return f"The loss of this step differs by {plain:.1g} between the two cuts{apart}."
        return (
            f"With dropout, whose masks are others from here on, the loss of this step differs by {noisy:.2g} between "
            f"the two cuts, without it by {plain:.1g}; in later steps it may be more."
        )

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _loss_between(self, step: Step, cuts: tuple[int, int], *, noisy: bool) -> float:
        """Return how far a step's loss in one cut is from that in the other; ``noisy``: as training drops out."""
        losses: list[float] = []
        self.model.train(noisy)
        for size in cuts:
            self._feed.again(step, size)
            # With the random numbers that the step is made with.
            with unmoved(), self.compute_loss_context_manager():
                parts = [self._weigh(self.model, self._prepare_inputs(batch)) for batch in step.batches]
            total = sum(float(part["eval_loss"][0].item()) for part in parts)
            losses.append(total / max(1.0, sum(float(part["eval_loss"][1]) for part in parts)))
        return abs(losses[0] - losses[1])

    def _leave_for_memory(self, number: int, reason: FailureReason, words: str) -> None:
        """End this process: for a fresh one, where as much has fitted before, else for good.

        The fresh one begins with as many rows at once as have fitted in this one: its memory is in one piece.
        """
        # Not what fitted once and was made smaller since, by the user or because it fitted no more.
        fitting = [size for size in self._worked if size <= self._began_with]
        if fitting and self._asked.for_fresh_process(number):
            most = max(fitting)
            fitted, goes_on = "which had fitted before", "The job goes on"
            if most > 1:
                self.job.inbox.line.say(ParametersSet(number, self._take_at_once(most)))
                fitted, goes_on = (
                    f"though {most} had fitted at once before",
                    f"{goes_on} with {most} rows at once again",
                )
            self._say_fresh(
                f"Memory ran out at step {number} with a single row, {fitted} ({words}). No step is lost.",
                goes_on,
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

    def _say_fresh(self, why: str, goes_on: str = "The job goes on") -> None:
        self.job.inbox.line.say(
            Note("warning", f"{why} {goes_on} in a new process, whose memory is in one piece.")
        )
