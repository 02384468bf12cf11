"""Bytes to messages and back, against a peer that may be broken, newer or hostile."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import inspect

import protocol
from protocol.codec import BadMessage, Codec, Unknown, decode_record, encode_record, number
from protocol.fields import MAX_FRAME
from protocol.messages import (
    SUBPROTOCOL_JSON,
    SUBPROTOCOL_MSGPACK,
    AgentMessage,
    Bye,
    Data,
    Desired,
    Heartbeat,
    HubMessage,
    Offer,
)
from protocol.records import AnyRecord, Figures, LogChunk, Point, Snapshot
from protocol.worker import Parameters
from tests.protocol.golden import FRAMES, RECORDS

PACKED, JSON = Codec(SUBPROTOCOL_MSGPACK), Codec(SUBPROTOCOL_JSON)
BOTH = pytest.mark.parametrize("codec", [PACKED, JSON], ids=["msgpack", "json"])


def test_a_subprotocol_of_others_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown subprotocol 'graphql-ws'"):
        Codec("graphql-ws")


@BOTH
def test_a_tag_of_the_future_is_unknown_and_nothing_else(codec: Codec) -> None:
    encode = msgspec.json.encode if codec.as_json else msgspec.msgpack.encode
    assert codec.decode_hub(encode([99, {"any": ["thing"]}, None])) == Unknown(99)
    assert codec.decode_agent(encode([-1])) == Unknown(-1)
    assert codec.decode_record(encode([30, 1.5])) == Unknown(30)
    # A tag of the other direction is unknown here too.
    assert codec.decode_hub(encode([1, "x"])) == Unknown(1)


@BOTH
@pytest.mark.parametrize(
    "tree", [[5], [5, "acks"], [6, "job", -1, "run"], [2, "s", []][:2], [6, "j", 1, "fly"]]
)
def test_a_known_message_with_wrong_fields_is_bad_and_names_its_tag(codec: Codec, tree: list[Any]) -> None:
    encode = msgspec.json.encode if codec.as_json else msgspec.msgpack.encode
    with pytest.raises(BadMessage, match=f"^message {tree[0]}: "):
        codec.decode_hub(encode(tree))


@BOTH
@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"hello", b"{}", b"[]", b'["x"]', b"\x90", b"[1,2", b"\xdd\xff\xff\xff\xff"]
)
def test_garbage_is_bad(codec: Codec, data: bytes) -> None:
    for decode in (codec.decode_hub, codec.decode_agent, codec.decode_record):
        with pytest.raises(BadMessage):
            decode(data)


def test_nesting_has_a_bottom() -> None:
    with pytest.raises(BadMessage):
        JSON.decode_hub(b"[" * 100_000)
    with pytest.raises(BadMessage):
        PACKED.decode_hub(b"\x91" * 100_000)
    with pytest.raises(BadMessage):
        PACKED.decode_hub(b"\x92\x63" + b"\x91" * 100_000)


def levels(kind: Any) -> int:
    """Return how deep a value of a type nests. Fails at a type that takes whatever comes."""
    assert not isinstance(kind, inspect.AnyType)
    match kind:
        case inspect.StructType(fields=fields):
            return 1 + max((levels(field.type) for field in fields), default=0)
        case inspect.UnionType(types=types):
            return max(map(levels, types))
        case inspect.DictType(value_type=item) | inspect.ListType(item_type=item):
            return 1 + levels(item)
        case inspect.VarTupleType(item_type=item):
            return 1 + levels(item)
        case inspect.TupleType(item_types=items):
            return 1 + max(map(levels, items))
    return 0


def test_the_types_bound_the_depth_of_what_is_built() -> None:
    """A record in DATA is read by itself, two levels down."""
    frames, records = (
        levels(inspect.type_info(AgentMessage | HubMessage)),
        levels(inspect.type_info(AnyRecord)),
    )
    said = (Path(protocol.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert f"of ours nests deeper than {max(frames, 2 + records)} levels" in said


@pytest.mark.parametrize(
    ("codec", "begin", "level", "end"),
    [
        (PACKED, b"\x94\x0f\xa1a\x00", b"\x91", b"\x01"),
        (JSON, b'[15,"a",0,', b"[", b"1"),
    ],
)
def test_depth_in_a_field_of_a_newer_peer_is_passed_over_or_refused(
    codec: Codec, begin: bytes, level: bytes, end: bytes
) -> None:
    def frame(deep: int) -> bytes:
        closed = b"]" * deep + b"]" if codec is JSON else b""
        return begin + level * deep + end + closed

    # The same as without it: nothing of it is built, however deep.
    assert codec.decode_agent(frame(100)) == Bye("a", 0.0)
    with pytest.raises(BadMessage, match="nested too deeply"):
        codec.decode_agent(frame(50_000))


@BOTH
def test_a_frame_has_a_limit(codec: Codec) -> None:
    beat = codec.encode(Heartbeat(1))
    assert codec.decode_agent(beat, limit=len(beat)) == Heartbeat(1)
    with pytest.raises(BadMessage, match=f"a frame of {len(beat)} bytes; the limit is {len(beat) - 1}"):
        codec.decode_agent(beat, limit=len(beat) - 1)
    with pytest.raises(BadMessage, match="the limit is 262144"):
        codec.decode_hub(b" " * (MAX_FRAME + 1))


def test_a_text_frame_is_read_as_json_and_its_bytes_are_counted() -> None:
    text = JSON.encode(FRAMES["Goaway"]).decode()
    assert JSON.decode_hub(text) == FRAMES["Goaway"]
    with pytest.raises(BadMessage, match="6 bytes"):
        JSON.decode_hub("üüü", limit=5)
    with pytest.raises(BadMessage):
        JSON.decode_hub('["\ud800"]')


def test_numbers_that_are_none_cross_json_as_words() -> None:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}
    stored = encode_record(Figures(1.0, values))
    frame = JSON.encode(Data(1, 1, [msgspec.Raw(stored)]))
    assert json.loads(frame)[3][0][2] == {"a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 1.5}
    data = JSON.decode_agent(frame)
    assert isinstance(data, Data)
    figures = JSON.decode_record(data.records[0])
    assert isinstance(figures, Figures)
    heard = {name: number(value) for name, value in figures.values.items()}
    assert math.isnan(heard.pop("a"))  # type: ignore[arg-type]
    assert heard == {"b": math.inf, "c": -math.inf, "d": 1.5}
    assert number(None) is None


def test_messagepack_leaves_records_as_the_journal_holds_them() -> None:
    stored = encode_record(RECORDS["Point"])
    assert stored in PACKED.encode(Data(1, 1, [msgspec.Raw(stored)]))


@BOTH
@pytest.mark.parametrize("record", RECORDS.values(), ids=list(RECORDS))
def test_the_length_of_a_record_is_what_it_adds_to_a_frame(codec: Codec, record: Any) -> None:
    stored = encode_record(record)
    one = len(codec.encode(Data(1, 1, [msgspec.Raw(stored)])))
    two = len(codec.encode(Data(1, 1, [msgspec.Raw(stored)] * 2)))
    assert codec.length(stored) == two - one


def test_a_job_with_the_largest_config_fits_one_frame() -> None:
    offer = Offer("x" * 131_072, "d" * 4096, "t" * 256)
    frame = Desired("j" * 128, 2**62, "run", offer, Parameters(learning_rate=1e-5), "c" * 4096, "r" * 4096)
    for codec in (PACKED, JSON):
        assert codec.decode_hub(codec.encode(frame)) == frame


def test_a_measured_value_of_another_word_is_refused() -> None:
    with pytest.raises(BadMessage):
        decode_record(b'[17,1.0,{"a":"nan"}]', as_json=True)
    with pytest.raises(BadMessage):
        decode_record(b'[17,1.0,{"a":"1.5"}]', as_json=True)


finite_or_not = st.floats(allow_nan=True, allow_infinity=True)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    st.one_of(
        st.builds(
            Point,
            time=st.floats(0, 2e9),
            attempt=st.integers(0, 100),
            step=st.integers(0, 2**40),
            epoch=st.floats(0, 100),
            schema_id=st.integers(0, 2**32),
            values=st.lists(st.none() | finite_or_not, max_size=8),
        ),
        st.builds(
            Snapshot,
            time=st.floats(0, 2e9),
            attempt=st.integers(0, 9),
            state=names,
            step=st.integers(0, 9),
            epoch=st.floats(0, 9),
            values=st.dictionaries(names, finite_or_not, max_size=5),
        ),
        st.builds(
            LogChunk,
            time=st.floats(0, 2e9),
            attempt=st.integers(0, 9),
            offset=st.integers(0, 2**40),
            lines=st.lists(names, max_size=5),
        ),
    )
)
@settings(max_examples=80, deadline=None, database=None)
def test_a_record_is_the_same_by_either_encoding(record: Any) -> None:
    def by_word(value: Any) -> Any:
        """Both spellings of a value that is no number become one."""
        return (
            json.dumps(msgspec.to_builtins(value), default=str)
            .replace('"NaN"', "NaN")
            .replace('"Infinity"', "Infinity")
            .replace('"-Infinity"', "-Infinity")
        )

    stored = encode_record(record)
    assert encode_record(decode_record(stored)) == stored  # type: ignore[arg-type]
    frame = JSON.decode_agent(JSON.encode(Data(1, 1, [msgspec.Raw(stored)])))
    assert isinstance(frame, Data)
    heard = JSON.decode_record(frame.records[0])
    if isinstance(record, LogChunk):
        assert heard == record
    else:
        assert by_word(heard) == by_word(record)


trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=15,
)


def never_anything_else(data: bytes) -> None:
    for codec in (PACKED, JSON):
        for decode in (codec.decode_hub, codec.decode_agent, codec.decode_record):
            try:
                decode(data)
            except BadMessage as error:
                assert str(error)


@given(st.binary(max_size=64))
@example(b"\xc1")
@example(b"[6," + b"9" * 400 + b"]")
@example(b"[1e999]")
@settings(max_examples=150, deadline=None, database=None)
def test_no_bytes_do_anything_but_decode_or_be_bad(data: bytes) -> None:
    never_anything_else(data)


@given(st.sampled_from([*range(1, 32), 99]), st.lists(trees, max_size=6))
@settings(max_examples=150, deadline=None, database=None)
def test_no_tree_does_anything_but_decode_or_be_bad(tag: int, fields: list[Any]) -> None:
    never_anything_else(msgspec.msgpack.encode([tag, *fields]))


@given(
    st.sampled_from(sorted(FRAMES)), st.integers(0, 10_000), st.binary(min_size=1, max_size=4), st.booleans()
)
@settings(max_examples=200, deadline=None, database=None)
def test_no_damage_to_a_frame_does_anything_but_decode_or_be_bad(
    name: str, at: int, patch: bytes, packed: bool
) -> None:
    body = (PACKED if packed else JSON).encode(FRAMES[name])
    at %= len(body)
    never_anything_else(body[:at] + patch + body[at + len(patch) :])
    never_anything_else(body[:at])
