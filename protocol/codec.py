"""Bytes to messages and back, in both encodings, with the limits of a peer that may be hostile.

The size of a frame is bounded before it is read. Its depth is bounded while it is: what is built by the types, none of
which takes whatever comes, and what is passed over by the interpreter's own limit. A scan ahead in Python costs 5 us a
point, where the decoding costs 0.6 and a hub has 33 for everything.
"""

import math
from typing import Any, Generic, TypeVar

import msgspec

from protocol.fields import MAX_FRAME
from protocol.messages import SUBPROTOCOL_JSON, SUBPROTOCOL_MSGPACK, AgentMessage, Data, HubMessage
from protocol.records import AnyRecord

T = TypeVar("T")

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises for bytes that do not say what they should: bad text is an error of its own, and so is depth."""

_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Unknown(msgspec.Struct, frozen=True):
    """A message of a newer peer: noted once and passed over."""

    tag: int


class BadMessage(ValueError):
    """A frame that no peer of this version may send."""


class _Head(msgspec.Struct, array_like=True):
    tag: int


_pack = msgspec.msgpack.Encoder()
_json = msgspec.json.Encoder()


def _spelled(value: Any) -> Any:
    """Replace non-finite floats, which JSON would turn into null, by their words."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, list | tuple):
        return [_spelled(item) for item in value]
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    return value


def number(value: float | str | None) -> float | None:
    """Return a measured value as a float, whichever encoding it came in."""
    return _WORDS[value] if isinstance(value, str) else value


class _Typed(Generic[T]):
    """Decoders of one union in both encodings."""

    def __init__(self, union: Any, what: str) -> None:
        self._packed: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)
        self._json: msgspec.json.Decoder[T] = msgspec.json.Decoder(union)
        self._packed_head = msgspec.msgpack.Decoder(_Head)
        self._json_head = msgspec.json.Decoder(_Head)
        self._what = what
        members = getattr(union, "__args__", (union,))
        self._tags = frozenset(member.__struct_config__.tag for member in members)

    def decode(self, data: bytes | bytearray | memoryview | msgspec.Raw, as_json: bool) -> T | Unknown:
        try:
            return self._json.decode(data) if as_json else self._packed.decode(data)
        except RecursionError:
            raise BadMessage(f"{self._what} is nested too deeply") from None
        except (msgspec.MsgspecError, ValueError) as error:
            head = self._peek(data, as_json)
            if head is not None and head not in self._tags:
                return Unknown(head)
            which = f"{self._what} {head}" if head is not None else self._what
            raise BadMessage(f"{which}: {error}") from None

    def _peek(self, data: bytes | bytearray | memoryview | msgspec.Raw, as_json: bool) -> int | None:
        try:
            return (self._json_head if as_json else self._packed_head).decode(data).tag
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return None


_agent: _Typed[AgentMessage] = _Typed(AgentMessage, "message")
_hub: _Typed[HubMessage] = _Typed(HubMessage, "message")
_record: _Typed[AnyRecord] = _Typed(AnyRecord, "record")


def encode_record(record: AnyRecord) -> bytes:
    """Return the MessagePack that the journal holds and a MessagePack session sends as it is."""
    return _pack.encode(record)


def decode_record(body: bytes | msgspec.Raw, as_json: bool = False) -> AnyRecord | Unknown:
    """Return the record in ``body``; raises BadMessage."""
    return _record.decode(body, as_json)


class Codec:
    """One encoding, as negotiated by the subprotocol; raises ValueError for a subprotocol that is not ours."""

    def __init__(self, subprotocol: str) -> None:
        if subprotocol not in (SUBPROTOCOL_MSGPACK, SUBPROTOCOL_JSON):
            raise ValueError(f"unknown subprotocol {subprotocol!r}")
        self.subprotocol = subprotocol
        self.as_json = subprotocol == SUBPROTOCOL_JSON

    def encode(self, message: AgentMessage | HubMessage) -> bytes:
        """Return the frame. Records inside DATA are MessagePack and are transcoded for a JSON session."""
        if not self.as_json:
            return _pack.encode(message)
        if isinstance(message, Data):
            records = [_spelled(msgspec.msgpack.decode(record)) for record in message.records]
            return _json.encode([3, message.sid, message.lo, records])
        return _json.encode(_spelled(msgspec.to_builtins(message)))

    def length(self, record: bytes) -> int:
        """Return the bytes that a stored record takes inside a DATA frame of this session."""
        if not self.as_json:
            return len(record)
        return len(_json.encode(_spelled(msgspec.msgpack.decode(record)))) + 1

    def decode_agent(self, data: bytes | str, limit: int = MAX_FRAME) -> AgentMessage | Unknown:
        """Return what an agent sent; raises BadMessage."""
        return _agent.decode(self._bounded(data, limit), self.as_json)

    def decode_hub(self, data: bytes | str, limit: int = MAX_FRAME) -> HubMessage | Unknown:
        """Return what a backend sent; raises BadMessage."""
        return _hub.decode(self._bounded(data, limit), self.as_json)

    def decode_record(self, body: msgspec.Raw | bytes) -> AnyRecord | Unknown:
        """Return a record of a DATA frame of this session; raises BadMessage."""
        return _record.decode(body, self.as_json)

    def _bounded(self, data: bytes | str, limit: int) -> bytes:
        raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
        if len(raw) > limit:
            raise BadMessage(f"a frame of {len(raw)} bytes; the limit is {limit}")
        return raw
