"""Checkpoints of a training: when they are due, how they are written, and how they are put back.

The saving half of `agent.trainer.control.ControlledMixin`. A periodic checkpoint is copied into host memory and
written while training goes on; one that is waited for (a pause, the end) is written at once.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from peft import PeftModel

from agent.trainer import contents
from agent.trainer.checkpoint import (
    Ancestor,
    BadCheckpoint,
    Checkpoints,
    Found,
    make_manifest,
    verify,
)
from agent.trainer.curve import Curve
from agent.trainer.inbox import Inbox, Leaving
from agent.trainer.keeper import Keeper, Save
from agent.trainer.progress import FILE, Progress, Schedule
from agent.trainer.reading import reading
from agent.trainer.snapshot import Content
from protocol.worker import Limits, Note, Parameters, Ready

TRAINER_STATE = "trainer_state.json"
PATIENCE = 2.0
"""Seconds that a cancel waits for a checkpoint in hand; the agent waits for five (`agent.core.job.CANCEL_GRACE`)."""


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
    replay: list[tuple[int, Parameters]] = field(default_factory=list)
    """Live parameters that an earlier attempt put in force after the checkpoint, each from its step on."""
    inputs: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    resumed_from: Found | None = None
    stop_at_once: bool = False
    reports_beside: bool = True
    """Whether points are made and sent in a thread of their own."""
    before: Callable[[Any], None] = lambda trainer: None
    """Called with the trainer before the first step ever."""
    limits: Limits = field(default_factory=Limits)
    load_best_at_end: bool = False
    lineage: list[Ancestor] = field(default_factory=list)
    fresh_optimizer: bool = False
    """It is another one than the checkpoint's, whose state it cannot read."""


class Saving(Curve):
    """What is kept of a training, and how it is put back."""

    _keeper: Keeper
    _held_optimizer: Any = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; what is still being written at the end is finished first, if nobody waits for a cancel."""
        job = self.job
        resumed = job.resumed_from
        # The job comes after the trainer.
        self._keeper = Keeper(
            job.checkpoints,
            job.inbox.line,
            job.limits,
            lambda: contents.static_files(self.model, self.processing_class),
            resumed.manifest.step if resumed is not None else 0,
        )
        in_use = {job.checkpoints.path(job.progress.best_step)} if job.progress.best_step else set()
        self._keeper.check_disk(
            resumed.size if resumed is not None else self._guess_size(),
            self._weights_size(),
            job.schedule.save_total_limit,
            in_use | ({resumed.path} if resumed is not None else set()),
        )
        try:
            result = super().train(*args, **kwargs)
        except BaseException as error:
            cancelled = isinstance(error, Leaving) and error.why == "cancelled"
            self._keeper.close(PATIENCE if cancelled else None)
            raise
        self._keeper.wait()
        return result

    # Putting back

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restore the weights. An adapter keeps the precision it is trained in."""
        contents.put_weights(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not contents.has(Path(checkpoint), contents.OPTIMIZER):
            super()._load_optimizer_and_scheduler(checkpoint)  # of format 1
            return
        if not self.job.fresh_optimizer:
            contents.put_optimizer(self.optimizer, contents.take(Path(checkpoint), contents.OPTIMIZER))
        self.lr_scheduler.load_state_dict(contents.take(Path(checkpoint), contents.SCHEDULE)["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not contents.has(Path(checkpoint), contents.SCHEDULE):
            super()._load_scaler(checkpoint)
            return
        state = contents.take(Path(checkpoint), contents.SCHEDULE)["scaler"]
        scaler = getattr(self.accelerator, "scaler", None)
        if state is not None and scaler is not None:
            scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or not contents.has(Path(checkpoint), contents.RANDOM):
            super()._load_rng_state(checkpoint)
            return
        contents.put_random_states(contents.take(Path(checkpoint), contents.RANDOM))

    # Saving

    def settle_saves(self) -> None:
        """Wait until nothing is being written any more. Raises NoRoom, if that is what became of it."""
        self._keeper.wait()

    def _save_if_due(self, ending: bool, *, scheduled: bool) -> None:
        """Save once, and say so for each reason there is."""
        self._keeper.check()
        job, step = self.job, self.state.global_step
        reasons: list[tuple[str, str]] = []
        if job.inbox.leaving:
            reasons.append(({"paused": "pause"}.get(job.inbox.leaving, job.inbox.leaving), ""))
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
        if reasons:
            with self._off_the_clock():
                self._save_now(reasons)

    def _save_now(self, reasons: list[tuple[str, str]]) -> None:
        """Save this step; where training goes on after it, in the background.

        One checkpoint is written at a time: a save that comes too soon waits, and so none is ever left out.
        """
        job, progress, step = self.job, self.job.progress, self.state.global_step
        began = time.monotonic()
        self._keeper.wait()
        self._hold_optimizer()
        self._store_counters()
        manifest = msgspec.structs.replace(
            make_manifest(job.job_id, step, float(self.state.epoch or 0.0), job.attempt, reasons[0][0]),
            train_loss=progress.train_loss,
            eval_loss=progress.eval_loss if progress.eval_step == step else None,
            best_step=progress.best_step,
            versions=job.versions,
            inputs=job.inputs,
            lineage=job.lineage,
            begun=self._begun(),
        )
        keep = {job.checkpoints.path(step), job.checkpoints.path(progress.best_step)}
        if job.resumed_from is not None:
            keep.add(job.resumed_from.path)
        self._keeper.save(
            Save(
                manifest,
                self._content(),
                reasons,
                is_best=progress.best_eval_loss is not None and progress.best_step == step,
                keep=keep,
                limit=job.schedule.save_total_limit,
                began=began,
            )
        )

    def _begun(self) -> list[tuple[int, int]]:
        """Return the attempts that led here, each with the step that it began after."""
        job, resumed = self.job, self.job.resumed_from
        if resumed is None:
            return [(job.attempt, 0)]
        before = resumed.manifest.begun if resumed.manifest.job_id == job.job_id else []
        return [*before, (job.attempt, resumed.manifest.step)]

    def _hold_optimizer(self) -> None:
        """Let the optimizer's steps wait for a copy that is being made of what they change."""
        inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if inner is not self._held_optimizer:
            self._held_optimizer = inner
            inner.register_step_pre_hook(lambda *_: self._keeper.before_step())

    def _content(self) -> Content:
        """Return everything that the next step depends on. The tensors are training's own, not copies."""
        content = Content(contents.weights(self.model))
        scaler = getattr(self.accelerator, "scaler", None)
        contents.add(content, contents.OPTIMIZER, self.optimizer.state_dict())
        contents.add(
            content,
            contents.SCHEDULE,
            {
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
        )
        contents.add(content, contents.RANDOM, contents.random_states())
        state = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True)
        content.files[TRAINER_STATE] = state.encode()
        content.files[FILE] = msgspec.msgpack.encode(self.job.progress)
        return content

    def _weights_size(self) -> int:
        chosen = [
            p for p in self.model.parameters() if p.requires_grad or not isinstance(self.model, PeftModel)
        ]
        return sum(p.numel() * p.element_size() for p in chosen)

    def _guess_size(self) -> int:
        """Return about how large a checkpoint will be; the optimizer has no state yet."""
        name = str(getattr(self.args.optim, "value", self.args.optim))
        each = 2.0 if "8bit" in name else 0.1 if "adafactor" in name else 0.0 if "sgd" in name else math.inf
        trained = [p for p in self.model.parameters() if p.requires_grad]
        state = sum(p.numel() * min(each, 2 * p.element_size()) for p in trained)
        return self._weights_size() + int(state)

    # After training

    @property
    def why_ended(self) -> str:
        return self.job.progress.ended or "steps"

    def take_best(self) -> bool:
        """Put the best weights in place of the last, if there are better ones and the job asks for them.

        It does so where training was ended early, and by ``load_best_at_end``.
        """
        self._keeper.wait()
        job, progress = self.job, self.job.progress
        if (
            not (progress.ended or job.load_best_at_end)
            or progress.best_eval_loss is None
            or progress.best_step == self.state.global_step
        ):
            return False
        path = job.checkpoints.path(progress.best_step)
        with reading(path):
            try:
                verify(path, job.job_id)
            except BadCheckpoint as bad:
                self._note(
                    "warning",
                    f"The best weights (step {progress.best_step}) could not be used, so the final model has the "
                    f"last ones: {bad}.",
                )
                return False
            self._load_from_checkpoint(str(path))
        self._note(
            "info", f"The final model has the weights of step {progress.best_step}, the best evaluation."
        )
        return True

    def _note(self, level: str, text: str) -> None:
        self.job.inbox.line.say(Note(level, text))
