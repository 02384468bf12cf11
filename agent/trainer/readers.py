"""Open the rows of a data set: what a file is is told by its bytes, never by its name alone."""

import csv
import errno
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec

from agent.trainer.errors import TrainerError
from protocol.codec import UNREADABLE
from protocol.failures import FailureReason

MAX_INFLATED = 20 << 30
"""Bytes that one gzip file may grow to."""
MAX_JSON = 2 << 30
"""Bytes of one JSON document; it is held in memory whole, where JSONL is not."""
MAX_LINE = 256 << 20
"""Bytes of one line of JSONL, or of one cell of CSV."""
GZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"
KNOWN_COLUMNS = frozenset(
    (
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "response",
        "prompt",
        "completion",
        "text",
        "chosen",
        "rejected",
    )
)
ACCEPTED = "JSONL, JSON, CSV or Parquet (each also gzipped), or a folder saved by `datasets`"
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_WRAPPERS = ("examples", "data", "rows")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read; ``number`` counts from 1 (for JSONL it is the line)."""

    number: int
    value: Any
    file: str = ""
    """Named when the data set has several files."""

    @property
    def where(self) -> str:
        """Return how a sentence names this row."""
        return f"{self.file} row {self.number}" if self.file else f"row {self.number}"


def unreadable(source: object, why: str, row: int | None = None) -> TrainerError:
    """Return the error of a data set that cannot be used."""
    where = f"{source}, row {row}" if row is not None else str(source)
    return TrainerError(FailureReason.DATA, f"{where}: {why}", rows=None if row is None else [row])


def open_rows(source: str, split: str, *, hub: bool, cache: Path, streaming: bool = False) -> Iterator[Row]:
    """Yield the rows of ``source``: an absolute path, or else the name of a Hub data set."""
    path = Path(source)
    if not path.is_absolute():
        return _hub_rows(source, split, hub, streaming)
    if not path.exists():
        raise unreadable(
            path, "there is no such file or folder. Check the job's data path and the agent's DATASETS_DIR."
        )
    if path.is_file():
        return _file_rows(path, "", cache)
    if not path.is_dir():
        raise unreadable(path, f"it is neither a file nor a folder. Accepted are {ACCEPTED}.")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_rows(path, split)
    return _folder_rows(path, split, cache)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the system's and gzip's errors about ``path`` into sentences."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as exc:
        raise unreadable(path, f"the gzip file is damaged or cut off ({exc}). Copy it again.") from exc
    except OSError as exc:
        if exc.errno == errno.ENOSPC:  # gzipped Parquet is inflated into the cache
            raise
        raise unreadable(path, f"it cannot be read: {exc.strerror or exc}.") from exc


class _Inflated(io.RawIOBase):
    """The bytes of a gzip file, up to a bound: a small file can hold more than the disk does."""

    def __init__(self, packed: IO[bytes], path: Path) -> None:
        self._stream = gzip.GzipFile(fileobj=packed)
        self._path = path
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        self._size += len(data)
        if self._size > MAX_INFLATED:
            raise unreadable(
                self._path, f"it inflates to more than {MAX_INFLATED >> 30} GiB. Split it, or use Parquet."
            )
        buffer[: len(data)] = data
        return len(data)


def _file_rows(path: Path, label: str, cache: Path) -> Iterator[Row]:
    with _reading(path), path.open("rb") as plain:
        packed = plain.read(2) == GZIP_MAGIC
        plain.seek(0)
        stream = io.BufferedReader(_Inflated(plain, path), 1 << 17) if packed else plain
        # One peek may return less than it could; the kinds are told apart by very few bytes.
        head = stream.peek(4096)[:4096]
        if not head:
            raise unreadable(path, f"the file is empty. Accepted are {ACCEPTED}.")
        if head.startswith(PARQUET_MAGIC):
            yield from _parquet_rows(_unpacked(stream, cache) if packed else path, path, label)
            return
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise unreadable(path, "the text is UTF-16. Save it as UTF-8.")
        start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
        if not start or start[:1] in (b"{", b"["):
            yield from _json_rows(stream, path, label, start[:1] == b"[")
        elif _suffix(path) in (".csv", ".tsv") or _csv_header(start) & KNOWN_COLUMNS:
            yield from _csv_rows(stream, path, label, start)
        elif _suffix(path) in (".jsonl", ".ndjson", ".json"):
            raise unreadable(path, f"it begins with {start[:20]!r}, which is not JSON.", row=1)
        else:
            raise unreadable(path, f"it is of a kind that is not known. Accepted are {ACCEPTED}.")


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _unpacked(stream: IO[bytes], cache: Path) -> Path:
    """Inflate a gzipped Parquet file, which must be read from its end."""
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / "inflated.parquet"
    with target.open("wb") as out:
        while chunk := stream.read(1 << 20):
            out.write(chunk)
    return target


def _json_rows(stream: IO[bytes], path: Path, label: str, array: bool) -> Iterator[Row]:
    """Yield the rows of JSONL, or of one JSON document over one line or many."""
    if array:
        yield from _document_rows(stream.read(MAX_JSON + 1), path, label)
        return
    lines = _lines(stream, path)
    number, first = next(lines, (0, b""))
    second = next(lines, None)
    is_jsonl = _suffix(path) in (".jsonl", ".ndjson") or (
        second is not None and (_is_json(first) or _is_json(second[1]))
    )
    if not first:
        return
    if not is_jsonl:
        rest = b"" if second is None else b"\n" * (second[0] - number) + second[1] + b"\n"
        # The blank lines go back in, so that the line an error names is the line of the file.
        document = b"\n" * (number - 1) + first + rest + stream.read(MAX_JSON + 1)
        yield from _document_rows(document, path, label)
        return
    if second is None and (rows := _wrapped(_parse(first, path, number))) is not None:
        yield from (Row(index, value, label) for index, value in enumerate(rows, 1))
        return
    yield Row(number, _parse(first, path, number), label)
    if second is not None:
        yield Row(second[0], _parse(second[1], path, second[0]), label)
    for number, line in lines:
        yield Row(number, _parse(line, path, number), label)


def _lines(stream: IO[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, each with its number."""
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise unreadable(path, f"the line is longer than {MAX_LINE >> 20} MiB.", row=number)
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line := line.rstrip():
            yield number, line


def _is_json(line: bytes) -> bool:
    try:
        msgspec.json.decode(line)
    except UNREADABLE:
        return False
    return True


def _parse(line: bytes, path: Path, number: int) -> Any:
    """Return the value on a line of JSONL."""
    try:
        return msgspec.json.decode(line)
    except UNREADABLE:
        pass  # The standard library accepts a little more (NaN), and says where the mistake is.
    try:
        return json.loads(line.decode())
    except json.JSONDecodeError as exc:
        raise unreadable(
            path, f"not valid JSON at column {exc.colno}: {exc.msg}. Correct or remove the line.", row=number
        ) from exc
    except UnicodeDecodeError as exc:
        raise unreadable(
            path, f"not UTF-8 at byte {exc.start + 1} of the line. Save the file as UTF-8.", row=number
        ) from exc
    except RecursionError as exc:
        raise unreadable(path, "the JSON is nested too deeply.", row=number) from exc


def _wrapped(value: Any) -> list[Any] | None:
    """Return the rows of {"examples": [...]} and its like; None if ``value`` is no such thing."""
    if isinstance(value, dict):
        for key in _WRAPPERS:
            rows = value.get(key)
            if isinstance(rows, list):
                return rows
    return None


def _document_rows(content: bytes, path: Path, label: str) -> Iterator[Row]:
    """Yield the rows of one JSON document."""
    if len(content) > MAX_JSON:
        raise unreadable(
            path,
            f"a JSON document of more than {MAX_JSON >> 30} GiB is too large to hold. Use JSONL or Parquet.",
        )
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as exc:
        raise unreadable(
            path, f"not valid JSON at line {exc.lineno}, column {exc.colno}: {exc.msg}."
        ) from exc
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        raise unreadable(path, f"not UTF-8 at line {line}. Save the file as UTF-8.") from exc
    except RecursionError as exc:
        raise unreadable(path, "the JSON is nested too deeply.") from exc
    rows = value if isinstance(value, list) else _wrapped(value)
    # A lone object is a data set of one row.
    for number, row in enumerate([value] if rows is None else rows, 1):
        yield Row(number, row, label)


def _csv_header(start: bytes) -> set[str]:
    line = start.split(b"\n", 1)[0].decode("utf-8", "replace")
    return {cell.strip().strip('"').lower() for cell in re.split(r"[,;\t]", line)}


def _csv_rows(stream: IO[bytes], path: Path, label: str, start: bytes) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header; an empty cell is null."""
    header = start.split(b"\n", 1)[0]
    delimiter = max(",;\t", key=lambda mark: header.count(mark.encode()))
    csv.field_size_limit(MAX_LINE)
    # Bytes that are not UTF-8 become lone surrogates here, so that the check of each row can name its row.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    number = 0
    try:
        columns = [name.strip() for name in next(reader, [])]
        for cells in reader:
            if not cells:
                continue
            number += 1
            if len(cells) != len(columns):
                raise unreadable(
                    path,
                    f"{len(cells)} cells where the header has {len(columns)} columns (line {reader.line_num}). "
                    "Put quotes round a cell that holds a comma or a line break.",
                    row=number,
                )
            yield Row(number, {name: cell or None for name, cell in zip(columns, cells, strict=True)}, label)
    except csv.Error as exc:
        raise unreadable(path, f"not valid CSV near line {reader.line_num}: {exc}.", row=number + 1) from exc
    finally:
        text.detach()


def _parquet_rows(parquet: Path, path: Path, label: str) -> Iterator[Row]:
    # Imported where it is used: a reader of JSONL need not wait for it.
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    try:
        with pq.ParquetFile(parquet) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(number, value, label)
    except pa.ArrowException as exc:
        raise unreadable(path, f"the Parquet file is damaged or cut off after row {number}: {exc}.") from exc


def _folder_rows(folder: Path, split: str, cache: Path) -> Iterator[Row]:
    """Yield the rows of every data file in a folder, or of those that are named after the split."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if _suffix(file) in _SUFFIXES and file.is_file() and not file.name.startswith(("dataset_info", "."))
    )
    if not files:
        raise unreadable(folder, f"the folder holds no data file. Accepted are {ACCEPTED}.")
    named = [file for file in files if re.match(rf"{re.escape(split)}\b|{re.escape(split)}[-_.]", file.name)]
    if not named and split != "train":
        found = ", ".join(file.name for file in files[:8])
        raise unreadable(folder, f"no file is named after the split {split!r}. Found: {found}.")
    for file in named or files:
        yield from _file_rows(file, str(file.relative_to(folder)) if len(named or files) > 1 else "", cache)


def _saved_rows(path: Path, split: str) -> Iterator[Row]:
    """Yield the rows of a folder written by `save_to_disk`."""
    import datasets
    import pyarrow as pa

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as exc:
        raise unreadable(path, f"the saved data set cannot be opened: {exc}. Save it again.") from exc
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise unreadable(path, f"it has no split {split!r}. It has: {', '.join(saved)}.")
        saved = saved[split]
    yield from _dataset_rows(saved)


def _hub_rows(name: str, split: str, allowed: bool, streaming: bool) -> Iterator[Row]:
    if not allowed:
        raise TrainerError(
            FailureReason.PERMISSION,
            f"The data set {name!r} is a name on the Hugging Face Hub, and the owner of this machine does not "
            "allow the Hub. Give a file under DATASETS_DIR instead.",
        )
    import datasets
    import httpx

    try:
        # Code from a data set is never run: this version of `datasets` has no switch for it any more.
        loaded = datasets.load_dataset(name, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, httpx.HTTPError) as exc:
        why = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise unreadable(
            f"Hub data set {name!r}",
            f"it cannot be loaded: {why}. Check the name, the split {split!r}, and the machine's access.",
        ) from exc
    yield from _dataset_rows(loaded)


def _dataset_rows(dataset: Any) -> Iterator[Row]:
    """Yield the rows of a `datasets` data set, leaving pictures and sound undecoded."""
    media = {"Image", "Audio", "Video", "Pdf"}
    if dataset.features is not None:  # a stream may not know them
        columns = [name for name, feature in dataset.features.items() if type(feature).__name__ not in media]
        dataset = dataset.select_columns(columns)
    for number, value in enumerate(dataset.with_format(None), 1):
        yield Row(number, value)
