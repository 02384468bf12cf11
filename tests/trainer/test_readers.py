"""What a data set on disk is read as, and what is said of one that cannot be read."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agent.trainer import readers
from agent.trainer.errors import TrainerError
from agent.trainer.readers import open_rows
from protocol.failures import FailureReason

ROWS = [{"prompt": "one, two", "completion": "drei\nvier"}, {"prompt": "äöü", "completion": "x"}]


def read(path: Path | str, split: str = "train", hub: bool = False) -> list[Any]:
    cache = Path(path).parent / "cache" if Path(path).is_absolute() else Path("nowhere")
    return [row.value for row in open_rows(str(path), split, hub=hub, cache=cache)]


def refusal(path: Path | str, split: str = "train", hub: bool = False) -> str:
    with pytest.raises(TrainerError) as caught:
        read(path, split, hub)
    return str(caught.value)


def as_jsonl() -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode() + b"\n"


def as_csv() -> bytes:
    return 'prompt,completion\n"one, two","drei\nvier"\näöü,x\n'.encode()


def as_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue())


KINDS: dict[str, Callable[[], bytes]] = {
    "jsonl": as_jsonl,
    "jsonl with a byte-order mark and blank lines": lambda: (
        b"\xef\xbb\xbf\n" + as_jsonl().replace(b"\n", b"\r\n\r\n")
    ),
    "array": lambda: json.dumps(ROWS).encode(),
    "pretty array": lambda: json.dumps(ROWS, indent=2).encode(),
    "examples": lambda: json.dumps({"examples": ROWS}).encode(),
    "pretty data": lambda: json.dumps({"data": ROWS}, indent=2).encode(),
    "object over lines that begin with braces": lambda: (
        b'{"examples": [\n' + b",\n".join(json.dumps(row).encode() for row in ROWS) + b"\n]}"
    ),
    "csv": as_csv,
    "parquet": as_parquet,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_kind_is_told_by_its_bytes_and_not_by_its_name(tmp_path: Path, kind: str, packed: bool) -> None:
    content = KINDS[kind]()
    path = tmp_path / "upload.bin"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read(path) == ROWS


def test_a_gzip_that_is_named_jsonl_is_read(tmp_path: Path) -> None:
    path = tmp_path / "train_dataset.jsonl"
    path.write_bytes(gzip.compress(as_jsonl()))
    assert read(path) == ROWS


def test_a_saved_dataset_and_its_split(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert read(tmp_path / "one") == ROWS
    assert read(tmp_path / "two", "test") == ROWS[1:]
    assert "no split 'dev'. It has: train, test" in refusal(tmp_path / "two", "dev")


def test_a_folder_of_shards_is_read_in_order_and_by_split(tmp_path: Path) -> None:
    for name, row in (("train-0.jsonl", ROWS[0]), ("train-1.jsonl", ROWS[1]), ("test-0.jsonl", ROWS[0])):
        (tmp_path / name).write_text(json.dumps(row))
    (tmp_path / "README.md").write_text("no data")
    assert read(tmp_path) == ROWS
    assert read(tmp_path, "test") == ROWS[:1]
    assert [row.where for row in open_rows(str(tmp_path), "train", hub=False, cache=tmp_path)][1] == (
        "train-1.jsonl row 1"
    )
    assert "no file is named after the split 'dev'" in refusal(tmp_path, "dev")
    (tmp_path / "empty").mkdir()
    assert "holds no data file" in refusal(tmp_path / "empty")


def test_a_row_is_numbered_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.number for row in open_rows(str(path), "train", hub=False, cache=tmp_path)] == [1, 3]


def test_csv_cells_that_are_empty_are_null(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt;completion\na;\n")
    assert read(path) == [{"prompt": "a", "completion": None}]


BAD: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", "a.jsonl: the file is empty. Accepted are JSONL"),
    "bad line": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "b"\n{"text": "c"}\n',
        "a.jsonl, row 2: not valid JSON at column 13: Expecting ',' delimiter. Correct or remove the line.",
    ),
    "bad first line": ("a.bin", b'{"text": a}\n{"text": "b"}\n', "a.bin, row 1: not valid JSON at column 10"),
    "not json": ("a.jsonl", b"hello\n", "a.jsonl, row 1: it begins with b'hello"),
    "bad document": (
        "a.json",
        b'[\n {"text": "a"},\n {"text": }\n]',
        "a.json: not valid JSON at line 3, column 11",
    ),
    "utf-8": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl, row 2: not UTF-8 at byte 11"),
    "utf-16": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "the text is UTF-16. Save it as UTF-8."),
    "cut gzip": (
        "a.gz",
        gzip.compress(b'{"text": "abc"}\n' * 50)[:-9],
        "the gzip file is damaged or cut off",
    ),
    "cut parquet": ("a.parquet", as_parquet()[:-20], "the Parquet file is damaged or cut off"),
    "csv cells": (
        "a.csv",
        b"text\na\nb,c\n",
        "a.csv, row 2: 2 cells where the header has 1 columns (line 3)",
    ),
    "csv quotes": ("a.csv", b'text\n"a"b\n', "a.csv, row 1: not valid CSV near line 2"),
    "unknown": ("a.pdf", b"%PDF-1.7 some bytes", "of a kind that is not known. Accepted are JSONL"),
    "too deep": ("a.jsonl", b'{"a":' * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_cannot_be_read_is_named_with_the_place(tmp_path: Path, case: str) -> None:
    name, content, sentence = BAD[case]
    (tmp_path / name).write_bytes(content)
    assert sentence in refusal(tmp_path / name)
    assert str(tmp_path / name) in refusal(tmp_path / name)


def test_a_bad_line_is_evidence(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{\n')
    with pytest.raises(TrainerError) as caught:
        read(tmp_path / "a.jsonl")
    assert caught.value.reason is FailureReason.DATA
    assert caught.value.rows == [2]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.jsonl") == (
        f"{tmp_path / 'none.jsonl'}: there is no such file or folder. "
        "Check the job's data path and the agent's DATASETS_DIR."
    )


def test_a_small_file_cannot_inflate_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_INFLATED", 1 << 20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 200_000))
    assert path.stat().st_size < 20_000
    assert "it inflates to more than" in refusal(path)


def test_a_line_has_a_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE", 1 << 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "b" * (1 << 20) + '"}\n')
    assert "a.jsonl, row 2: the line is longer than 1 MiB." in refusal(path)


def test_a_hub_name_needs_the_owners_word() -> None:
    with pytest.raises(TrainerError) as caught:
        read("someone/something", hub=False)
    assert caught.value.reason is FailureReason.PERMISSION
    assert "does not allow the Hub" in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    sentence = refusal("someone/something", hub=True)
    assert sentence.startswith("Hub data set 'someone/something': it cannot be loaded:")
    assert "Check the name, the split 'train'" in sentence
