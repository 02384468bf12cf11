"""The one thin layer over TRL's trainers: orders, exact pause, live parameters, the curve and our checkpoints.

Everything happens at the step boundary, where Trainer would log, evaluate and save; that method is replaced
whole. TRL computes entropy and accuracy with a wait for the device in every micro-batch; here losses and counts
stay on the device until a point of the curve is due.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from agent.trainer import memory
from agent.trainer.checkpoint import BadCheckpoint, Checkpoints, Found, make_manifest, verify
from agent.trainer.errors import TrainerError
from agent.trainer.inbox import Inbox, Leaving
from agent.trainer.progress import Progress, Schedule, perplexity
from agent.trainer.randomness import unmoved
from protocol.failures import FailureReason
from protocol.worker import Metrics, Note, Parameters, ParametersSet, Ready, Saved

logger = logging.getLogger(__name__)

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


class _PutOff(Exception):
    """An evaluation was given up because the process must leave."""


class _Begin(TrainerCallback):
    """Calls the trainer when everything is restored and the first batch is not yet read."""

    def __init__(self, begin: Callable[[Any], None]) -> None:
        self._begin = begin

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._begin(kwargs["train_dataloader"])
        return control


class ControlledMixin:
    """Goes before one of TRL's trainers in the list of bases."""

    def __init__(self, *args: Any, job: Job, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.job = job
        self._boundary = -1
        self._tokens = 0
        self._device_tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self._samples = 0
        self._window_began = self._began = self._steps_began = time.monotonic()
        self._elapsed_before = job.progress.elapsed
        self._start_step = 0
        self._evaluations: Any = None
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
        job.inbox.step = self._boundary = self._start_step = step
        self._tr_loss.fill_(progress.window_loss)
        self._globalstep_last_logged = step - progress.window_steps
        self._tokens, self._samples = progress.window_tokens, progress.window_samples
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
        self._set_parameters()
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
        self._steps_began = time.monotonic()
        self._window_began = self._steps_began - progress.window_seconds

    def _run_epoch(self, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # set in `_begin`: nothing is left to train
            super()._run_epoch(**kwargs)

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
        self._set_parameters()
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

    # The curve

    def _score(self, model: Any, inputs: Any) -> Any:
        """Return log-probabilities of the labels; the cache is off, or packed documents would see one another."""
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        return model(**inputs, fused_lm_head=True)

    def _count(self, inputs: Any) -> None:
        """Count the real tokens and rows of a micro-batch without waiting for the device."""
        mask = inputs.get("attention_mask")
        if mask is not None:
            self._device_tokens += mask.sum()
            self._samples += mask.shape[0]
        else:  # packed: no padding, and the documents' borders come with the batch
            self._tokens += inputs["input_ids"].numel()
            self._samples += inputs["cu_seq_lens_q"].numel() - 1

    def _drain(self) -> None:
        """Bring the device's token count over; waits for the device."""
        self._tokens += int(self._device_tokens.item())
        self._device_tokens.zero_()

    def _measure(
        self, tr_loss: torch.Tensor, grad_norm: Any, learning_rate: float | None
    ) -> dict[str, float]:
        """Return the train values since the last point, and count them."""
        progress, step = self.job.progress, self.state.global_step
        loss = tr_loss.item() / max(1, step - self._globalstep_last_logged)
        self._drain()
        seconds = max(1e-9, time.monotonic() - self._window_began)
        values = {
            "train_loss": loss,
            "train_perplexity": perplexity(loss),
            "learning_rate": self._get_learning_rate() if learning_rate is None else learning_rate,
            "samples_per_second": self._samples / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        if grad_norm is not None:
            values["grad_norm"] = float(grad_norm)
        progress.add_train_loss(loss)
        progress.tokens_seen += self._tokens
        tr_loss.zero_()
        self._globalstep_last_logged = step
        self._tokens = self._samples = 0
        self._window_began = time.monotonic()
        if not self._is_finite(loss, values.get("grad_norm", 0.0)):
            self._say_point(step, values)
            raise self._not_finite(step, "loss" if not math.isfinite(loss) else "gradient")
        return values

    def _is_finite(self, loss: float, norm: float) -> bool:
        # With float16 the scaler skips a step whose gradient overflowed, and nothing is harmed.
        return math.isfinite(loss) and (math.isfinite(norm) or self.accelerator.optimizer_step_was_skipped)

    def _not_finite(self, step: int, what: str) -> TrainerError:
        return TrainerError(
            FailureReason.NON_FINITE_LOSS,
            f"The {what} is not a finite number at optimizer step {step}, so the weights are of no use from there on. "
            "Lower the learning rate, raise warmup_steps, or look at the rows of that step; "
            "the last checkpoint is from before it.",
            step=step,
        )

    def _say_point(self, step: int, values: dict[str, float]) -> None:
        """Send one point of the curve with the counters that belong to each."""
        progress = self.job.progress
        now = time.monotonic()
        done = step - self._start_step
        total = max(1, self.state.max_steps)
        epoch = float(self.state.epoch or 0.0)
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
        self.job.inbox.line.say(Metrics(step, epoch, time.time(), {**common, **values}, progress.trend()))
        shown = ", ".join(f"{k} {v:.4g}" for k, v in values.items() if k.endswith(("loss", "rate", "norm")))
        logger.info("step %d of %d: %s", step, self.state.max_steps, shown)

    # Evaluation

    def _lacks_evaluation(self) -> bool:
        return self.eval_dataset is not None and self.job.progress.eval_step != self.state.global_step

    def _evaluate_first(self) -> None:
        """Measure the held-out loss of the untrained model."""
        if self.eval_dataset is None:
            return
        try:
            loss = self._held_out_loss()
        except _PutOff:
            # Nothing has been trained: the next attempt begins anew and loses nothing.
            raise Leaving(self.job.inbox.leaving, 0) from None
        progress = self.job.progress
        progress.initial_eval_loss = progress.eval_loss = loss
        progress.eval_step = 0
        self._say_point(0, {"eval_loss": loss, "perplexity": perplexity(loss)})

    def _evaluate_at(self, step: int, values: dict[str, float]) -> bool:
        """Evaluate and send one point with ``values``; False if it was put off because the process must leave."""
        job, progress = self.job, self.job.progress
        with self._off_the_clock():
            try:
                if job.inbox.leaving:
                    raise _PutOff
                loss = self._held_out_loss()
            except _PutOff:
                if values:
                    self._say_point(step, values)
                progress.owed = values
                return False
        progress.owed = None
        job.inbox.evaluations.clear()
        progress.add_eval_loss(loss, step, float(self.state.epoch or 0.0), job.schedule.threshold)
        self._say_point(step, {**values, "eval_loss": loss, "perplexity": perplexity(loss)})
        return True

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Return the mean loss over every held-out token. Raises _PutOff if the process must leave meanwhile."""
        if self._evaluations is None:
            self._evaluations = self.get_eval_dataloader()
        model, inbox = self.model, self.job.inbox
        model.eval()
        wide = torch.float64 if self.args.device.type != "mps" else torch.float32
        total = torch.zeros((), dtype=wide, device=self.args.device)
        count = torch.zeros((), dtype=torch.int64, device=self.args.device)
        with unmoved():
            for batch in self._evaluations:
                inbox.listen()
                if inbox.leaving:
                    raise _PutOff
                with self.compute_loss_context_manager():
                    outputs = self._score(model, self._prepare_inputs(batch))
                total -= outputs.log_probs.sum()
                count += outputs.label_mask.sum()
        return float(total.item() / max(1, count.item()))

    # Live parameters

    def _set_parameters(self) -> None:
        """Put the ordered parameters in force and say which were refused."""
        inbox, schedule, progress = self.job.inbox, self.job.schedule, self.job.progress
        orders, inbox.parameters = inbox.parameters, []
        for wanted in orders:
            taken: dict[str, Any] = {}
            refused: list[str] = []
            for name, value in msgspec.structs.asdict(wanted).items():
                if value is None:
                    continue
                why = self._set_parameter(name, value, schedule)
                if why:
                    refused.append(why)
                else:
                    taken[name] = value
            progress.parameters = msgspec.structs.replace(progress.parameters, **taken)
            inbox.line.say(ParametersSet(self.state.global_step + 1, Parameters(**taken), " ".join(refused)))

    def _set_parameter(self, name: str, value: Any, schedule: Schedule) -> str:
        """Put one parameter in force; return a sentence if that cannot be done."""
        now = {
            "batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
        }
        if name in now:
            if now[name] == value:
                return ""
            return (
                f"{name} stays {now[name]}: the place in the data is counted in batches of that size. "
                "Submit a new job to train with another."
            )
        if value <= 0:
            return f"{name} must be greater than 0, not {value}."
        if name == "learning_rate":
            return self._set_learning_rate(value)
        if name == "early_stopping_patience":
            schedule.patience = value
        elif name == "eval_steps" and schedule.eval_strategy != "steps":
            return f"eval_steps has no effect: the job evaluates by {schedule.eval_strategy!r}, not by steps."
        else:
            setattr(schedule, name, value)
        return ""

    def _set_learning_rate(self, value: float) -> str:
        """Make ``value`` the peak of the schedule, which keeps its shape."""
        scheduler = self.lr_scheduler
        if not isinstance(scheduler, LambdaLR):
            return f"learning_rate cannot be changed under the {self.args.lr_scheduler_type} schedule."
        rates = [value * shape(scheduler.last_epoch) for shape in scheduler.lr_lambdas]
        scheduler.base_lrs = [value for _ in rates]
        scheduler._last_lr = rates
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["initial_lr"], group["lr"] = value, rate
        return ""

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

    def _store_counters(self) -> None:
        """Bring the counters up to date for a checkpoint of this step."""
        progress = self.job.progress
        self._drain()
        progress.window_loss = self._tr_loss.item()
        progress.window_steps = self.state.global_step - self._globalstep_last_logged
        progress.window_tokens, progress.window_samples = self._tokens, self._samples
        progress.window_seconds = time.monotonic() - self._window_began if progress.window_steps else 0.0
        progress.elapsed = self._elapsed_before + time.monotonic() - self._began

    def _fill(self, folder: Path) -> None:
        """Write everything that the next step depends on."""
        self.save_model(str(folder), _internal_call=True)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / TRAINER_STATE))
        self.job.progress.save(folder)

    @contextlib.contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Keep what is done inside out of the tokens per second."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._window_began += time.monotonic() - began

    # After training

    @property
    def why_ended(self) -> str:
        return self.job.progress.ended or "steps"

    def finish_counters(self) -> None:
        """Bring the total time up to date."""
        self.job.progress.elapsed = self._elapsed_before + time.monotonic() - self._began

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


class ControlledSFTTrainer(ControlledMixin, SFTTrainer):
    """Supervised fine-tuning, and continued pre-training on plain text."""
