"""Rows on disk: read, checked, and written down in TRL's shape, with a hash over all of them."""

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import msgspec
import xxhash
from datasets.arrow_writer import ArrowWriter

from agent.trainer import templates
from agent.trainer.checking import Checker
from agent.trainer.errors import TrainerError
from agent.trainer.readers import Row, open_rows, unreadable
from protocol.failures import FailureReason
from protocol.jobspec import DataFormat
from protocol.worker import Limits

Listen = Callable[[], None]
"""Called now and then; raises what ends the work."""

NUMBER = "row"
"""The column with a row's number in its file, by which the user knows it."""
LISTEN_EVERY = 256
"""Rows between two looks at what was ordered."""


@dataclass
class Table:
    """Rows on disk, in TRL's shape."""

    rows: datasets.Dataset
    format: DataFormat
    digest: str
    dropped: set[str] = field(default_factory=set)
    empty: list[int] = field(default_factory=list)


class _NeedsJson(Exception):
    """A row holds more than roles and contents, which the simple table has no columns for."""


@dataclass(frozen=True)
class Reading:
    """How rows are read, wherever they lie."""

    split: str
    wanted: DataFormat
    tokenizer: Any
    limits: Limits
    listen: Listen
    pairs: bool = False
    """Preference pairs are wanted, and nothing else."""

    def rows(self, source: str, folder: Path, *, streaming: bool = False) -> Iterator[Row]:
        """Yield the rows of ``source``, listening between them."""
        rows = open_rows(source, self.split, hub=self.limits.hub, cache=folder, streaming=streaming)
        for number, row in enumerate(rows):
            if number % LISTEN_EVERY == 0:
                self.listen()
            yield row

    def checker(self, source: str) -> Checker:
        return Checker(source, self.wanted, self.tokenizer, self.pairs)


def collect(
    read: Reading,
    source: str,
    limit: int | None,
    folder: Path,
    keep: Callable[[int], bool] = lambda place: True,
) -> Table:
    """Read, check and write down those of the first ``limit`` rows of ``source`` whose place ``keep`` takes."""
    if not source:
        raise TrainerError(FailureReason.DATA, "The job names no data set. Set its data path.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rich in (False, True):
            rows = (row for place, row in enumerate(islice(read.rows(source, folder), limit)) if keep(place))
            try:
                return _write(source, rows, read.checker(source), folder, rich)
            except _NeedsJson:
                continue
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise TrainerError(
                FailureReason.DISK_FULL, f"No space is left on the disk of {folder} for the rows of {source}."
            ) from exc
        raise unreadable(source, f"it cannot be prepared in {folder}: {exc.strerror or exc}.") from exc
    raise AssertionError("the table with JSON columns takes every row")


def _write(source: str, rows: Iterator[Row], checker: Checker, folder: Path, rich: bool) -> Table:
    """Write the canonical form of ``rows`` to an Arrow file, hashing on the way."""
    path = folder / ("rows-json.arrow" if rich else "rows.arrow")
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
            value[NUMBER] = row.number
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
    return Table(dataset, checker.format, digest, checker.dropped, checker.empty)


def _features(row: dict[str, Any], rich: bool) -> datasets.Features:
    """Return the columns for rows like ``row``; rich ones keep a turn's other keys, as JSON."""
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    turns = datasets.List(datasets.Json() if rich else turn)
    columns = {
        name: turns if isinstance(value, list) else datasets.Value("string")
        for name, value in row.items()
        if name != "tools"
    }
    columns[NUMBER] = datasets.Value("int64")
    if rich:
        columns["tools"] = datasets.Value("string")
    return datasets.Features(columns)


def _is_rich(row: dict[str, Any]) -> bool:
    conversations = templates.conversations_of(row)
    return bool(conversations) and (
        "tools" in row or any(len(turn) > 2 for turns in conversations for turn in turns)
    )
