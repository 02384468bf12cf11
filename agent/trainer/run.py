"""A job from its spec to its final model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from datasets.exceptions import DatasetGenerationError

from agent.trainer import (
    data,
    determinism,
    fingerprints,
    inputs,
    memory,
    methods,
    replay,
    restore,
    samples,
    settings,
)
from agent.trainer.checkpoint import Checkpoints, Found
from agent.trainer.control import ControlledSFTTrainer
from agent.trainer.disk import NoRoom, check_writable
from agent.trainer.errors import TrainerError
from agent.trainer.forecast import Forecast
from agent.trainer.inbox import Inbox, Leaving
from agent.trainer.live import Applied, to_come
from agent.trainer.model import choose_precision, load_model, load_tokenizer
from agent.trainer.output import MERGED, Output
from agent.trainer.progress import Progress, Schedule
from agent.trainer.saving import Job
from protocol.failures import FailureReason
from protocol.jobspec import JobSpec, Method
from protocol.worker import Finished, Left, Note, Parameters, Phase, Preparing, Ready, Start, Trained

FLUSH_LIMIT = 60.0
"""Seconds that the end of a job waits for the agent to take down its last events."""


def train(start: Start, line: Any, inbox: Inbox | None = None, *, reports_beside: bool = True) -> int:
    """Run a job to its end, or to where it is told to leave; return the exit code. Raises TrainerError.

    ``reports_beside`` is False where whoever answers on the line counts the steps by their points.
    """
    inbox = inbox or Inbox(line)
    if line.parent_gone:
        # The agent died while this process was on its way here. Its folders may be another's by now.
        line.say(Left("parent_lost", 0))
        return 0
    try:
        _Run(start, inbox, reports_beside).go()
    except Leaving as leaving:
        line.say(Left(leaving.why, leaving.step))
    except NoRoom as full:
        line.say(Note("warning", full.sentence))
        line.say(Left("disk_full", inbox.step, full.needed))
    finally:
        data.discard(start.spec, start.workspace)
    line.flush(FLUSH_LIMIT)
    return 0


@dataclass
class _Ground:
    """What a trainer stands on: everything that was loaded."""

    tokenizer: Any
    prepared: Any
    trainer: ControlledSFTTrainer
    use_cache: bool


class _Run:
    """One attempt at a job."""

    def __init__(self, start: Start, inbox: Inbox, reports_beside: bool) -> None:
        self.start = start
        self.reports_beside = reports_beside
        self.spec: JobSpec = start.spec
        self.inbox = inbox
        self.checkpoints = Checkpoints(Path(start.workspace.checkpoints), start.spec.job_id)
        self.progress = Progress()
        self.facts: dict[str, str] = {}
        self.checking: replay.Checking | None = None

    def go(self) -> None:
        self.inbox.listen()
        self.facts = determinism.apply(self.spec)
        memory.apply_cap(self.start.limits)
        memory.keep_freed()
        check_writable(self.checkpoints.folder, "the job's checkpoints")
        Output(self.start.workspace).check()
        found = self._find_checkpoint()
        ground = self._load(found)
        trainer = ground.trainer
        try:
            trainer.train(resume_from_checkpoint=str(found.path) if found is not None else None)
            if self.checking is not None:
                self.checking.finish()
            self._finish(ground)
        finally:
            if self.checking is not None:
                self.checking.drop()

    # Before training

    def _find_checkpoint(self) -> Found | None:
        chosen = restore.find(self.start, self.checkpoints, self.inbox.line.say)
        if chosen is None:
            return None
        found, self.progress = chosen
        self.inbox.step = found.manifest.step
        return found

    def _load(self, found: Found | None) -> _Ground:
        """Load tokenizer, data and model, and build the trainer."""
        start, spec, inbox = self.start, self.spec, self.inbox
        methods.trainer_class(spec.method)
        inbox.leave_if_told()
        where = start.workspace.model
        if not Path(where).is_absolute():
            self._say(Phase.DOWNLOAD, f"Fetching {where} from the Hub, as far as it is not here yet.")
        tokenizer = load_tokenizer(spec, start.workspace, start.limits)
        mark_of_tokenizer = fingerprints.tokenizer_mark(tokenizer)
        if spec.tokenizer.add_eos_token is False:
            self._note(
                "warning",
                "tokenizer.add_eos_token: the end of each row is always marked, or it is not learnt.",
            )
        self._say(Phase.CHECK, "Checking every row of the data set.")
        prepared = data.prepare(
            spec, start.workspace, tokenizer, start.limits, self._note, inbox.leave_if_told
        )
        branches = found is not None and found.manifest.job_id != spec.job_id
        idle = settings.in_vain(spec, held_out=prepared.eval is not None)
        if idle and (found is None or branches):  # one that goes on has been told
            self._note("warning", idle)
        if prepared.source is not None:
            prepared.source.accepts_changes = start.accept_changes or branches
        inbox.leave_if_told()
        self._say(Phase.LOAD, f"Loading the model {Path(where).name}.")
        precision = choose_precision(spec, start.limits, self._note)
        forecast = Forecast(start, inbox.line.say)
        loaded = load_model(spec, start.workspace, start.limits, precision, tokenizer)
        use_cache = bool(getattr(loaded.model.config, "use_cache", True))
        marks = fingerprints.marks(
            spec, start.workspace, prepared, tokenizer, mark_of_tokenizer, loaded, precision
        )
        accepted: inputs.Accepted | None = None
        if found is not None:
            accepted = inputs.check(
                found, spec, marks, self.progress, self._note, accept=start.accept_changes
            )
            self._say(Phase.RESTORE, f"Going on from step {found.manifest.step}.")
        inbox.leave_if_told()
        args = methods.arguments(
            spec, precision, start.workspace.checkpoints, assistant_only=prepared.assistant_only
        )
        chat = prepared.chat
        schedule = Schedule.of(spec.training, start.limits)
        at_once, later = self._live_parameters(schedule, found)
        job = Job(
            job_id=spec.job_id,
            attempt=start.attempt,
            inbox=inbox,
            checkpoints=self.checkpoints,
            schedule=schedule,
            progress=self.progress,
            parameters=at_once,
            replay=later,
            ready=self._ready(prepared, found, loaded.facts),
            inputs=marks,
            versions=fingerprints.versions(),
            resumed_from=found,
            stop_at_once=start.stop_at_once,
            reports_beside=self.reports_beside,
            limits=start.limits,
            load_best_at_end=spec.training.load_best_at_end,
            lineage=restore.lineage(found, spec),
            fresh_optimizer=accepted is not None and accepted.fresh_optimizer,
            before=lambda trainer: self._sample_before(trainer, tokenizer, chat),
        )
        try:
            trainer = methods.build(
                spec, loaded, args, tokenizer, prepared.train, prepared.eval, job, prepared.source
            )
        except (DatasetGenerationError, StopIteration, IndexError) as error:
            raise self._no_rows(prepared) from error
        if accepted is not None and accepted.needed:
            trainer.add_callback(inputs.PutInForce(accepted))
        if found is not None and start.limits.verify_resume:
            self.checking = replay.Checking(start, found, marks, inbox)
            trainer.add_callback(self.checking)
        if prepared.source is None and len(trainer.train_dataset) == 0:
            raise self._no_rows(prepared)
        if trainer.eval_dataset is not None and len(trainer.eval_dataset) == 0:
            self._note(
                "warning",
                "No held-out row has a token to learn from within max_length: nothing is evaluated.",
            )
            trainer.eval_dataset = None
        self._count_sizes(job, trainer, prepared)
        forecast.tell(trainer, precision)
        return _Ground(tokenizer, prepared, trainer, use_cache)

    def _no_rows(self, prepared: Any) -> TrainerError:
        return TrainerError(
            FailureReason.DATA,
            f"None of the {prepared.rows} rows has a token to learn from within max_length "
            f"({self.spec.training.max_length}): their prompts alone fill it. Raise training.max_length.",
        )

    def _count_sizes(self, job: Job, trainer: ControlledSFTTrainer, prepared: Any) -> None:
        """Complete what Ready says with what is known once the trainer stands."""
        parameters = list(trainer.model.parameters())
        facts = dict(job.ready.facts)
        rows = prepared.rows if prepared.source is not None else len(trainer.train_dataset)
        if self.spec.training.packing:
            facts["packing"] = f"{prepared.rows} rows in {rows} sequences" if rows else "as the rows come"
        elif rows < prepared.rows:
            self._note(
                "warning",
                f"{prepared.rows - rows} of {prepared.rows} rows are left out: their prompts alone fill "
                f"max_length ({self.spec.training.max_length}).",
            )
        job.ready = msgspec.structs.replace(
            job.ready,
            trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
            all_parameters=trainer.model.num_parameters()
            if hasattr(trainer.model, "num_parameters")
            else sum(p.numel() for p in parameters),
            device=str(trainer.args.device),
            facts=facts,
        )

    def _ready(self, prepared: Any, found: Found | None, facts: dict[str, str]) -> Ready:
        descent = [f"{one.job_id} {one.name}" for one in restore.lineage(found, self.spec)]
        return Ready(
            total_steps=0,
            total_epochs=0.0,
            start_step=0,
            train_rows=prepared.rows,
            eval_rows=len(prepared.eval) if prepared.eval is not None else 0,
            device="",
            trainable_parameters=0,
            all_parameters=0,
            batch_size=0,
            gradient_accumulation_steps=0,
            resumed_from=str(found.path) if found is not None else "",
            facts={
                **({"branched_from": " < ".join(reversed(descent))} if descent else {}),
                "method": str(self.spec.method),
                **self._method_facts(),
                **facts,
                **self.facts,
                **prepared.facts,
                "adapter": f"LoRA, rank {self.spec.lora.r}" if self.spec.lora is not None else "none",
            },
        )

    def _method_facts(self) -> dict[str, str]:
        dpo = self.spec.dpo
        return {"loss": f"{dpo.loss_type}, beta {dpo.beta:g}"} if self.spec.method is Method.DPO else {}

    def _live_parameters(self, schedule: Schedule, found: Found | None) -> tuple[Parameters, Applied]:
        """Return the live parameters that are still to be put in force; those of the checkpoint are, or are put so.

        The learning rate lies in the restored optimizer and scheduler; the rest is in the schedule, made anew.
        """
        mine = self.progress.parameters
        if found is not None:
            for name in ("logging_steps", "save_steps", "eval_steps"):
                if (value := getattr(mine, name)) is not None:
                    setattr(schedule, name, value)
            if mine.early_stopping_patience is not None:
                schedule.patience = mine.early_stopping_patience
        saved_step = found.manifest.step if found is not None else None
        return to_come(self.start.parameters, self.start.applied, self.progress, saved_step)

    # Samples

    def _sample_before(self, trainer: ControlledSFTTrainer, tokenizer: Any, chat: bool) -> None:
        self.progress.samples = [
            {
                "prompt": sample.prompt,
                "answer": sample.answer,
                **self._answer(trainer, tokenizer, sample, chat, "before"),
            }
            for sample in self.spec.samples
        ]

    def _sample_after(self, ground: _Ground) -> list[dict[str, str | float]]:
        chat = ground.prepared.chat
        return [
            {**before, **self._answer(ground.trainer, ground.tokenizer, sample, chat, "after")}
            for sample, before in zip(self.spec.samples, self.progress.samples, strict=False)
        ]

    def _answer(
        self, trainer: ControlledSFTTrainer, tokenizer: Any, sample: Any, chat: bool, when: str
    ) -> dict[str, str | float]:
        listen = self.inbox.leave_if_told if when == "before" else self.inbox.leave_unless_finishing
        room = max(8, self.spec.training.max_length - samples.NEW_TOKENS)
        with trainer.compute_loss_context_manager():
            given = samples.answer(trainer.model, tokenizer, sample, chat=chat, room=room, listen=listen)
        values: dict[str, str | float] = {when: given.text}
        if given.log_likelihood is not None:
            values[f"log_likelihood_{when}"] = given.log_likelihood
        return values

    # After training

    def _finish(self, ground: _Ground) -> None:
        """Write the final model and say Finished."""
        trainer, inbox, workspace = ground.trainer, self.inbox, self.start.workspace
        trainer.finish_counters()
        step = trainer.state.global_step
        inbox.line.say(Trained(step, trainer.why_ended))
        inbox.leave_unless_finishing()
        is_best = trainer.take_best()
        taken = self._sample_after(ground)
        with Output(workspace, self.checkpoints) as output:
            digest = output.write(trainer.model, ground.tokenizer, use_cache=ground.use_cache)
            inbox.leave_unless_finishing()
            merge = self.spec.output.merge_adapter and self.spec.lora is not None
            if merge:
                del trainer, ground.trainer
                memory.release()
                output.merge(self.spec, workspace, self.start.limits, ground.tokenizer)
                inbox.leave_unless_finishing()
            output.publish()
        inbox.line.say(
            Finished(
                model_path=str(output.final),
                merged_path=str(output.final / MERGED) if merge else "",
                weights_hash=digest,
                step=step,
                values=self._final_values(is_best),
                samples=taken,
            )
        )

    def _final_values(self, is_best: bool) -> dict[str, float]:
        progress = self.progress
        values: dict[str, float | None] = {
            "final_loss": progress.train_loss,
            "final_eval_loss": progress.best_eval_loss if is_best else progress.eval_loss,
            "initial_eval_loss": progress.initial_eval_loss,
            "best_eval_loss": progress.best_eval_loss,
            "train_seconds": progress.elapsed,
            "tokens_seen": float(progress.tokens_seen),
        }
        if progress.best_eval_loss is not None:
            values |= {"best_step": float(progress.best_step), "best_epoch": progress.best_epoch}
        return {name: value for name, value in values.items() if value is not None}

    def _say(self, phase: Phase, detail: str) -> None:
        self.inbox.line.say(Preparing(phase, detail))

    def _note(self, level: str, text: str) -> None:
        self.inbox.line.say(Note(level, text))
