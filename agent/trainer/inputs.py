"""What must be the same for a checkpoint to be gone on from exactly. The libraries check none of it.

Every difference is found by its mark (`agent.trainer.fingerprints`). One that no training can bridge is always
refused; one that would make another run of it is refused unless the user has said that it may be; the rest is
noted. What was accepted is put in force here: the libraries restore the old values without a word.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec
from transformers import TrainerCallback

from agent.trainer.checkpoint import Found
from agent.trainer.errors import TrainerError
from agent.trainer.fingerprints import versions
from agent.trainer.progress import Progress
from protocol.failures import FailureReason
from protocol.jobspec import DataSpec, JobSpec, LoraSpec, TrainingSpec
from protocol.worker import Parameters

Note = Callable[[str, str], None]


class Weight(Enum):
    """What a difference means."""

    NEVER = 1
    """The checkpoint does not fit."""
    WORD = 2
    """It becomes another run: only if the user says so."""
    NOTED = 3
    """The steps stay the same, or differ in their last digits."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not as it was when the checkpoint was saved."""

    name: str
    what: str
    """A clause: what was, what is."""
    weight: Weight = Weight.WORD
    then: str = ""
    """A clause: what becomes of it if it is accepted."""


NOT_THE_STEPS = frozenset({
    "logging_steps", "save_steps", "save_total_limit", "eval_batch_size", "eval_strategy", "eval_steps",
    "early_stopping_patience", "early_stopping_threshold", "metric_for_best", "load_best_at_end",
    "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory", "deterministic",
    "on_bad_loss", "spike_factor", "max_rewinds", "gradient_checkpointing",
})  # fmt: skip
"""Settings that leave what a step computes as it is."""
ORDER = frozenset(("max_length", "packing", "group_by_length", "assistant_only_loss", "seed"))
"""Settings with which the rows come in another order, or as other sequences."""
BATCH = frozenset(("batch_size", "gradient_accumulation_steps"))
SHAPE = frozenset(("epochs", "max_steps", "warmup_steps", "warmup_ratio", "lr_scheduler_type"))
"""Settings of the learning rate's course."""
HELD = frozenset(("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"))
"""Settings that an optimizer's saved state brings back."""
SAME_STATE = ({"adamw_torch", "adamw_torch_fused"},)
"""Optimizers that can read one another's state."""
SOFT_LORA = frozenset(("alpha", "dropout"))
"""What of an adapter can change while its weights keep their meaning."""
COMPUTES = frozenset(
    ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "bitsandbytes", "code")
)
"""What a step's figures come from. The agent's own number is noted: its training code has a mark of its own."""
FRESH = "it begins with no state of its own, as at the start of a run"
HOW = (
    "Put the old back, or say that the changes are meant: resume with accept_changes "
    "(`training-agent retry JOB --accept-changes`). To keep this run as it is, branch from the checkpoint instead."
)


def differences(found: Found, spec: JobSpec, marks: dict[str, str]) -> list[Difference]:
    """Return everything that is not as it was."""
    saved = found.manifest.inputs
    missing = sorted(marks.keys() - saved.keys())
    if missing:
        told = f"it was saved by an agent that kept no mark of: {', '.join(missing)}"
        return [Difference("marks", told, then="they are taken as they are now"), *_of_versions(found, spec)]
    try:
        before = msgspec.json.decode(saved["spec"], type=JobSpec)
    except msgspec.DecodeError as error:
        told = f"it was saved by another version of the agent, whose settings this one cannot read ({error})"
        return [Difference("spec", told, Weight.NEVER)]
    return [
        *_of_model(before, spec, saved, marks),
        *_of_data(before.data, spec.data, saved, marks),
        *_of_training(before.training, spec.training),
        *_of_versions(found, spec),
    ]


def _of_model(
    before: JobSpec, now: JobSpec, saved: dict[str, str], marks: dict[str, str]
) -> list[Difference]:
    told: list[Difference] = []
    if before.method is not now.method:
        told.append(Difference("method", f"the method was {before.method} and is {now.method}", Weight.NEVER))
    if saved["weights"] != marks["weights"]:
        told.append(
            Difference(
                "model",
                f"the base model is another ({_was(before.model.name, now.model.name)})",
                Weight.NEVER,
            )
        )
    for name in ("dtype", "quantization"):
        old, new = getattr(before.model, name), getattr(now.model, name)
        if old != new:
            told.append(Difference(f"model.{name}", f"model.{name} {_was(old, new)}", Weight.NEVER))
    if before.tokenizer.padding_side != now.tokenizer.padding_side:
        what = f"tokenizer.padding_side {_was(before.tokenizer.padding_side, now.tokenizer.padding_side)}"
        told.append(Difference("padding_side", what, then="it holds from here on"))
    if (before.lora is None) is not (now.lora is None):
        kinds = ("a full fine-tuning", "an adapter's training")
        old, new = kinds if before.lora is None else kinds[::-1]
        told.append(Difference("lora", f"the run was {old} and is {new}", Weight.NEVER))
    elif before.lora is not None and now.lora is not None:
        for name in LoraSpec.__struct_fields__:
            old, new = getattr(before.lora, name), getattr(now.lora, name)
            if old != new:
                weight = Weight.WORD if name in SOFT_LORA else Weight.NEVER
                told.append(
                    Difference(
                        f"lora.{name}", f"lora.{name} {_was(old, new)}", weight, "it holds from here on"
                    )
                )
    if saved["precision"] != marks["precision"] and not any(one.name == "model.dtype" for one in told):
        told.append(
            Difference(
                "precision",
                f"the precision {_was(saved['precision'], marks['precision'])}",
                then="the next steps are computed in the new one",
            )
        )
    if before.method == now.method and before.dpo != now.dpo:
        for name in before.dpo.__struct_fields__:
            old, new = getattr(before.dpo, name), getattr(now.dpo, name)
            if old != new:
                told.append(
                    Difference(f"dpo.{name}", f"dpo.{name} {_was(old, new)}", then="it holds from here on")
                )
    return told


def _of_data(
    before: DataSpec, now: DataSpec, saved: dict[str, str], marks: dict[str, str]
) -> list[Difference]:
    anew = "training goes on with the new, from the beginning of the epoch"
    told: list[Difference] = []
    if saved["tokenizer"] != marks["tokenizer"]:
        told.append(
            Difference(
                "tokenizer",
                "the tokenizer has another vocabulary, other merges or other special tokens",
                then=anew,
            )
        )
    if saved["template"] != marks["template"]:
        told.append(Difference("template", "the chat template is another", then=anew))
    if saved["rows"] != marks["rows"]:
        told.append(Difference("rows", "the data set has other rows", then=anew))
    if saved["eval_rows"] != marks["eval_rows"]:
        then = "evaluations are made on the new rows from here on"
        told.append(Difference("eval_rows", "the evaluation's data set has other rows", then=then))
    for name in ("eval_fraction", "max_samples", "split", "format", "streaming"):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            # What the first rows are shows in their mark; how many are held out does not.
            weight = Weight.WORD if name in ("eval_fraction", "streaming") else Weight.NOTED
            told.append(Difference(f"data.{name}", f"data.{name} {_was(old, new)}", weight, anew))
    return told


def _of_training(before: TrainingSpec, now: TrainingSpec) -> list[Difference]:
    told: list[Difference] = []
    for name in TrainingSpec.__struct_fields__:
        old, new = getattr(before, name), getattr(now, name)
        if old == new:
            continue
        weight, then = Weight.WORD, "it holds from here on"
        if name in NOT_THE_STEPS:
            weight = Weight.NOTED
        elif name == "optim":
            if not any({old, new} <= same for same in SAME_STATE):
                then = FRESH
        elif name == "learning_rate":
            then = "it is put in force at the next step, and the schedule keeps its shape"
        elif name in SHAPE:
            then = "the learning rate is from here on what it were had it been so from the start"
        elif name in ORDER:
            then = "the rows come anew, from the beginning of the epoch"
        elif name in BATCH:
            then = "training goes on with the next row, so many at a time"
        told.append(Difference(f"training.{name}", f"training.{name} {_was(old, new)}", weight, then))
    return told


def _of_versions(found: Found, spec: JobSpec) -> list[Difference]:
    saved, now = found.manifest.versions, versions()
    unused = {
        "peft": spec.lora is None,
        "bitsandbytes": spec.model.quantization is None and "bit" not in spec.training.optim,
    }
    told: list[Difference] = []
    for name, new in now.items():
        old = saved.get(name)
        if old == new or old is None or unused.get(name):
            continue
        weight = Weight.WORD if name in COMPUTES else Weight.NOTED
        what = "the agent's training code is another" if name == "code" else f"{name} {_was(old, new)}"
        told.append(Difference(f"version.{name}", what, weight, "results may differ in their last digits"))
    return told


def _was(old: Any, new: Any) -> str:
    return f"was {_word(old)} and is {_word(new)}"


def _word(value: Any) -> str:
    if isinstance(value, msgspec.Struct):
        return msgspec.json.encode(value).decode()
    return str(value)


@dataclass
class Accepted:
    """What of a resumed run has to be put in force, because its checkpoint brings back the old."""

    training: TrainingSpec
    names: set[str] = field(default_factory=set)
    learning_rate: float | None = None
    """The peak to set; None: nothing of the learning rate has changed."""
    fresh_optimizer: bool = False
    """The checkpoint's is another one, whose state the new one cannot read."""
    note: Note = lambda level, text: None

    @property
    def needed(self) -> bool:
        return self.learning_rate is not None or bool(HELD & self.names)


def check(
    found: Found, spec: JobSpec, marks: dict[str, str], progress: Progress, note: Note, *, accept: bool
) -> Accepted:
    """Compare, and say, refuse or accept. Raises TrainerError.

    ``progress`` is brought to what was accepted. A job that branches off is meant to be other than the one that
    it begins with, so its changes are as good as accepted.
    """
    name, branch = found.path.name, _branches(found, spec)
    told = differences(found, spec, marks)
    never = [one for one in told if one.weight is Weight.NEVER]
    if never:
        raise _refuse(
            f"The checkpoint {name} does not fit this job: {_listed(never)}. "
            "Put the old back, or submit the job as a new one that begins with the base model."
        )
    by_word = [one for one in told if one.weight is Weight.WORD]
    if by_word and not (accept or branch):
        raise _refuse(f"Not all is as it was when the checkpoint {name} was saved: {_listed(by_word)}. {HOW}")
    for one in told:
        if one.weight is Weight.NOTED:
            note("warning", f"{_sentence(one.what)} since the checkpoint {name}.")
        else:
            note("info" if branch else "warning", f"{_sentence(one.what)}: accepted; {one.then}.")
    names = {one.name.removeprefix("training.") for one in told if one.name.startswith("training.")}
    anew = _place(progress, {one.name for one in told}, names, spec)
    if branch:
        _begin_branch(progress)
    # Where the epochs are given, another number of steps in them is another course of the learning rate.
    stretched = spec.training.max_steps is None and (anew or bool(names & BATCH))
    fresh = any(one.then == FRESH for one in told)
    rate = _learning_rate(progress, spec, names, stretched or fresh)
    return Accepted(spec.training, names, rate, fresh, note)


def _branches(found: Found, spec: JobSpec) -> bool:
    """Tell whether the checkpoint is that of the job branched from. Raises TrainerError if it is a stranger's."""
    owner = found.manifest.job_id
    if owner == spec.job_id:
        return False
    if spec.branch is not None and owner == spec.branch.job_id:
        return True
    raise _refuse(
        f"The checkpoint {found.path} was made by the job {owner}, not by {spec.job_id}. To begin with it, submit "
        f'a job with "branch": {{"job_id": "{owner}", "checkpoint": "{found.path.name}"}}.'
    )


def _place(progress: Progress, told: set[str], names: set[str], spec: JobSpec) -> bool:
    """Bring the place in the data, and the live parameters, to what was changed.

    Return whether the rows come anew.
    """
    place = progress.place
    other_rows = told & {"tokenizer", "template", "rows", "data.eval_fraction", "data.streaming"}
    lengths_by_batch = spec.training.group_by_length and names & BATCH
    anew = bool(other_rows or names & ORDER or lengths_by_batch)
    if anew:
        place.rows = place.stream_rows = 0
        place.digest = ""
        place.order += 1
    if names & BATCH:
        place.micro = place.step_rows = 0
    if "eval_batch_size" in names:
        progress.eval_batch = 0
    if "metric_for_best" in names or told & {"eval_rows", "rows", "data.eval_fraction"}:
        _forget_best(progress)
    # A setting that was changed by hand goes before the one that was set while the job ran.
    undone = {name: None for name in Parameters.__struct_fields__ if name in names}
    progress.parameters = msgspec.structs.replace(progress.parameters, **undone)
    return anew


def _begin_branch(progress: Progress) -> None:
    """Leave behind what was the other job's alone: its end, its best, and its evaluation still to do."""
    progress.ended = ""
    progress.owed = None
    _forget_best(progress)


def _forget_best(progress: Progress) -> None:
    """Count the best evaluation anew: what was measured by another metric or on other rows is no measure."""
    progress.best_value = progress.best_eval_loss = None
    progress.best_step, progress.best_epoch = 0, 0.0
    progress.without_improvement = 0


def _learning_rate(progress: Progress, spec: JobSpec, names: set[str], stretched: bool) -> float | None:
    if "learning_rate" in names:
        return spec.training.learning_rate
    if stretched or names & SHAPE:
        return progress.parameters.learning_rate or spec.training.learning_rate
    return None


def _listed(told: list[Difference]) -> str:
    return "; ".join(one.what for one in told)


def _sentence(clause: str) -> str:
    return (
        clause
        if clause.startswith(("training.", "data.", "lora.", "model.", "dpo."))
        else clause[0].upper() + clause[1:]
    )


class PutInForce(TrainerCallback):  # type: ignore[misc]
    """Lets accepted values win over those that came back with the optimizer and the scheduler."""

    def __init__(self, accepted: Accepted) -> None:
        self._accepted = accepted

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        accepted, training = self._accepted, self._accepted.training
        groups = kwargs["optimizer"].param_groups
        for number, group in enumerate(groups):
            if "betas" in group:
                group["betas"] = (training.adam_beta1, training.adam_beta2)
                group["eps"] = training.adam_epsilon
            if "weight_decay" in accepted.names and number == 0:
                # The second group holds what is never decayed: biases and norms.
                group["weight_decay"] = training.weight_decay
        if accepted.learning_rate is not None:
            before = kwargs["lr_scheduler"]._last_lr[0]
            self._set_rate(kwargs["lr_scheduler"], groups, accepted.learning_rate)
            now = groups[0]["lr"]
            if now != before:
                told = (
                    f"The learning rate goes from {before:.4g} to {now:.4g} after step {state.global_step}."
                )
                accepted.note("info", told)
        return control

    def _set_rate(self, scheduler: Any, groups: list[dict[str, Any]], peak: float) -> None:
        rates = [peak * shape(scheduler.last_epoch) for shape in scheduler.lr_lambdas]
        scheduler.base_lrs = [peak for _ in rates]
        scheduler._last_lr = rates
        for group, rate in zip(groups, rates, strict=True):
            group["initial_lr"], group["lr"] = peak, rate


def _refuse(sentence: str) -> TrainerError:
    return TrainerError(FailureReason.CHECKPOINT, sentence)
