"""Frames as a broken or hostile peer would send them: a seed gives the same bytes again."""

import json
import math
import random
from typing import Any

import msgspec

from protocol.codec import BadMessage, Codec
from protocol.messages import SUBPROTOCOL_JSON, AgentMessage, HubMessage
from tests.protocol.golden import FRAMES, RECORDS

PLACES = [0, 1, 2, 3, 4, 7, 9, -1, 2**31, 2**63 - 1, 2**63, 2**64 - 1]
"""Numbers that name a stream, a record or a nonce, and those at which an integer type ends."""
LEAVES: list[Any] = [
    *PLACES,
    None,
    True,
    False,
    0.0,
    1.5,
    -1.0,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "job",
    "run",
    "NaN",
    "overflow",
    "\x00",
    "\u202e",
    "x" * 300,
    "y" * 5000,
    "NaN" * 30_000,
    [],
    {},
    [[]],
    {"a": {}},
    [[1, 1]] * 5,
    b"",
    b"\xff" * 40,
]
LENGTHS = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\x7f\xff\xff\xff"]
"""Heads of arrays, maps, texts and bytes that announce 2 to 4 GiB."""
BY_AGENT = [frame for frame in FRAMES.values() if isinstance(frame, AgentMessage)]
BY_HUB = [frame for frame in FRAMES.values() if isinstance(frame, HubMessage)]


def tree_of(message: Any) -> Any:
    """Return a message as plain lists and dicts, records inside it too."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message))


TREES = [tree_of(message) for message in (*FRAMES.values(), *RECORDS.values())]


def packed(tree: Any, as_json: bool) -> bytes:
    """Return a tree's bytes; what an encoding cannot say becomes something that it can."""
    if not as_json:
        return msgspec.msgpack.encode(tree)
    return json.dumps(tree, default=repr, ensure_ascii=False).encode("utf-8", "surrogatepass")


def hub_says(rng: random.Random) -> Any:
    """A frame that fits the conversation, or nearly."""
    sid, seq = rng.randrange(0, 9), rng.choice((0, 1, 2, 5, 9, 40))
    match rng.randrange(5):
        case 0 | 1:
            return [5, [[sid, seq]] * rng.randrange(3)]
        case 2:
            return [
                2,
                "s",
                [[sid, seq]],
                rng.choice((15.0, 1e-9, 3600.0)),
                rng.choice((4096, 2**62)),
                seq,
                4096,
            ]
        case 3:
            return [13, sid, "gone"]
        case _:
            return [10, seq]


def agent_says(rng: random.Random) -> Any:
    """A frame that fits the conversation, or nearly."""
    sid, lo = rng.randrange(1, 9), rng.choice((1, 1, 1, 1, 2, 2, 3, 5, 13))
    records = [rng.choice((["odd"], [8, 1.5, "info", "x"], 7, None))] * rng.randrange(4)
    match rng.randrange(6):
        case 0 | 1 | 2:
            return [3, sid, lo, records]
        case 3:
            return [4, sid, lo, lo + rng.randrange(-1, 4), "overflow", 1]
        case 4:
            return [14, [sid, 7, rng.choice(("", "job", "x")), rng.randrange(3), 1, 5]]
        case _:
            return [10, lo]


class Fuzz:
    """An endless source of inputs for one encoding."""

    def __init__(self, seed: int, subprotocol: str) -> None:
        self.rng = random.Random(seed)
        self.as_json = subprotocol == SUBPROTOCOL_JSON

    def frame(self, trees: list[Any] = TREES) -> bytes:
        """Return one input: mostly a real message with something wrong in it."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.04:
            return rng.randbytes(rng.randrange(64))
        if kind < 0.06:
            return self._bomb()
        if kind < 0.65:
            return packed(self.tree(rng.choice(trees)), self.as_json)
        return self._damaged(packed(rng.choice(trees), self.as_json))

    def tree(self, tree: Any) -> Any:
        """Return a copy with one to three of its nodes replaced, dropped, doubled or put deeper."""
        made = tree
        for _ in range(self.rng.choice((0, 1, 1, 1, 2, 3))):
            made = self._changed(made)
        return made

    def _changed(self, node: Any) -> Any:
        rng = self.rng
        if isinstance(node, list) and node and rng.random() < 0.9:
            at = rng.randrange(len(node))
            if rng.random() < 0.12:
                return node[:at] + node[at + 1 :]
            if rng.random() < 0.12:
                return [*node[: at + 1], rng.choice(LEAVES), *node[at + 1 :]]
            return [*node[:at], self._changed(node[at]), *node[at + 1 :]]
        if isinstance(node, dict) and node and rng.random() < 0.9:
            name = rng.choice(list(node))
            return {**node, name: self._changed(node[name])}
        if isinstance(node, int) and rng.random() < 0.6:
            return rng.choice(PLACES)
        leaf = rng.choice(LEAVES)
        return [leaf] * rng.choice((2, 70, 5000)) if rng.random() < 0.02 else leaf

    def _damaged(self, body: bytes) -> bytes:
        rng = self.rng
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(len(body) + 1)
            match rng.randrange(5):
                case 0:
                    body = body[:at]
                case 1:
                    body = body[:at] + rng.randbytes(rng.randrange(1, 5)) + body[at:]
                case 2:
                    body = body[:at] + body[at + rng.randrange(1, 9) :]
                case 3:
                    body = body[:at] + rng.choice(LENGTHS) + body[at + 1 :]
                case _:
                    body = body[:at] + bytes([rng.randrange(256)]) + body[at + 1 :]
        return body

    def _bomb(self) -> bytes:
        rng = self.rng
        depth = rng.choice((50, 2_000, 100_000))
        if self.as_json:
            return rng.choice((b"[", b'[6,"j",', b'{"a":', b"[99,[")) * (depth // 3)
        head = rng.choice((b"", b"\x92\x63", b"\x95\x06\xa1j"))
        return head + rng.choice((b"\x91", b"\x81\xa1a", *LENGTHS)) * (depth // 3)

    def sound(self, codec: Codec, by_hub: bool) -> bytes:
        """Return an input that the decoder takes: what is wrong with it is for the rules behind it."""
        says, trees = (hub_says, BY_HUB) if by_hub else (agent_says, BY_AGENT)
        while True:
            tree = says(self.rng) if self.rng.random() < 0.6 else tree_of(self.rng.choice(trees))
            data = packed(self.tree(tree), self.as_json)
            try:
                _ = codec.decode_hub(data) if by_hub else codec.decode_agent(data)
            except BadMessage:
                continue
            return data
