"""The order `Check`: a job looked at from end to end, and measured where its model is cut short. Nothing is kept."""

import math
import statistics
from typing import Any

import datasets
import msgspec
from datasets.exceptions import DatasetGenerationError
from transformers import AutoConfig

from agent.trainer import (
    data,
    determinism,
    estimate,
    healing,
    memory,
    meter,
    methods,
    probe,
    settings,
    sizes,
    templates,
)
from agent.trainer.data import Prepared
from agent.trainer.errors import TrainerError
from agent.trainer.formula import Rows
from agent.trainer.inbox import Inbox, Leaving
from agent.trainer.model import Precision, choose_precision, load_tokenizer
from protocol.failures import FailureReason
from protocol.jobspec import JobSpec
from protocol.worker import Check, Estimate, Estimated, Left, Limits, Note, Phase, Preparing, Workspace

SAMPLE = 512
"""Rows whose tokens are counted to know how long they are."""


def check(order: Check, line: Any) -> int:
    """Say what the job would need; return the exit code. Raises TrainerError for a job that cannot be trained."""
    inbox = Inbox(line)
    try:
        line.say(Estimated(_look(order, inbox)))
    except Leaving as leaving:
        line.say(Left(leaving.why, 0))
    finally:
        data.discard(order.spec, order.workspace)
    line.flush(60.0)
    return 0


def _look(order: Check, inbox: Inbox) -> Estimate:
    spec, space, limits = order.spec, order.workspace, order.limits

    def note(level: str, text: str) -> None:
        inbox.line.say(Note(level, text))

    determinism.apply(spec)
    memory.apply_cap(limits)
    methods.trainer_class(spec.method)
    tokenizer = load_tokenizer(spec, space, limits)
    inbox.line.say(Preparing(Phase.CHECK, "Checking every row of the data set."))
    prepared = data.prepare(spec, space, tokenizer, limits, note, inbox.leave_if_told)
    if idle := settings.in_vain(spec, held_out=prepared.eval is not None):
        note("warning", idle)
    precision = choose_precision(spec, limits, note)
    config = config_of(spec, space, limits)
    sample = _sample(prepared)
    lengths = _lengths(tokenizer, sample)
    rows = rows_of(spec, prepared, lengths)
    planned = sizes.planned(spec, precision, config, remote_code=_remote(spec, limits))

    def told(probed: probe.Probed | None) -> Estimate:
        return estimate.estimate(
            spec,
            space,
            limits,
            config=config,
            precision=precision,
            sizes=planned,
            rows=rows,
            baseline=meter.resident(),
            probed=probed,
        )

    by_formula = told(None)
    if not by_formula.fits:
        # A probe of what does not fit could take the machine's last memory.
        note("info", "The job does not fit by calculation, so that no step was measured.")
        return by_formula
    inbox.leave_if_told()
    inbox.line.say(Preparing(Phase.LOAD, "Measuring a step on the first layers of the model."))
    by_length = [row for _, row in sorted(zip(lengths, sample, strict=True), key=lambda one: -one[0])]
    try:
        probed = _probe(order, precision, tokenizer, prepared, by_length, sum(lengths), rows, config)
    except (RuntimeError, MemoryError, OSError) as error:
        if not healing.is_out_of_memory(error):
            raise
        note("warning", f"There was no memory for a step on the first layers: {healing.words_of(error)}")
        return msgspec.structs.replace(by_formula, fits=False)
    return told(probed)


def config_of(spec: JobSpec, workspace: Workspace, limits: Limits) -> Any:
    """Return the model's configuration. Raises TrainerError."""
    try:
        return AutoConfig.from_pretrained(
            workspace.model,
            revision=spec.model.revision,
            trust_remote_code=_remote(spec, limits),
            local_files_only=not limits.hub,
        )
    except (OSError, ValueError, KeyError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TrainerError(
            FailureReason.MODEL, f"The model in {workspace.model} cannot be loaded: {first}"
        ) from error


def rows_of(spec: JobSpec, prepared: Prepared, lengths: list[int]) -> Rows:
    """Return what is known of the rows, from the tokens of some."""
    training = spec.training
    cut = [min(length, training.max_length) for length in lengths]
    count, mean, longest = prepared.rows, statistics.fmean(cut), max(cut)
    if training.packing:
        # Nothing is cut off: what is too long goes on in the next sequence.
        count = math.ceil(count * statistics.fmean(lengths) / training.max_length)
        mean, longest = float(training.max_length), training.max_length
    step = training.batch_size * training.gradient_accumulation_steps
    steps = training.max_steps or math.ceil(math.ceil(count / step) * training.epochs)
    return Rows(count, len(prepared.eval) if prepared.eval is not None else 0, longest, mean, steps)


def _probe(
    order: Check,
    precision: Precision,
    tokenizer: Any,
    prepared: Prepared,
    longest: list[dict[str, Any]],
    tokens: int,
    rows: Rows,
    config: Any,
) -> probe.Probed:
    """Measure a micro-batch of the longest rows that were looked at, which have so many tokens together."""
    spec = order.spec
    wanted = spec.training.batch_size
    if spec.training.packing:
        wanted = math.ceil((wanted + 1) * spec.training.max_length * len(longest) / tokens)
    chosen = [longest[at % len(longest)] for at in range(min(wanted, max(prepared.rows, len(longest))))]
    train = datasets.Dataset.from_list(chosen, features=_features(prepared))
    try:
        return probe.probe(
            spec,
            order.workspace,
            order.limits,
            precision=precision,
            tokenizer=tokenizer,
            rows=train,
            assistant_only=prepared.assistant_only,
            evaluates=rows.held_out > 0,
            config=config,
        )
    except (DatasetGenerationError, StopIteration, IndexError) as error:
        raise TrainerError(
            FailureReason.DATA,
            f"The longest rows have no token to learn from within max_length ({spec.training.max_length}): "
            "their prompts alone fill it. Raise training.max_length.",
        ) from error


def _sample(prepared: Prepared) -> list[dict[str, Any]]:
    """Return rows that are spread over the data, or a stream's first ones."""
    if prepared.source is not None:
        return list(prepared.train.take(SAMPLE))
    apart = max(1, len(prepared.train) // SAMPLE)
    return [prepared.train[at] for at in range(0, len(prepared.train), apart)][:SAMPLE]


def _features(prepared: Prepared) -> Any:
    return getattr(prepared.train, "features", None)


def _lengths(tokenizer: Any, sample: list[dict[str, Any]]) -> list[int]:
    """Return the tokens of each row; of a pair, of its longer side."""
    cover = templates.coverage(tokenizer, False, sample[:1])
    return [templates.count_tokens(tokenizer, row, cover) for row in sample]


def _remote(spec: JobSpec, limits: Limits) -> bool:
    return spec.model.trust_remote_code and limits.remote_code
