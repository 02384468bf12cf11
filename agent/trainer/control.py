"""The one thin layer over TRL's trainers: orders, exact pause, live parameters, the curve and our checkpoints.

Everything happens at the step boundary, where Trainer would log, evaluate and save; that method is replaced
whole.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import PeftModel
from transformers import TrainerCallback
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from agent.trainer.batches import ByLength
from agent.trainer.checkpoint import BadCheckpoint, Checkpoints, Found, make_manifest, verify
from agent.trainer.curve import Curve, logger
from agent.trainer.inbox import Inbox, Leaving
from agent.trainer.live import set_parameters
from agent.trainer.progress import Progress, Schedule
from agent.trainer.randomness import unmoved
from protocol.worker import Note, Parameters, Ready, Saved

TRAINER_STATE = "trainer_state.json"


@dataclass
class Job:
    """What training needs beyond TRL's own arguments."""

    job_id: str
    attempt: int
    inbox: Inbox
    checkpoints: Checkpoints
    schedule: Schedule
    progress: Progress
    parameters: Parameters
    ready: Ready
    """Filled in with the steps and sent when they are known."""
    inputs: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    resumed_from: Found | None = None
    stop_at_once: bool = False
    before: Callable[[Any], None] = lambda trainer: None
    """Called with the trainer before the first step ever."""


class _Begin(TrainerCallback):  # type: ignore[misc]
    """Calls the trainer when everything is restored and the first batch is not yet read."""

    def __init__(self, begin: Callable[[Any], None]) -> None:
        self._begin = begin

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._begin(kwargs["train_dataloader"])
        return control


class ControlledMixin(Curve):
    """Goes before one of TRL's trainers in the list of bases."""

    def __init__(self, *args: Any, job: Job, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.job = job
        self._boundary = -1
        self._start_counting()
        self.add_callback(_Begin(self._begin))
        # Patched once more, over TRL's own patch: entropy and accuracy are not shown, so they are not computed.
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        add_fused_lm_head(model)

    # Called by Trainer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restore the weights. An adapter keeps the precision it is trained in."""
        if isinstance(self.model, PeftModel):
            # By default PEFT turns 16-bit adapters into float32 here, and a resumed QLoRA run goes another way.
            self.model.load_adapter(
                resume_from_checkpoint,
                self.model.active_adapters[0],
                is_trainable=True,
                autocast_adapter_dtype=False,
            )
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

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

    # Checkpoints

    def _save_if_due(
        self, ending: bool, *, scheduled: bool, tr_loss: torch.Tensor | None = None, grad_norm: Any = None
    ) -> None:
        """Save once, and say so for each reason there is."""
        job, step = self.job, self.state.global_step
        reasons: list[tuple[str, str]] = []
        if job.inbox.leaving:
            reasons.append(("pause" if job.inbox.leaving == "paused" else "parent_lost", ""))
        if ending:
            reasons.append(("final", ""))
        progress = job.progress
        if (
            progress.best_step == step > 0
            and progress.eval_step == step
            and job.schedule.eval_strategy != "no"
        ):
            reasons.append(("best", ""))
        if scheduled and step % job.schedule.save_steps == 0:
            reasons.append(("schedule", ""))
        commands, job.inbox.saves = job.inbox.saves, []
        reasons += [("command", command) for command in commands]
        if not reasons:
            return
        if tr_loss is not None:
            norm = float(grad_norm) if grad_norm is not None else 0.0
            if not self._is_finite(tr_loss.item(), norm):
                raise self._not_finite(step, "loss or its gradient")
        with self._off_the_clock():
            self._save_now(reasons)

    def _save_now(self, reasons: list[tuple[str, str]]) -> None:
        job, progress, step = self.job, self.job.progress, self.state.global_step
        began = time.monotonic()
        self._store_counters()
        epoch = float(self.state.epoch or 0.0)
        manifest = msgspec.structs.replace(
            make_manifest(job.job_id, step, epoch, job.attempt, reasons[0][0]),
            train_loss=progress.train_loss,
            eval_loss=progress.eval_loss if progress.eval_step == step else None,
            versions=job.versions,
            inputs=job.inputs,
        )
        found = job.checkpoints.save(manifest, self._fill)
        best = progress.best_eval_loss is not None and progress.best_step == step
        job.checkpoints.in_use = {found.path, job.checkpoints.path(progress.best_step)}
        if job.resumed_from is not None:
            job.checkpoints.in_use.add(job.resumed_from.path)
        job.checkpoints.retain(job.schedule.save_total_limit)
        seconds = time.monotonic() - began
        for reason, command in reasons:
            job.inbox.line.say(
                Saved(
                    path=str(found.path),
                    step=step,
                    epoch=epoch,
                    size=found.size,
                    seconds=seconds,
                    reason=reason,
                    eval_loss=manifest.eval_loss,
                    train_loss=progress.train_loss,
                    is_best=best,
                    command_id=command,
                )
            )
        logger.info("saved %s in %.2f s", found.path.name, seconds)

    def _fill(self, folder: Path) -> None:
        """Write everything that the next step depends on."""
        self.save_model(str(folder), _internal_call=True)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / TRAINER_STATE))
        self.job.progress.save(folder)

    # After training

    @property
    def why_ended(self) -> str:
        return self.job.progress.ended or "steps"

    def take_best(self) -> bool:
        """Put the best weights in place of the last, if training was ended early and there are better ones."""
        progress, line = self.job.progress, self.job.inbox.line
        if (
            not progress.ended
            or progress.best_eval_loss is None
            or progress.best_step == self.state.global_step
        ):
            return False
        path = self.job.checkpoints.path(progress.best_step)
        try:
            verify(path)
        except BadCheckpoint as bad:
            line.say(
                Note("warning", f"The best weights (step {progress.best_step}) could not be used: {bad}.")
            )
            return False
        self._load_from_checkpoint(str(path))
        line.say(
            Note(
                "info", f"The final model has the weights of step {progress.best_step}, the best evaluation."
            )
        )
        return True


class ControlledSFTTrainer(ControlledMixin, SFTTrainer):  # type: ignore[misc]
    """Supervised fine-tuning, and continued pre-training on plain text."""
