"""From a data set to what TRL trains on: every row checked, held-out rows cut off, the result told apart by a hash."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import msgspec
import numpy
import xxhash

from agent.trainer import settings, templates
from agent.trainer.checking import NoRows
from agent.trainer.errors import TrainerError
from agent.trainer.readers import unreadable
from agent.trainer.streaming import HELD_OUT_AMONG, Source, holds_out
from agent.trainer.tables import NUMBER, Listen, Reading, Table, collect
from protocol.failures import FailureReason
from protocol.jobspec import DataFormat, JobSpec, Method
from protocol.worker import Limits, Workspace

Note = Callable[[str, str], None]
"""Takes a level (info or warning) and a sentence for the user."""

COUNTED = 1000
"""Rows whose tokens are counted to warn of long ones; all of them would cost as much as tokenising twice."""


@dataclass(frozen=True)
class Prepared:
    """What a trainer is given, and what is said of it."""

    train: datasets.Dataset | datasets.IterableDataset
    eval: datasets.Dataset | None
    format: DataFormat
    assistant_only: bool
    facts: dict[str, str]
    fingerprint: str
    """xxh3-128 of the template and of every row, or of a stream's first rows: other data has another one."""
    chat: bool = False
    """The rows are conversations, so that a prompt belongs into the chat template."""
    rows: int = 0
    """Rows to train on; 0 for a stream, which does not know."""
    source: Source | None = None
    """Of a stream."""
    digests: tuple[str, ...] = ()
    """Of the training rows, and of the evaluation's where they come from elsewhere; without the template."""


@dataclass
class _Training:
    """The side that is trained on."""

    rows: datasets.Dataset | datasets.IterableDataset
    sample: list[dict[str, Any]]
    """Some rows, spread over all of them; of a stream the first ones."""
    format: DataFormat
    digest: str
    count: int
    held_out: datasets.Dataset | None = None
    source: Source | None = None


def prepare(
    spec: JobSpec,
    workspace: Workspace,
    tokenizer: Any,
    limits: Limits,
    note: Note,
    listen: Listen = lambda: None,
) -> Prepared:
    """Return the job's rows, checked and split; those of a stream are checked when they come.

    ``tokenizer`` gets the job's chat template, if it names one. The rows lie in the workspace's
    cache until `discard`. Raises TrainerError, whose sentence names the row.
    """
    settings.check(spec)
    origin = templates.set_template(tokenizer, spec.tokenizer.chat_template)
    discard(spec, workspace)
    folder, data = _folder(spec, workspace), spec.data
    read = Reading(data.split, data.format, tokenizer, limits, listen, pairs=spec.method is Method.DPO)
    if not workspace.data:
        raise TrainerError(FailureReason.DATA, "The job names no data set. Set its data path.")
    fraction = data.eval_fraction
    if workspace.eval_data:
        if workspace.eval_data == workspace.data:
            raise unreadable(
                workspace.data,
                "it is given both to train and to evaluate on. Use eval_fraction to hold rows out.",
            )
        fraction = 0.0
    cut = _stream if data.streaming else _table
    training = cut(read, spec, workspace.data, folder, fraction, note)
    held_out, digests = training.held_out, [training.digest]
    if workspace.eval_data:
        other = collect(read, workspace.eval_data, None, folder / "eval")
        _tell(other, workspace.eval_data, note)
        if set(other.rows.column_names) - {"tools"} != set(training.sample[0]) - {"tools"}:
            raise unreadable(
                workspace.eval_data,
                f"the evaluation rows are {other.format}, but the training rows are {training.format}. "
                "Use one format.",
            )
        if data.eval_fraction:
            note("info", "The evaluation data is used as it is; no share of the training rows is held out.")
        held_out = other.rows
        digests.append(other.digest)

    cover = templates.coverage(tokenizer, spec.training.assistant_only_loss, _spread(training.sample, 8))
    if cover.warning:
        note("warning", cover.warning)
    chat = templates.turns_of(training.sample[0]) is not None
    if not chat:
        templates.require_end(tokenizer)
    if not spec.training.packing:
        _warn_of_long_rows(training, tokenizer, cover, spec.training.max_length, note)
    hasher = xxhash.xxh3_128(cover.template.encode())
    hasher.update("\n".join(digests).encode())
    facts = {
        "data_format": str(training.format),
        "loss_on": cover.loss_on,
        "chat_template": origin if cover.template else "not used",
        "train_rows": "streamed" if training.source is not None else str(training.count),
        "eval_rows": str(len(held_out) if held_out is not None else 0),
        "data_fingerprint": hasher.hexdigest(),
    }
    return Prepared(
        training.rows,
        held_out,
        training.format,
        cover.assistant_only,
        facts,
        hasher.hexdigest(),
        chat,
        training.count,
        training.source,
        tuple(digests),
    )


def _table(read: Reading, spec: JobSpec, source: str, folder: Path, fraction: float, note: Note) -> _Training:
    """Write all rows down before training, and hold the share ``fraction`` out."""
    table = collect(read, source, spec.data.max_samples, folder / "train")
    _tell(table, source, note)
    train, held_out = table.rows, None
    if fraction:
        train, held_out = _split(train, fraction, spec.training.seed, source)
    return _Training(train, _spread(train, COUNTED), table.format, table.digest, len(train), held_out)


def _stream(
    read: Reading, spec: JobSpec, source: str, folder: Path, fraction: float, note: Note
) -> _Training:
    """Look at the first rows alone; write down only those that are held out."""
    data, seed = spec.data, spec.training.seed
    chosen = holds_out(fraction, seed)
    rows = Source(
        read, source, folder / "train", limit=data.max_samples, seed=seed, held_out=chosen, note=note
    )
    head = rows.head()
    hasher = xxhash.xxh3_128()
    for row in head:
        hasher.update(msgspec.json.encode({name: value for name, value in row.items() if name != NUMBER}))
        hasher.update(b"\n")
    held_out = None
    if fraction:
        within = min(data.max_samples or HELD_OUT_AMONG, HELD_OUT_AMONG)
        try:
            held_out = collect(read, source, within, folder / "eval", chosen).rows
        except NoRows as none:
            raise unreadable(
                source,
                f"eval_fraction {fraction:g} holds none of its first rows out. Raise it, or give evaluation data.",
            ) from none
        note(
            "info",
            f"Of streamed rows, those held out are chosen among the first {HELD_OUT_AMONG}: {len(held_out)} rows.",
        )
    return _Training(rows.rows(), head, rows.format, hasher.hexdigest(), 0, held_out, rows)


def discard(spec: JobSpec, workspace: Workspace) -> None:
    """Remove what `prepare` and TRL's tokenising have left in the cache for this job.

    Nothing in it is used again: after a power cut a half-written table could not be told from a
    whole one, and making it anew costs less than a wrong row.
    """
    shutil.rmtree(_folder(spec, workspace), ignore_errors=True)


def _folder(spec: JobSpec, workspace: Workspace) -> Path:
    return Path(workspace.cache) / f"rows-{spec.job_id}"


def _tell(table: Table, source: str, note: Note) -> None:
    """Say what of the data set is not used."""
    if table.dropped:
        names = ", ".join(sorted(map(str, table.dropped)))
        note("info", f"Columns of {source} that {table.format} data has no use for are left out: {names}.")
    if table.empty:
        rows = ", ".join(map(str, table.empty[:8])) + (", ..." if len(table.empty) > 8 else "")
        note("warning", f"{len(table.empty)} rows of {source} are empty text and are left out (rows {rows}).")


def _split(
    rows: datasets.Dataset, fraction: float, seed: int, source: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return (training rows, held-out rows): disjoint, and the same for the same seed."""
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise unreadable(
            source,
            f"it has {len(rows)} rows; with eval_fraction {fraction:g} held out none is left to train on. "
            "Add rows or lower eval_fraction.",
        )
    chosen = numpy.random.default_rng(seed).permutation(len(rows))[:count]
    mask = numpy.zeros(len(rows), dtype=bool)
    mask[chosen] = True
    return rows.select(numpy.flatnonzero(~mask)), rows.select(numpy.flatnonzero(mask))


def _spread(rows: Any, count: int) -> list[dict[str, Any]]:
    """Return up to ``count`` rows, evenly spaced."""
    step = max(1, len(rows) // count)
    return [rows[index] for index in range(0, len(rows), step)][:count]


def _warn_of_long_rows(
    training: _Training, tokenizer: Any, cover: templates.Coverage, max_length: int, note: Note
) -> None:
    """Say how many rows are cut at ``max_length``."""
    sample = training.sample
    long = sum(templates.count_tokens(tokenizer, row, cover) > max_length for row in sample)
    if long:
        seen = (
            f"the first {len(sample)} rows"
            if training.source is not None
            else f"{len(sample)} rows"
            if len(sample) == training.count
            else f"{len(sample)} of the {training.count} rows looked at"
        )
        remedy = "Raise max_length" + (
            "." if "chosen" in sample[0] else ", or turn packing on, which cuts nothing off."
        )
        note(
            "warning",
            f"{long} of {seen} are longer than max_length={max_length} tokens and are cut there. {remedy}",
        )
