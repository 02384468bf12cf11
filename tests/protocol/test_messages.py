"""Every message as it was first written is read for ever, and the tags stay what they are."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from protocol.codec import Codec, decode_record, encode_record
from protocol.fields import MAX_FRAME, MAX_RECORD
from protocol.messages import (
    SUBPROTOCOL_JSON,
    SUBPROTOCOL_MSGPACK,
    SUBPROTOCOLS,
    AgentMessage,
    Close,
    Data,
    Hello,
    HubMessage,
    Lane,
)
from protocol.records import AnyRecord
from protocol.worker import encoder, event_decoder, order_decoder
from tests.protocol.golden import (
    DATA,
    EVENTS,
    FOLDER,
    FRAMES,
    GROWN_EVENTS,
    GROWN_FRAMES,
    GROWN_ORDERS,
    GROWN_RECORDS,
    ODD_POINT,
    ORDERS,
    RECORDS,
    examples,
    outgrown,
)

FRAME_TAGS = {
    "Hello": 1, "Welcome": 2, "Data": 3, "Tomb": 4, "Ack": 5, "Desired": 6, "Command": 8, "Heartbeat": 10,
    "HeartbeatAck": 11, "Goaway": 12, "StreamClosed": 13, "Open": 14, "Bye": 15,
}  # fmt: skip
RECORD_TAGS = {
    "JobStatus": 1, "JobFacts": 2, "Schema": 3, "Result": 4, "Checkpoint": 5, "CommandDone": 6, "Snapshot": 7,
    "Notice": 8, "ParametersApplied": 9, "JobEstimate": 10, "ResumeCheck": 11, "Point": 16, "Figures": 17, "LogChunk": 24,
}  # fmt: skip


def members(union: Any) -> dict[str, int]:
    return {kind.__name__: kind.__struct_config__.tag for kind in union.__args__}


def golden(name: str) -> bytes:
    return (FOLDER / name).read_bytes()


def test_tags_never_change() -> None:
    assert members(AgentMessage) | members(HubMessage) == FRAME_TAGS
    assert members(AnyRecord) == RECORD_TAGS


def test_every_message_has_an_example_and_every_file_its_message() -> None:
    assert set(FRAMES) == set(FRAME_TAGS)
    assert set(RECORDS) == set(RECORD_TAGS)
    named = {
        path.name.rpartition(".")[0]
        for path in Path(FOLDER).glob("*.*")
        if path.suffix in (".json", ".msgpack")
    }
    assert named == set(examples())


ALL_FRAMES = {**FRAMES, **GROWN_FRAMES}
ALL_RECORDS = {**RECORDS, **GROWN_RECORDS}
ALL_ORDERS = {**ORDERS, **GROWN_ORDERS}
ALL_EVENTS = {**EVENTS, **GROWN_EVENTS}


@pytest.mark.parametrize("name", ALL_FRAMES)
@pytest.mark.parametrize(
    ("ending", "subprotocol"), [("msgpack", SUBPROTOCOL_MSGPACK), ("json", SUBPROTOCOL_JSON)]
)
def test_a_frame_as_it_was_first_written_is_read_and_written_the_same(
    name: str, ending: str, subprotocol: str
) -> None:
    codec = Codec(subprotocol)
    body = golden(f"frame.{name}.{ending}")
    frame = ALL_FRAMES[name]
    kind = type(frame).__name__
    decode = codec.decode_agent if kind in members(AgentMessage) else codec.decode_hub
    read = decode(body)
    if isinstance(read, Data):
        assert (read.sid, read.lo) == (DATA.sid, DATA.lo)
        assert [codec.decode_record(one) for one in read.records] == [
            decode_record(one) for one in DATA.records
        ]
    else:
        assert read == frame
    assert (codec.encode(frame) == body) is (f"frame.{name}" not in outgrown())
    if kind in members(AgentMessage) and kind in members(HubMessage):
        assert codec.decode_hub(body) == frame


@pytest.mark.parametrize("name", [*ALL_RECORDS, "Point.odd"])
def test_a_record_as_it_was_first_written_is_read_and_written_the_same(name: str) -> None:
    record = ALL_RECORDS.get(name, ODD_POINT)
    body = golden(f"record.{name}.msgpack")
    assert (encode_record(record) == body) is (f"record.{name}" not in outgrown())
    # NaN equals nothing, itself included: the bytes are compared.
    assert encode_record(decode_record(body)) == encode_record(record)  # type: ignore[arg-type]
    as_json = Codec(SUBPROTOCOL_JSON)
    frame = as_json.decode_agent(golden(f"record.{name}.json"))
    assert isinstance(frame, Data)
    heard = as_json.decode_record(frame.records[0])
    if name != "Point.odd":
        assert heard == record
    else:
        assert heard.values == ["Infinity", "NaN", "-Infinity"]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ALL_ORDERS)
def test_an_order_as_it_was_first_written_is_read_and_written_the_same(name: str) -> None:
    body = golden(f"order.{name}.msgpack")
    order = ALL_ORDERS[name]
    assert order_decoder.decode(body) == order
    assert (encoder.encode(order) == body) is (f"order.{name}" not in outgrown())


@pytest.mark.parametrize("name", ALL_EVENTS)
def test_an_event_as_it_was_first_written_is_read_and_written_the_same(name: str) -> None:
    body = golden(f"event.{name}.msgpack")
    numbered = event_decoder.decode(body)
    assert numbered.event == ALL_EVENTS[name]
    assert (encoder.encode(numbered) == body) is (f"event.{name}" not in outgrown())


@pytest.mark.parametrize("name", [name for name in ALL_FRAMES if f"frame.{name}" not in outgrown()])
def test_a_newer_peer_may_append_fields(name: str) -> None:
    codec = Codec(SUBPROTOCOL_MSGPACK)
    fields = msgspec.msgpack.decode(golden(f"frame.{name}.msgpack"))
    kind = type(ALL_FRAMES[name])
    decode = codec.decode_agent if kind.__name__ in members(AgentMessage) else codec.decode_hub
    longer = decode(msgspec.msgpack.encode([*fields, "from the future", 3]))
    assert type(longer) is kind


def test_the_agent_offers_messagepack_first() -> None:
    assert SUBPROTOCOLS == ("finetunelab.agent.v1.msgpack", "finetunelab.agent.v1.json")
    assert MAX_RECORD < MAX_FRAME == 256 * 1024
    assert list(Lane) == [0, 1, 2]


def test_close_codes_say_by_their_range_whether_to_dial_again() -> None:
    assert {code for code in Close if code >= 4500} == {4501, 4503, 4504, 4505, 4506, 4513}
    assert all(4000 <= code <= 4999 for code in Close)


@pytest.mark.parametrize("name", ["agent_0123456789abcdef", "agent_lab-box_2"])
def test_an_agent_id_has_its_shape(name: str) -> None:
    codec = Codec(SUBPROTOCOL_MSGPACK)
    hello = msgspec.structs.replace(FRAMES["Hello"], agent_id=name)
    assert isinstance(codec.decode_agent(codec.encode(hello)), Hello)


def test_the_largest_record_fits_a_frame() -> None:
    body = b"\xc6" + (MAX_RECORD - 5).to_bytes(4, "big") + b"x" * (MAX_RECORD - 5)
    frame = Codec(SUBPROTOCOL_MSGPACK).encode(Data(2**31, 2**62, [msgspec.Raw(body)]))
    assert len(frame) <= MAX_FRAME
