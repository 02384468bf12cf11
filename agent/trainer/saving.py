"""Checkpoints of a training: when they are due, what is in them, and how they are put back.

The saving half of `agent.trainer.control.ControlledMixin`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import PeftModel

from agent.trainer.checkpoint import BadCheckpoint, Checkpoints, Found, make_manifest, verify
from agent.trainer.curve import Curve, logger
from agent.trainer.inbox import Inbox
from agent.trainer.progress import Progress, Schedule
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


class Saving(Curve):
    """What is kept of a training, and how it is put back."""

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
