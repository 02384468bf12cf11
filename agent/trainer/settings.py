"""A job's settings against one another, and against what this trainer can do; without rows, model or device."""

from importlib.util import find_spec

from agent.trainer.errors import TrainerError
from agent.trainer.preference import MEASURES
from protocol.failures import FailureReason
from protocol.jobspec import DataFormat, JobSpec, Method, TrainingSpec

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
BITSANDBYTES = (
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)
"""Optimizers of the package bitsandbytes.

The libraries know more. They need what a job cannot name (the target modules of GaLore and APOLLO), keep their
state out of checkpoints (LOMO, the layer-wise ones), or have weights of their own to evaluate with (schedule-free).
"""


def check(spec: JobSpec) -> None:
    """Raise TrainerError where settings contradict one another or cannot be followed here."""
    data, training = spec.data, spec.training
    pairs = spec.method is Method.DPO
    why = ""
    if pairs and data.format not in (DataFormat.AUTO, DataFormat.PREFERENCE):
        why = f"data.format: the method dpo trains on preference pairs, not on {data.format}. Set preference or auto."
    elif not pairs and data.format is DataFormat.PREFERENCE:
        why = f"data.format: preference pairs are for the method dpo, and the method is {spec.method}."
    elif pairs and training.packing:
        why = "training.packing: the two sides of a preference pair cannot be packed. Turn packing off."
    elif data.streaming and not training.max_steps:
        why = (
            "data.streaming: how many rows there are is not known while they are streamed, so training.max_steps "
            "must say when to end. Set it, or turn streaming off."
        )
    elif data.streaming and training.group_by_length:
        why = (
            "training.group_by_length: rows that are streamed cannot be grouped, as their lengths are not known "
            "beforehand. Turn it or data.streaming off."
        )
    elif _compares(training) and training.metric_for_best not in metrics(spec.method):
        why = (
            f"training.metric_for_best: an evaluation of {spec.method} has no measure {training.metric_for_best}; "
            f"it has {', '.join(metrics(spec.method))}."
        )
    else:
        why = _optimizer(training.optim)
    if why:
        raise TrainerError(FailureReason.SPEC, why)


def metrics(method: Method) -> tuple[str, ...]:
    """Return what an evaluation measures. DPO's perplexity is not shown, since its loss is no negative log-likelihood."""
    if method is Method.DPO:
        return ("eval_loss", *(f"eval_{name}" for name in MEASURES), "perplexity")
    return ("eval_loss", "perplexity")


def _compares(training: TrainingSpec) -> bool:
    """Tell whether the job evaluates by itself, or asks for what only an evaluation gives."""
    patient = training.early_stopping_patience is not None
    return training.eval_strategy != "no" or patient or training.load_best_at_end


def _optimizer(name: str) -> str:
    if name in BITSANDBYTES and find_spec("bitsandbytes") is None:
        return (
            f"training.optim: {name} is of the package bitsandbytes, which is not installed here. Install it where "
            "the agent is installed, or use adamw_torch."
        )
    if name not in OPTIMIZERS + BITSANDBYTES:
        known = ", ".join(OPTIMIZERS + BITSANDBYTES)
        return f"training.optim: this agent cannot train with {name}; it can with {known}."
    return ""


def in_vain(spec: JobSpec, *, held_out: bool) -> str:
    """Return a sentence on settings that will not act, "" where all do. ``held_out``: there is something to evaluate on."""
    training = spec.training
    evaluates = training.eval_strategy != "no"
    asked = {
        "eval_strategy": evaluates and not held_out,
        "metric_for_best": training.metric_for_best != "eval_loss",
        "early_stopping_patience": training.early_stopping_patience is not None,
        "load_best_at_end": training.load_best_at_end,
    }
    names = ", ".join(f"training.{name}" for name, is_set in asked.items() if is_set)
    if not names or (evaluates and held_out):
        return ""
    because = (
        "training.eval_strategy is no (only an evaluation on command counts)"
        if held_out
        else "no rows are held out to evaluate on (data.eval_fraction or data.eval_path)"
    )
    return f"Without effect, because {because}: {names}."
