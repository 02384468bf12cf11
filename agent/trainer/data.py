"""From a data set to what TRL trains on: every row checked, held-out rows cut off, the result told apart by a hash."""

import errno
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import msgspec
import numpy
import xxhash
from datasets.arrow_writer import ArrowWriter

from agent.trainer import formats, templates
from agent.trainer.errors import TrainerError
from agent.trainer.formats import BadRow
from agent.trainer.readers import Row, open_rows, unreadable
from protocol.failures import FailureReason
from protocol.jobspec import DataFormat, JobSpec
from protocol.worker import Limits, Workspace

Note = Callable[[str, str], None]
"""Takes a level (info or warning) and a sentence for the user."""

Listen = Callable[[], None]
"""Called now and then; raises what ends the work."""

COUNTED = 1000
"""Rows whose tokens are counted to warn of long ones; all of them would cost as much as tokenising twice."""
LISTED = 32
"""Bad rows that are looked for before giving up."""
LISTEN_EVERY = 256
"""Rows between two looks at what was ordered."""
SHAPES = 4096
"""Different sequences of roles that are rendered once each, to find the row a template cannot take."""


@dataclass(frozen=True)
class Prepared:
    """What a trainer is given, and what is said of it."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    format: DataFormat
    assistant_only: bool
    facts: dict[str, str]
    fingerprint: str
    """xxh3-128 of every row and of the template: other data has another one."""


@dataclass
class _Table:
    """Rows on disk, in TRL's shape."""

    rows: datasets.Dataset
    format: DataFormat
    digest: str
    dropped: set[str] = field(default_factory=set)
    empty: list[int] = field(default_factory=list)


class _NeedsJson(Exception):
    """A row holds more than roles and contents, which the simple table has no columns for."""


def prepare(
    spec: JobSpec,
    workspace: Workspace,
    tokenizer: Any,
    limits: Limits,
    note: Note,
    listen: Listen = lambda: None,
) -> Prepared:
    """Return the job's rows, checked and split.

    ``tokenizer`` gets the job's chat template, if it names one. The rows lie in the workspace's
    cache until `discard`. Raises TrainerError, whose sentence names the row.
    """
    origin = templates.set_template(tokenizer, spec.tokenizer.chat_template)
    discard(spec, workspace)
    folder = _folder(spec, workspace)
    data = spec.data
    read = _Reading(data.split, data.format, tokenizer, limits, listen)
    table = _collect(read, workspace.data, data.max_samples, folder / "train")
    _tell(table, workspace.data, note)
    train, held_out = table.rows, None
    digests = [table.digest]
    if workspace.eval_data:
        if workspace.eval_data == workspace.data:
            raise unreadable(
                workspace.data,
                "it is given both to train and to evaluate on. Use eval_fraction to hold rows out.",
            )
        other = _collect(read, workspace.eval_data, None, folder / "eval")
        _tell(other, workspace.eval_data, note)
        if set(other.rows.column_names) - {"tools"} != set(table.rows.column_names) - {"tools"}:
            raise unreadable(
                workspace.eval_data,
                f"the evaluation rows are {other.format}, but the training rows are {table.format}. Use one format.",
            )
        if data.eval_fraction:
            note("info", "The evaluation data is used as it is; no share of the training rows is held out.")
        held_out = other.rows
        digests.append(other.digest)
    elif data.eval_fraction:
        train, held_out = _split(table.rows, data.eval_fraction, spec.training.seed, workspace.data)

    cover = templates.coverage(tokenizer, spec.training.assistant_only_loss, _spread(train, 8))
    if cover.warning:
        note("warning", cover.warning)
    if templates.turns_of(train[0]) is None:
        templates.require_end(tokenizer)
    if not spec.training.packing:
        _warn_of_long_rows(train, tokenizer, cover, spec.training.max_length, note)
    hasher = xxhash.xxh3_128(cover.template.encode())
    hasher.update("\n".join(digests).encode())
    facts = {
        "data_format": str(table.format),
        "loss_on": cover.loss_on,
        "chat_template": origin if cover.template else "not used",
        "train_rows": str(len(train)),
        "eval_rows": str(len(held_out) if held_out is not None else 0),
        "data_fingerprint": hasher.hexdigest(),
    }
    return Prepared(train, held_out, table.format, cover.assistant_only, facts, hasher.hexdigest())


def discard(spec: JobSpec, workspace: Workspace) -> None:
    """Remove what `prepare` and TRL's tokenising have left in the cache for this job.

    Nothing in it is used again: after a power cut a half-written table could not be told from a
    whole one, and making it anew costs less than a wrong row.
    """
    shutil.rmtree(_folder(spec, workspace), ignore_errors=True)


def _folder(spec: JobSpec, workspace: Workspace) -> Path:
    return Path(workspace.cache) / f"rows-{spec.job_id}"


@dataclass(frozen=True)
class _Reading:
    """How rows are read, wherever they lie."""

    split: str
    wanted: DataFormat
    tokenizer: Any
    limits: Limits
    listen: Listen

    def heard(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yield the rows, listening between them."""
        for number, row in enumerate(rows):
            if number % LISTEN_EVERY == 0:
                self.listen()
            yield row


def _collect(read: _Reading, source: str, limit: int | None, folder: Path) -> _Table:
    """Read, check and write down the rows of ``source``."""
    if not source:
        raise TrainerError(FailureReason.DATA, "The job names no data set. Set its data path.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rich in (False, True):
            rows = read.heard(open_rows(source, read.split, hub=read.limits.hub, cache=folder))
            try:
                return _write(source, islice(rows, limit), read.wanted, read.tokenizer, folder, rich)
            except _NeedsJson:
                continue
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise TrainerError(
                FailureReason.DISK_FULL, f"No space is left on the disk of {folder} for the rows of {source}."
            ) from exc
        raise unreadable(source, f"it cannot be prepared in {folder}: {exc.strerror or exc}.") from exc
    raise AssertionError("the table with JSON columns takes every row")


def _write(
    source: str, rows: Iterator[Row], wanted: DataFormat, tokenizer: Any, folder: Path, rich: bool
) -> _Table:
    """Write the canonical form of ``rows`` to an Arrow file, hashing on the way."""
    path = folder / ("rows-json.arrow" if rich else "rows.arrow")
    checker = _Checker(source, wanted, tokenizer)
    hasher = xxhash.xxh3_128()
    encode = msgspec.json.Encoder().encode
    writer: ArrowWriter | None = None
    features: datasets.Features | None = None
    count = 0
    try:
        for row in rows:
            value = checker.check(row)
            if value is None:
                continue
            if writer is None or features is None:
                features = _features(value, rich)
                writer = ArrowWriter(path=str(path), features=features)
            if not rich and _is_rich(value):
                raise _NeedsJson
            count += 1
            hasher.update(encode(value))
            hasher.update(b"\n")
            if rich:
                value = features.encode_example({name: value.get(name) for name in features})
            writer.write(value)
        checker.finish(count)
        if writer is not None:
            writer.finalize()
    finally:
        if writer is not None:
            writer.close()
    digest = hasher.hexdigest()
    table = datasets.table.MemoryMappedTable.from_file(str(path))
    dataset = datasets.Dataset(arrow_table=table, fingerprint=digest[:16])
    return _Table(dataset, checker.format, digest, checker.dropped, checker.empty)


def _features(row: dict[str, Any], rich: bool) -> datasets.Features:
    """Return the columns for rows like ``row``; rich ones keep a turn's other keys, as JSON."""
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    turns = datasets.List(datasets.Json() if rich else turn)
    columns = {
        name: turns if isinstance(value, list) else datasets.Value("string")
        for name, value in row.items()
        if name != "tools"
    }
    if rich:
        columns["tools"] = datasets.Value("string")
    return datasets.Features(columns)


def _is_rich(row: dict[str, Any]) -> bool:
    turns = templates.turns_of(row)
    return turns is not None and ("tools" in row or any(len(turn) > 2 for turn in turns))


class _Checker:
    """Turns read rows into canonical ones, and remembers what was wrong with which."""

    def __init__(self, source: str, wanted: DataFormat, tokenizer: Any) -> None:
        self.format = wanted
        self.dropped: set[str] = set()
        self.empty: list[int] = []
        self._source = source
        self._told = wanted is not DataFormat.AUTO
        self._tokenizer = tokenizer
        self._chat = bool(templates.template_of(tokenizer))
        self._shapes: set[tuple[str, ...]] = set()
        self._columns: tuple[str, ...] = ()
        self._first: Row | None = None
        self._bad: list[tuple[Row, str]] = []
        self._seen = 0

    def check(self, row: Row) -> dict[str, Any] | None:
        """Return the canonical form of ``row``, or None if it is left out."""
        self._seen += 1
        try:
            value = self._canonical(row)
        except BadRow as exc:
            self._bad.append((row, str(exc)))
            if len(self._bad) >= LISTED:
                self._raise_bad()
            return None
        if self.format is DataFormat.TEXT and not value["text"].strip():
            self.empty.append(row.number)
            return None
        return value

    def finish(self, count: int) -> None:
        """Raise if any row was bad, or none is left."""
        if self._bad:
            self._raise_bad()
        if self._seen == 0:
            raise unreadable(self._source, "the data set is empty: it has no rows.")
        if count == 0:
            raise unreadable(self._source, f"every one of its {self._seen} rows is empty text.")

    def _raise_bad(self) -> None:
        row, why = self._bad[0]
        numbers = [bad.number for bad, _ in self._bad]
        more = ""
        if len(numbers) > 1:
            count = f"at least {len(numbers)}" if len(numbers) >= LISTED else str(len(numbers))
            listed = ", ".join(map(str, numbers[:8])) + (" and on" if len(numbers) > 8 else "")
            more = f" ({count} rows are bad: {listed}.)"
        raise TrainerError(FailureReason.DATA, f"{self._source}, {row.where}: {why}{more}", rows=numbers)

    def _canonical(self, row: Row) -> dict[str, Any]:
        if not isinstance(row.value, dict):
            raise BadRow(f"it is not an object with columns. Accepted are {formats.SHAPES}.")
        self._settle(row)
        value = formats.canonical(row.value, self.format, self._chat)
        self.dropped |= row.value.keys() - formats.USED[self.format]
        columns = tuple(name for name in value if name != "tools")
        self._columns = self._columns or columns
        if columns != self._columns:
            raise BadRow(
                f"it becomes {' and '.join(columns)}, but the rows before become {' and '.join(self._columns)}."
            )
        self._check_text(value)
        self._check_render(value)
        return value

    def _settle(self, row: Row) -> None:
        """Choose the format by the first row, and hold every other row to it."""
        if self._told:
            if not formats.has_columns(row.value, self.format):
                raise BadRow(formats.wrong_columns(row.value, self.format))
        elif self._first is None:
            form = formats.detect(row.value)
            if form is None:
                raise unreadable(self._source, formats.wrong_columns(row.value), row=row.number)
            self.format, self._first = form, row
        elif not formats.has_columns(row.value, self.format):
            other = formats.detect(row.value)
            found = ", ".join(sorted(map(str, row.value))) or "none"
            raise BadRow(
                f"it is {other or 'of no known shape'} (columns: {found}), but {self._first.where} is "
                f"{self.format}. A data set has one format: convert the odd rows, or remove them."
            )
        if self._told and self._first is None:
            self._first = row
        if self.format in (DataFormat.MESSAGES, DataFormat.SHAREGPT) and not self._chat:
            templates.require_template(self._tokenizer, self._source, str(self.format))

    def _check_text(self, value: dict[str, Any]) -> None:
        try:
            msgspec.json.encode(value)
        except UnicodeEncodeError as exc:
            raise BadRow("its text is not valid UTF-8 (a broken character). Save the file as UTF-8.") from exc

    def _check_render(self, value: dict[str, Any]) -> None:
        """Render the first row of each sequence of roles: templates refuse by sequence, not by content."""
        turns = templates.turns_of(value)
        if turns is None or len(self._shapes) >= SHAPES:
            return
        shape = tuple("+".join([turn["role"], *list(turn)[2:]]) for turn in turns)
        shape += ("tools",) if "tools" in value else ()
        if shape in self._shapes:
            return
        self._shapes.add(shape)
        if why := templates.render_failure(self._tokenizer, value):
            self._shapes.discard(shape)
            raise BadRow(why)


def _tell(table: _Table, source: str, note: Note) -> None:
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


def _spread(rows: datasets.Dataset, count: int) -> list[dict[str, Any]]:
    """Return up to ``count`` rows, evenly spaced."""
    step = max(1, len(rows) // count)
    return [rows[index] for index in range(0, len(rows), step)][:count]


def _warn_of_long_rows(
    rows: datasets.Dataset, tokenizer: Any, cover: templates.Coverage, max_length: int, note: Note
) -> None:
    """Say how many rows are cut at ``max_length``."""
    sample = _spread(rows, COUNTED)
    long = sum(templates.count_tokens(tokenizer, row, cover) > max_length for row in sample)
    if long:
        seen = (
            f"{len(rows)} rows"
            if len(sample) == len(rows)
            else f"{len(sample)} of the {len(rows)} rows looked at"
        )
        note(
            "warning",
            f"{long} of {seen} are longer than max_length={max_length} tokens and are cut there. "
            "Raise max_length, or turn packing on, which cuts nothing off.",
        )
