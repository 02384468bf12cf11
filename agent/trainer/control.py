"""The one thin layer over TRL's trainers: orders, exact pause, live parameters, the curve and our checkpoints.

Everything happens at the step boundary, where Trainer would log, evaluate and save; that method is replaced
whole.
"""

import math
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from peft import PeftModel
from transformers import TrainerCallback
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from agent.trainer.batches import ByLength
from agent.trainer.inbox import Leaving
from agent.trainer.live import set_parameters
from agent.trainer.randomness import unmoved
from agent.trainer.saving import Job, Saving
from protocol.worker import Note, Parameters


class _Begin(TrainerCallback):  # type: ignore[misc]
    """Calls the trainer when everything is restored and the first batch is not yet read."""

    def __init__(self, begin: Callable[[Any], None]) -> None:
        self._begin = begin

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._begin(kwargs["train_dataloader"])
        return control


class ControlledMixin(Saving):
    """Goes before one of TRL's trainers in the list of bases."""

    def __init__(self, *args: Any, job: Job, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.job = job
        self._boundary = -1
        self._start_counting()
        self.add_callback(_Begin(self._begin))

    # Called by Trainer

    def _begin(self, train_dataloader: Any) -> None:
        """Take up the counters, say Ready, and do what belongs before the first step."""
        job, progress, step = self.job, self.job.progress, self.state.global_step
        job.inbox.step = self._boundary = step
        if job.resumed_from is not None:
            # Trainer does this later, at the first batch; a checkpoint written before that must hold them too.
            self._load_rng_state(str(job.resumed_from.path))
        self._resume_counting()
        accumulation = self.args.gradient_accumulation_steps
        updates = max(1, math.ceil(len(train_dataloader) / accumulation))
        job.inbox.line.say(
            msgspec.structs.replace(
                job.ready,
                total_steps=self.state.max_steps,
                total_epochs=self.state.max_steps / updates,
                start_step=step,
                batch_size=self.args.per_device_train_batch_size,
                gradient_accumulation_steps=accumulation,
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
            self._save_if_due(ending, scheduled=False)
        if ending:
            progress.ended = why
            self.control.should_training_stop = True
        self._start_clock()

    def _run_epoch(self, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # set in `_begin`: nothing is left to train
            super()._run_epoch(**kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ByLength(lengths, together, self.args.seed)

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

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: Any,
        *args: Any,
        learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Close the optimizer step that has just ended: orders, point, evaluation, checkpoint, leaving."""
        job, step = self.job, self.state.global_step
        if step == self._boundary:  # called once more at the end of an epoch
            return
        job.inbox.step = self._boundary = step
        job.inbox.listen()
        set_parameters(self)
        ending = self.control.should_training_stop or job.inbox.stop
        values: dict[str, float] = {}
        if ending or step % job.schedule.logging_steps == 0:
            values = self._measure(tr_loss, grad_norm, learning_rate)
        due = job.schedule.evaluates(step, float(self.state.epoch)) or job.inbox.evaluations
        done = True
        if self.eval_dataset is not None and (due or ending):
            done = self._evaluate_at(step, values)
        elif values:
            self._say_point(step, values)
        if job.inbox.evaluations and self.eval_dataset is None:
            job.inbox.evaluations.clear()
            job.inbox.line.say(
                Note("warning", "The job has no held-out rows, so there is nothing to evaluate on.")
            )
        early = bool(job.schedule.patience and job.progress.without_improvement >= job.schedule.patience)
        if done and not self.control.should_training_stop and (early or job.inbox.stop):
            job.progress.ended = "stop" if job.inbox.stop else "early_stopping"
        ending = done and (ending or early)
        self._save_if_due(ending, scheduled=True, tr_loss=tr_loss, grad_norm=grad_norm)
        if job.inbox.leaving:
            raise Leaving(job.inbox.leaving, step)
        if ending:
            self.control.should_training_stop = True


class ControlledSFTTrainer(ControlledMixin, SFTTrainer):  # type: ignore[misc]
    """Supervised fine-tuning, and continued pre-training on plain text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Patched once more, over TRL's own patch: entropy and accuracy are not shown, so they are not computed.
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        add_fused_lm_head(model)

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
