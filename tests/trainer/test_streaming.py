"""Rows read while training: the same order again, bad ones named when they come, changed ones found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.trainer import streaming
from agent.trainer.errors import TrainerError
from agent.trainer.streaming import Source, Stream, holds_out
from agent.trainer.tables import Reading
from protocol.failures import FailureReason
from protocol.jobspec import DataFormat, LoraSpec, Method
from protocol.worker import Limits, Note, Pause, Ready
from tests.trainer.conftest import Jobs, chat_rows, curve, write_jsonl

Jsonl = Callable[..., Path]
STREAMED = {"streaming": True, "lora": LoraSpec(r=4, dropout=0.2)}


class Desk:
    """Opens streams, and keeps the notes."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.notes: list[str] = []

    def source(self, path: Path, *, limit: int | None = None, seed: int = 1, fraction: float = 0.0) -> Source:
        read = Reading("train", DataFormat.AUTO, self.tokenizer, Limits(hub=False), lambda: None)
        made = Source(
            read,
            str(path),
            self.folder / "cache",
            limit=limit,
            seed=seed,
            held_out=holds_out(fraction, seed),
            note=lambda level, text: self.notes.append(text),
        )
        made.peeking = False
        return made


@pytest.fixture
def desk(tmp_path: Path, tiny_tokenizer: Any) -> Desk:
    return Desk(tmp_path, tiny_tokenizer)


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"text": f"row {index}"} for index in range(count)]


def test_an_order_follows_seed_and_epoch_alone(desk: Desk, jsonl: Jsonl) -> None:
    path = jsonl(numbered(3000))
    first = desk.source(path)
    order = [row["text"] for row in first]
    assert sorted(order) == sorted(row["text"] for row in numbered(3000)), "each row comes once"
    assert order != [row["text"] for row in numbered(3000)]
    assert [row["text"] for row in first] == order
    assert [row["text"] for row in desk.source(path)] == order, "another process reads the same"
    assert [row["text"] for row in desk.source(path, seed=2)] != order
    first.epoch = 1
    assert [row["text"] for row in first] != order
    first.peeking = True
    assert next(iter(first))["text"] == "row 0"


def test_no_more_than_the_buffer_is_read_ahead(desk: Desk, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    lines = [json.dumps(row) for row in numbered(streaming.BUFFER + 2)]
    path.write_text("\n".join([*lines, "not JSON"]))
    rows = iter(desk.source(path))
    assert next(rows)
    assert next(rows)
    with pytest.raises(TrainerError, match=f"row {streaming.BUFFER + 3}"):
        next(rows)


def test_held_out_rows_are_never_trained_on(desk: Desk, jsonl: Jsonl, jobs: Jobs) -> None:
    chosen = holds_out(0.25, 1)
    rows = list(desk.source(jsonl(numbered(400)), fraction=0.25))
    held = {f"row {place}" for place in range(400) if chosen(place)}
    assert {row["text"] for row in rows} == {f"row {place}" for place in range(400)} - held
    assert 60 < len(held) < 140
    assert not any(holds_out(1.0, 1)(place) for place in range(streaming.HELD_OUT_AMONG, 30_000))
    line = jobs.run(eval_fraction=0.25, training={"max_steps": 1}, **STREAMED)
    ready = line.of(Ready)[0]
    held_out = sum(holds_out(0.25, 42)(place) for place in range(48))
    assert (ready.train_rows, ready.eval_rows) == (0, held_out)
    assert ready.facts["train_rows"] == "streamed"


def test_what_is_left_out_is_told_once(desk: Desk, jsonl: Jsonl) -> None:
    rows = [{"text": "a", "id": 1}, {"text": " "}, {"text": ""}, {"text": "b"}, {"text": "c"}]
    source = desk.source(jsonl(rows), limit=4)
    assert sorted(row["text"] for row in source) == sorted(row["text"] for row in source) == ["a", "b"]
    dropped, empty = desk.notes
    assert dropped.endswith("columns that text data has no use for are left out: id.")
    assert empty.endswith("row 2 is empty text; such rows are left out.")


def test_a_stream_without_a_row_to_train_on_is_refused(desk: Desk, jsonl: Jsonl) -> None:
    with pytest.raises(TrainerError, match="it has no rows to train on"):
        list(desk.source(jsonl(numbered(3)), fraction=1.0))
    with pytest.raises(TrainerError, match="none of its 2 rows holds anything"):
        list(desk.source(jsonl([{"text": " "}] * 2)))


def tokens(rows: list[list[int]]) -> Any:
    return [{"input_ids": ids} for ids in rows]


def test_a_digest_tells_what_has_been_read(desk: Desk, jsonl: Jsonl) -> None:
    source = desk.source(jsonl(numbered(3)))
    rows = [[1, 2], [3], [4, 5, 6]]
    stream = Stream(tokens(rows), source)
    assert stream.digest_at(0) == ""
    reader = iter(stream)
    next(reader)
    one = stream.digest_at(1)
    next(reader)
    two = stream.digest_at(2)
    assert len({"", one, two}) == 3
    assert stream.digest_at(1) == one
    assert stream.digest_at(3) == "", "not read yet"
    other = Stream(tokens([[1, 2], [3, 4], [5, 6]]), source)
    list(other)
    assert other.digest_at(1) == one
    assert other.digest_at(2) != two
    same = Stream(tokens(rows), source)
    same.expect(0, 2, two)
    assert len(list(same)) == 3
    for wrong in ([[1], [2, 3]], [[1, 2]]):  # another row, and one too few
        changed = Stream(tokens(wrong), source)
        changed.expect(0, 2, two)
        with pytest.raises(TrainerError, match="the first 2 rows of epoch 0 are not those"):
            list(changed)
    source.accepts_changes = True
    changed.expect(0, 2, two)
    list(changed)
    assert "That is meant" in desk.notes[-1]


CASES: dict[str, dict[str, Any]] = {
    "second epoch": {"training": {"batch_size": 4, "max_steps": 16}},
    "accumulated and evaluated": {
        "training": {
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
        },
        "eval_fraction": 0.2,
    },
    "packed": {"training": {"batch_size": 1, "packing": True}},
    "preference": {"method": Method.DPO, "training": {"batch_size": 2}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_paused_stream_goes_on_as_if_never_touched(case: str, jobs: Jobs, pair_file: Path) -> None:
    wanted = {**STREAMED, **CASES[case]}
    if wanted.get("method") is Method.DPO:
        wanted["rows"] = pair_file
    last = {"second epoch": 13}.get(case, 4)
    untouched = jobs.run("untouched", **wanted)
    jobs.run("paused", {last: [Pause()]}, **wanted)
    paused = jobs.line
    resumed = jobs.run("paused", attempt=2, **wanted)
    assert resumed.of(Ready)[0].start_step == last + 1
    assert curve(paused, resumed) == curve(untouched)
    assert resumed.last.weights_hash == untouched.last.weights_hash
    if case == "second epoch":
        assert untouched.points[16]["epoch"] > 1


def refused(jobs: Jobs, *args: Any, **changes: Any) -> TrainerError:
    with pytest.raises(TrainerError) as caught:
        jobs.run(*args, **changes)
    return caught.value


def test_a_bad_row_ends_the_job_when_it_comes(jobs: Jobs, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(streaming, "BUFFER", 4)
    monkeypatch.setattr(streaming, "HEAD", 8)
    rows = chat_rows(30)
    rows[19] = {"messages": [{"role": "user", "content": "alone"}]}
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    error = refused(jobs, rows=path, training={"batch_size": 2, "max_steps": 20}, **STREAMED)
    assert error.reason is FailureReason.DATA
    assert error.rows == [20]
    assert "row 20: the conversation has no assistant turn" in str(error)
    assert 5 <= max(jobs.line.points) <= 9, "the rows before it were trained on"


def test_rows_that_changed_behind_the_place_are_found(jobs: Jobs, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(streaming, "HEAD", 4)
    rows = chat_rows(48)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    jobs.run("job", {5: [Pause()]}, rows=path, **STREAMED)
    rows[30]["messages"][1]["content"] += " too"
    write_jsonl(path, rows)
    error = refused(jobs, "job", rows=path, attempt=2, **STREAMED)
    assert error.reason is FailureReason.CHECKPOINT
    assert "the first 24 rows of epoch 0 are not those that were trained on" in str(error)
    line = jobs.run("job", rows=path, attempt=2, accept_changes=True, **STREAMED)
    assert any("That is meant" in note.text for note in line.of(Note))


def test_other_first_rows_are_found_before_training(jobs: Jobs, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chat_rows(48))
    jobs.run("job", {5: [Pause()]}, rows=path, **STREAMED)
    write_jsonl(path, chat_rows(48, seed=5))
    error = refused(jobs, "job", rows=path, attempt=2, **STREAMED)
    assert error.reason is FailureReason.CHECKPOINT


def test_settings_that_cannot_go_with_a_stream_are_refused(jobs: Jobs, pair_file: Path) -> None:
    def sentence(training: dict[str, Any], **changes: Any) -> str:
        error = refused(jobs, training=training, **{**STREAMED, **changes})
        assert error.reason in (FailureReason.SPEC, FailureReason.DATA)
        return str(error)

    assert "training.max_steps must say when to end" in sentence({"max_steps": None})
    assert "training.group_by_length: rows that are streamed" in sentence({"group_by_length": True})
    assert "holds none of its first rows out" in sentence({}, eval_fraction=1e-6)
    assert "these are preference pairs" in sentence({}, rows=pair_file)
