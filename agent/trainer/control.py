"""The one thin layer over TRL's trainers: orders, exact pause, live parameters, the curve and our checkpoints.

Everything happens at the step boundary, where Trainer would log, evaluate and save; that method is replaced
whole.
"""

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from peft import PeftModel
from transformers import TrainerCallback
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names
from trl.trainer.utils import add_fused_lm_head

from agent.trainer.inbox import Leaving
from agent.trainer.judging import Bad
from agent.trainer.live import set_parameters
from agent.trainer.packing import packed
from agent.trainer.progress import Place
from agent.trainer.randomness import unmoved
from agent.trainer.reporter import Reporter
from agent.trainer.saving import Job
from agent.trainer.steps import Steps
from agent.trainer.tables import NUMBER
from protocol.worker import Note, Parameters


class _Begin(TrainerCallback):  # type: ignore[misc]
    """Calls the trainer when everything is restored and the first batch is not yet read."""

    def __init__(self, begin: Callable[[], None]) -> None:
        self._begin = begin

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._begin()
        return control


class ControlledMixin(Steps):
    """Goes before one of TRL's trainers in the list of bases."""

    measures_late = False
    """Whether a point is made of nothing that the next step changes, and so can be made while that one runs."""

    def __init__(self, *args: Any, job: Job, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.job = job
        self._start_counting()
        self._start_stepping()
        self._reporter = Reporter()
        self._reports_beside = job.reports_beside and self.measures_late
        self.add_callback(_Begin(self._begin))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            result = super().train(*args, **kwargs)
        except BaseException:
            # Nothing is said after the last word. What a report met is no matter any more where training has ended.
            with contextlib.suppress(Exception):
                self._reporter.flush()
            raise
        self._settle_reports()
        return result

    # Called by Trainer

    def _begin(self) -> None:
        """Take up the counters, say Ready, and do what belongs before the first step."""
        job, progress, step = self.job, self.job.progress, self.state.global_step
        job.inbox.step = step
        if job.resumed_from is not None:
            # Trainer does this later, at the first batch; a checkpoint written before that must hold them too.
            self._load_rng_state(str(job.resumed_from.path))
        self._resume_counting()
        if progress.eval_batch:
            self.args.per_device_eval_batch_size = progress.eval_batch
        place = progress.place
        job.inbox.line.say(
            msgspec.structs.replace(
                job.ready,
                total_steps=self.state.max_steps,
                total_epochs=self._epochs(place),
                start_step=step,
                batch_size=place.micro,
                gradient_accumulation_steps=place.accumulation,
            )
        )
        if job.parameters != Parameters():
            job.inbox.parameters.insert(0, job.parameters)
        job.inbox.leave_if_told()
        set_parameters(self)
        if step == 0 and job.resumed_from is None:
            with unmoved():
                job.before(self)
            self._evaluate_first()
        why = progress.ended or ("stop" if job.stop_at_once or job.inbox.stop else "")
        ending = bool(why) or step >= self.state.max_steps
        if progress.owed is not None or (ending and self._lacks_evaluation()):
            values = progress.owed or {}
            if not self._evaluate_at(step, values):
                raise Leaving(job.inbox.leaving, step)
            if not ending and self._patience_is_over:
                ending, why = True, "early_stopping"
            progress.ended = why
            self._save_if_due(ending, scheduled=False)
        if ending:
            progress.ended = why
            self.control.should_training_stop = True
        self._start_clock()

    @property
    def _patience_is_over(self) -> bool:
        patience = self.job.schedule.patience
        return bool(patience and self.job.progress.without_improvement >= patience)

    def _epochs(self, place: Place) -> float:
        """Return how many epochs the run's steps are; a stream's length is not known."""
        if not hasattr(self.train_dataset, "__len__"):
            return 1.0
        return float(self.state.max_steps / max(1, math.ceil(len(self.train_dataset) / place.step_rows)))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Train on a micro-batch, unless the job was cancelled."""
        self.job.inbox.listen()
        self._count(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: nobody reads the sum, and counting walks over every parameter in each micro-batch."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Take no part in Trainer's logging: the curve is sent from the step boundary."""

    def _close_step(self, learning_rate: float) -> None:
        """Close the optimizer step that has just ended: orders, point, evaluation, checkpoint, leaving."""
        job, step, inbox = self.job, self.state.global_step, self.job.inbox
        inbox.step = step
        inbox.listen()
        set_parameters(self)
        schedule = job.schedule
        ending = self.control.should_training_stop or inbox.stop
        # Also where patience was lowered since the last evaluation: then another one decides.
        last = ending or self._patience_is_over
        pointed = last or step % schedule.logging_steps == 0
        weighed = bool(schedule.evaluates(step, float(self.state.epoch)) or inbox.evaluations)
        kept = bool(inbox.leaving or inbox.saves or step % schedule.save_steps == 0)
        if pointed and not (weighed or last or kept) and self._reports_beside:
            self._report_beside(learning_rate)
            return
        values: dict[str, float] = {}
        if pointed or weighed or kept:
            # Nothing is told, and nothing kept, of a step that should not have been made.
            values = self._report_at_once(learning_rate, pointed=pointed)
        done = True
        if self.eval_dataset is not None and (weighed or last):
            done = self._evaluate_at(step, values)
        elif values:
            self._say_point(step, values)
        if inbox.evaluations and self.eval_dataset is None:
            inbox.evaluations.clear()
            inbox.line.say(
                Note("warning", "The job has no held-out rows, so there is nothing to evaluate on.")
            )
        early = self._patience_is_over
        if done and not self.control.should_training_stop and (early or inbox.stop):
            job.progress.ended = "stop" if inbox.stop else "early_stopping"
        ending = done and (ending or early)
        self._save_if_due(ending, scheduled=True)
        if inbox.leaving:
            raise Leaving(inbox.leaving, step)
        if ending:
            self.control.should_training_stop = True

    def _report_beside(self, learning_rate: float) -> None:
        """Have this step's point made in another thread: it is that one which waits for the device."""
        if self._reporter.failed:
            self._settle_reports()
        at, done = self._moment(learning_rate), self._taken_trail()

        def report() -> None:
            bad = self._first_bad(done)
            self._say_point(at.step, self._measure(at), at)
            if bad is not None:
                raise bad

        self._reporter.give(report)

    def _judge_steps(self, learning_rate: float | None = None) -> None:
        """Look at every step that was made so far. Raises what a bad one is answered with."""
        self._settle_reports()
        bad = self._first_bad(self._taken_trail())
        if bad is not None:
            at = self._moment(self._get_learning_rate() if learning_rate is None else learning_rate)
            self._say_point(at.step, self._measure(at), at)
            raise self._answer_to(bad)

    def _report_at_once(self, learning_rate: float, *, pointed: bool) -> dict[str, float]:
        """Return this step's values, if it has a point. Raises what a bad step is answered with."""
        self._judge_steps(learning_rate)
        return self._measure(self._moment(learning_rate)) if pointed else {}

    def _settle_reports(self) -> None:
        """Wait for the points that are being made. Raises what a bad step is answered with."""
        try:
            self._reporter.flush()
        except Bad as bad:
            raise self._answer_to(bad) from None


class ControlledSFTTrainer(ControlledMixin, SFTTrainer):  # type: ignore[misc]
    """Supervised fine-tuning, and continued pre-training on plain text."""

    measures_late = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Patched once more, over TRL's own patch: entropy and accuracy are not shown, so they are not computed.
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        add_fused_lm_head(model)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *others: Any
    ) -> Any:
        """Return the rows tokenised, and packed so that a sequence knows the rows in it."""
        if not packing or NUMBER not in get_dataset_column_names(dataset):
            return super()._prepare_dataset(dataset, processing_class, args, packing, *others)
        uncut = copy.copy(args)
        uncut.max_length = None
        tokenised = super()._prepare_dataset(dataset, processing_class, uncut, False, *others)
        return packed(tokenised, args.max_length)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's loss for this micro-batch without its measurements."""
        outputs = self._score(model, inputs)
        count = outputs.label_mask.sum() if num_items_in_batch is None else num_items_in_batch
        loss = -outputs.log_probs.sum() / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            share = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / share
        return (loss, outputs) if return_outputs else loss

    def _score(self, model: Any, inputs: Any) -> Any:
        """Return log-probabilities of the labels; the cache is off, or packed documents would see one another."""
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        return model(**inputs, fused_lm_head=True)

    def _weigh(self, model: Any, inputs: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        outputs = self._score(model, inputs)
        return {"eval_loss": (-outputs.log_probs.sum(), outputs.label_mask.sum())}
