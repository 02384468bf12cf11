"""What goes to the backend fits, is readable, and arrives whatever a trainer says."""

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.outbox import LINES, PROSE, WORD, Points, admit, chunks, cut, lean, schema_of
from protocol.codec import Codec, decode_record
from protocol.failures import ADVICE, Evidence, Failure, FailureReason
from protocol.fields import MAX_FRAME, MAX_RECORD
from protocol.messages import SUBPROTOCOL_JSON
from protocol.records import (
    AnyRecord,
    Checkpoint,
    CommandDone,
    Figures,
    JobFacts,
    JobStatus,
    LogChunk,
    Notice,
    ParametersApplied,
    Point,
    Result,
    Schema,
)
from protocol.worker import Metrics, Parameters
from tests.protocol.golden import RECORDS

WIDE = "\U0001f642"
"""Four bytes in UTF-8."""


def kept(record: AnyRecord) -> Any:
    body = admit(record)
    assert len(body) <= MAX_RECORD
    return decode_record(body)


def status(**fields: Any) -> JobStatus:
    return JobStatus(1.0, 2, "failed", **fields)


# Points


def test_a_schema_goes_ahead_of_the_first_point_that_uses_it() -> None:
    points = Points()
    first = points.records("j", 1, Metrics(1, 0.1, 5.0, {"train_loss": 2.0, "grad_norm": 1.0}, "improving"))
    assert [type(record) for record in first] == [Schema, Point]
    schema, point = first
    assert isinstance(schema, Schema)
    assert isinstance(point, Point)
    assert dict(zip(schema.names, point.values, strict=True)) == {"train_loss": 2.0, "grad_norm": 1.0}
    assert (point.schema_id, point.step, point.time, point.trend) == (schema.schema_id, 1, 5.0, "improving")
    # The same names in another order are the same schema; another job's stream has not seen it.
    second = points.records("j", 1, Metrics(2, 0.2, 6.0, {"grad_norm": 3.0, "train_loss": 4.0}))
    assert [type(record) for record in second] == [Point]
    assert dict(zip(schema.names, second[0].values, strict=True)) == {"train_loss": 4.0, "grad_norm": 3.0}  # type: ignore[union-attr]
    assert len(points.records("k", 1, Metrics(1, 0.1, 5.0, {"train_loss": 2.0, "grad_norm": 1.0}))) == 2
    assert len(points.records("j", 1, Metrics(3, 0.2, 6.0, {"eval_loss": 3.0}))) == 2


def test_a_schemas_id_follows_from_its_names() -> None:
    assert schema_of(["b", "a"]) == schema_of(["a", "b"])
    assert schema_of(["a"]).schema_id != schema_of(["b"]).schema_id


# Admission


@pytest.mark.parametrize("record", RECORDS.values(), ids=list(RECORDS))
def test_a_usual_record_is_admitted_as_it_is(record: AnyRecord) -> None:
    assert kept(record) == record


def test_a_number_that_is_none_is_admitted() -> None:
    figures = kept(Figures(1.0, {"a": math.nan, "b": math.inf}))
    assert math.isnan(figures.values["a"])


def test_a_long_text_keeps_its_two_ends() -> None:
    text = "begin" + "x" * 100_000 + "end"
    short = cut(text, 100)
    assert len(short) <= 110
    assert short.startswith("begin")
    assert short.endswith("end")
    assert "characters left out" in short
    assert cut("short", 100) == "short"


@pytest.mark.parametrize("letter", ["x", WIDE, "\x1b"])
def test_a_failure_with_all_its_evidence_fits(letter: str) -> None:
    big = letter * 1_000_000
    evidence = Evidence(traceback=big, log_tail=[big] * 100, rows=list(range(100_000)))
    record = status(
        detail=big, failure=Failure(reason=FailureReason.DATA, sentence=big, advice="a", evidence=evidence)
    )
    got = kept(record)
    assert isinstance(got, JobStatus)
    assert got.failure is not None
    assert got.failure.evidence is not None
    assert got.failure.evidence.traceback
    assert len(got.failure.evidence.log_tail) == 50
    # And a JSON session can carry it as well.
    assert Codec(SUBPROTOCOL_JSON).length(admit(record)) < MAX_FRAME - 512


def test_a_state_arrives_whatever_hangs_on_it() -> None:
    worst = Failure(reason=FailureReason.DATA, sentence="x", advice="y" * 1_000_000)
    got = kept(status(failure=worst))
    assert isinstance(got, JobStatus)
    assert got.failure == Failure(reason=FailureReason.DATA, sentence="x", advice=ADVICE[FailureReason.DATA])
    # A path that is no text, in a sentence of ours.
    half = kept(
        status(
            detail="cannot read /data/\udcff.txt",
            failure=Failure(reason=FailureReason.DATA, sentence="\udcff"),
        )
    )
    assert isinstance(half, JobStatus)
    assert half.detail == "cannot read /data/?.txt"
    assert half.failure is not None
    assert half.failure.sentence == "?"


def test_a_state_that_must_be_small_keeps_what_happened() -> None:
    cause = Failure(reason=FailureReason.DATA, sentence=WIDE * 2000, evidence=Evidence(traceback="t" * 9000))
    body = admit(status(detail=WIDE * 2000, failure=cause))
    for room in (20_000, 3584):
        less = lean(body, lambda record, room=room: len(record) <= room)  # type: ignore[misc]
        assert less is not None
        assert len(less) <= room
        got = decode_record(less)
        assert isinstance(got, JobStatus)
        assert (got.state, got.attempt) == ("failed", 2)
        assert got.failure is not None
        assert (got.failure.reason, got.failure.evidence) == (FailureReason.DATA, None)
        assert got.failure.sentence.startswith(WIDE * 100)
    assert lean(body, lambda _: False) is None
    assert lean(admit(Notice(1.0, "info", "x" * 2000)), lambda _: True) is None
    assert lean(b"\xc1", lambda _: True) is None


@pytest.mark.parametrize(
    "record",
    [
        Notice(1.0, "warning", "x" * 1_000_000),
        Checkpoint(1.0, 2, "c" * 1_000_000, 3, 1.0, 4, 0.1, "schedule"),
        ParametersApplied(1.0, 2, 3, Parameters(), "x" * 1_000_000),
        CommandDone(1.0, "c", "refused", "x" * 1_000_000),
        JobFacts(
            1.0,
            2,
            3,
            1.0,
            0,
            1,
            0,
            1,
            1,
            0.1,
            facts={f"{number}{'n' * 900}": "v" * 9000 for number in range(90)},
        ),
        Result(1.0, 2, "/m", "", "h", 3, {}, [{"prompt": WIDE * 100_000, "before": "b"}] * 40),
        status(detail="x" * 1_000_000, failure=Failure(reason=FailureReason.DATA, sentence="x" * 1_000_000)),
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_record_that_is_too_long_is_cut_and_stays_what_it_is(record: AnyRecord) -> None:
    assert type(kept(record)) is type(record)


@pytest.mark.parametrize(
    "record",
    [
        Schema(1, ["n" * 300]),
        Schema(1, [str(number) for number in range(600)]),
        Figures(1.0, {"n" * 300: 1.0}),
        Point(1.0, 2, 3, 0.1, 1, [1.0] * 600),
        Checkpoint(1.0, 2, "c", 3, 1.0, 4, 0.1, "r" * 300),
        Notice(1.0, "warning", "half \ud800"),
        LogChunk(1.0, 2, 0, ["x" * 200_000]),
        JobFacts(1.0, 2, 2**70, 1.0, 0, 1, 0, 1, 1, 0.1),
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_record_that_nobody_could_read_becomes_a_sentence(record: AnyRecord) -> None:
    got = kept(record)
    assert isinstance(got, Notice)
    assert got.text.startswith(f"A report of the kind {type(record).__name__} could not be sent: ")
    assert got.time == getattr(record, "time", 0.0)


# Logs


def whole(parts: list[LogChunk]) -> list[str]:
    return [line for part in parts for line in part.lines]


def test_a_short_chunk_is_one_record() -> None:
    chunk = LogChunk(1.0, 2, 100, ["a", "b"], 3)
    assert chunks(chunk) == [chunk]
    assert chunks(LogChunk(1.0, 2, 100, [])) == [LogChunk(1.0, 2, 100, [])]


def test_a_long_chunk_is_cut_between_lines_and_each_part_knows_its_place() -> None:
    chunk = LogChunk(1.0, 2, 100, ["a" * 30, "ü" * 30, "c" * 30], 3)
    parts = chunks(chunk, limit=40)
    assert whole(parts) == chunk.lines
    assert [part.offset for part in parts] == [100, 131, 192]
    assert [part.dropped for part in parts] == [3, 0, 0], "what was left out is told once"


def test_many_short_lines_are_cut_too() -> None:
    parts = chunks(LogChunk(1.0, 2, 0, [""] * (2 * LINES + 1)))
    assert [len(part.lines) for part in parts] == [LINES, LINES, 1]


@given(st.lists(st.integers(0, 3 * PROSE), max_size=6), st.sampled_from(["x", WIDE, "\x00", '"']))
@settings(max_examples=40, deadline=None, database=None)
def test_whatever_is_printed_its_records_are_admitted_in_either_encoding(
    lengths: list[int], letter: str
) -> None:
    as_json = Codec(SUBPROTOCOL_JSON)
    for part in chunks(LogChunk(1.0, 2, 0, [letter * length for length in lengths])):
        body = admit(part)
        assert isinstance(decode_record(body), LogChunk)
        assert as_json.length(body) < MAX_FRAME - 512


def test_limits_leave_room() -> None:
    assert WORD * 4 < 64 * 1024
    assert msgspec.msgpack.encode(Notice(0.0, "info", WIDE * PROSE)).__len__() < MAX_RECORD
