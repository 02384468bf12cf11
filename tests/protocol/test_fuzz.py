"""Nothing that a peer sends does more to a decoder or a session than close it with a reason."""

import random
import time
import tracemalloc
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import BadMessage, Codec, Unknown
from protocol.fields import MAX_FRAME
from protocol.messages import (
    SUBPROTOCOLS,
    Ack,
    Close,
    Data,
    Open,
    StreamAck,
    StreamHead,
    Welcome,
)
from protocol.session import (
    Acked,
    AgentSession,
    Apply,
    Buried,
    Dropped,
    Greeted,
    HubSession,
    Key,
    Opened,
)
from tests.protocol.sessions import bodies, head, hello
from tests.support.fuzz import BY_AGENT, BY_HUB, TREES, Fuzz, agent_says, hub_says, packed, tree_of

BOTH = pytest.mark.parametrize("subprotocol", SUBPROTOCOLS, ids=["msgpack", "json"])
SHORT, LONG = 2_500, 1_000_000
"""Inputs of each fuzz below: in the test command, and in the long form over all of them."""
CLOSES = {*Close, 1002, 1006}
KEYS = [Key(7, scope, lane) for scope in ("", "job") for lane in range(3)]


def read(codec: Codec, data: bytes, by_hub: bool) -> Any:
    """Return the message, or None for a bad one: nothing else may come of it."""
    try:
        message = codec.decode_hub(data) if by_hub else codec.decode_agent(data)
    except BadMessage as error:
        assert str(error)
        return None
    for body in message.records if isinstance(message, Data) else ():
        try:
            codec.decode_record(body)
        except BadMessage as error:
            assert str(error)
    return message


class AgentUnderFire:
    """The agent's end: what it would delete is never more than it has sent."""

    trees = (*map(tree_of, BY_HUB), *TREES)

    def __init__(self, codec: Codec, rng: random.Random) -> None:
        self.codec, self.rng = codec, rng
        self.closes: Counter[int] = Counter()
        self._fresh()

    def _fresh(self) -> None:
        self.now = 0.0
        self.session = AgentSession(hello(*(head(key, 1, 9, sid) for sid, key in enumerate(KEYS, 1))), 0.0)
        self.sent = dict.fromkeys(KEYS, 0)
        if self.rng.random() < 0.8:
            self.take(Welcome("s", [StreamAck(1, self.rng.randrange(3))]))

    def take(self, message: Any) -> None:
        session, rng = self.session, self.rng
        self.now += rng.choice((0.0, 0.001, 1.0, 16.0))
        known = session.welcome is not None
        for news in session.receive(message, self.now):
            assert session.welcome is not None, "nothing counts before WELCOME"
            if isinstance(news, Acked):
                assert news.seq <= session.last(news.key)
                # WELCOME may know of what an earlier connection sent.
                assert not known or news.seq <= self.sent[news.key]
                self.sent[news.key] = max(self.sent[news.key], news.seq)
            elif isinstance(news, Dropped):
                assert news.key in KEYS
        for key in KEYS:
            session.appended(key, 9 + rng.randrange(3))
        for _ in range(3):
            if (wish := session.next_read()) is None:
                break
            key, after, size = wish
            assert 0 <= after < session.last(key) and size > 0
            if rng.random() < 0.9:
                count = min(4, session.last(key) - after)
                session.send(key, after + 1, bodies(count))
            else:
                count = session.last(key) - after
                session.bury(key, after + 1, session.last(key), "trimmed")
            self.sent[key] = after + count
        assert session.tick(self.now, [0, 1, 2]) >= self.now or session.closing
        said = session.outgoing(self.now)
        for one in said:
            assert len(self.codec.encode(one)) <= MAX_FRAME
        assert len(said) < 40
        if session.closing is not None:
            assert session.closing.code in CLOSES and session.closing.reason
            self.closes[session.closing.code] += 1
            self._fresh()


class HubUnderFire:
    """The backend's end: it is told to store each number once and in order, and acknowledges what is stored."""

    trees = (*map(tree_of, BY_AGENT), *TREES)

    def __init__(self, codec: Codec, rng: random.Random) -> None:
        self.codec, self.rng = codec, rng
        self.closes: Counter[int] = Counter()
        self._fresh()

    def _fresh(self) -> None:
        self.now = 0.0
        self.session = HubSession(0.0)
        self.have: dict[Key, int] = {}
        self.durable: dict[Key, int] = {}
        self.sids: dict[int, Key] = {}
        if self.rng.random() < 0.8:
            self.take(hello(*(head(key, 1, 9, sid) for sid, key in enumerate(KEYS[:4], 1))))

    def take(self, message: Any) -> None:
        session, rng = self.session, self.rng
        self.now += rng.choice((0.0, 0.001, 1.0, 16.0))
        for news in session.receive(message, self.now):
            match news:
                case Greeted(hello=greeting):
                    self.sids = {one.sid: Key(one.epoch, one.scope, one.lane) for one in greeting.streams}
                    self.have = {key: rng.randrange(3) for key in self.sids.values()}
                    self.durable = dict(self.have)
                    session.welcome("s", self.have, 1.0)
                case Opened(key=key):
                    assert isinstance(message, Open)
                    self.sids[message.stream.sid] = key
                    self.have[key] = self.durable[key] = rng.randrange(3)
                    session.position(key, self.have[key])
                    if rng.random() < 0.1:
                        session.refuse(key, "deleted")
                case Apply(key=key, lo=lo, records=records):
                    assert lo == self.have[key] + 1 and records
                    self.have[key] = lo + len(records) - 1
                case Buried(key=key, lo=lo, hi=hi):
                    assert lo == self.have[key] + 1 <= hi
                    self.have[key] = hi
        for key in self.have:
            if self.durable[key] < self.have[key] and rng.random() < 0.2:
                self.durable[key] = self.have[key]
                session.committed(key, self.durable[key])
        session.tick(self.now)
        for one in session.outgoing(self.now):
            assert len(self.codec.encode(one)) <= MAX_FRAME
            for ack in one.acks if isinstance(one, Ack) else ():
                assert ack.seq <= self.durable[self.sids[ack.sid]]
        if session.closing is not None:
            assert session.closing.code in CLOSES and session.closing.reason
            self.closes[session.closing.code] += 1
            self._fresh()


ENDS: list[Any] = [AgentUnderFire, HubUnderFire]


def bombard(end: Any, subprotocol: str, seed: int, count: int) -> Counter[int]:
    """Send ``count`` inputs to one end in conversation after conversation; return how they closed."""
    codec = Codec(subprotocol)
    fuzz = Fuzz(seed, subprotocol)
    under = end(codec, fuzz.rng)
    by_hub = end is AgentUnderFire
    plausible = hub_says if by_hub else agent_says
    trees = list(end.trees)
    for _ in range(count):
        if fuzz.rng.random() < 0.5:
            data = packed(fuzz.tree(plausible(fuzz.rng)), fuzz.as_json)
        else:
            data = fuzz.frame(trees)
        message = read(codec, data, by_hub)
        if message is None:
            under.closes[Close.MALFORMED] += 1
        else:
            under.take(message)
    return under.closes


@BOTH
@pytest.mark.parametrize("end", ENDS, ids=["agent", "hub"])
def test_no_input_does_more_than_close_a_session_with_a_reason(end: Any, subprotocol: str) -> None:
    seed = random.getrandbits(32)
    print(f"seed {seed}")
    closes = bombard(end, subprotocol, seed, SHORT)
    # It got through to the rules of the conversation, and not to the decoder alone.
    assert closes[Close.GAP] > 0 and closes[Close.MALFORMED] > SHORT / 10


@pytest.mark.slow
def test_a_million_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    seed = random.getrandbits(32)
    closes: Counter[int] = Counter()
    began = time.monotonic()
    done = 0
    with capsys.disabled():
        print(f"\nfuzz: seed {seed}")
        for number in range(100):
            for end in ENDS:
                for subprotocol in SUBPROTOCOLS:
                    closes += bombard(end, subprotocol, seed + number, LONG // 400)
                    done += LONG // 400
        print(f"fuzz: {done} inputs in {time.monotonic() - began:.0f} s; closed: {dict(closes)}")
    assert done == LONG


@BOTH
@given(
    seed=st.integers(0, 2**32),
    cuts=st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=6)), max_size=4),
)
@settings(max_examples=150, deadline=None, database=None)
def test_a_golden_frame_with_any_wound_is_read_or_is_bad(
    subprotocol: str, seed: int, cuts: list[tuple[int, bytes]]
) -> None:
    codec = Codec(subprotocol)
    fuzz = Fuzz(seed, subprotocol)
    data = packed(fuzz.tree(fuzz.rng.choice(TREES)), fuzz.as_json)
    for at, patch in cuts:
        at %= len(data) + 1
        data = data[:at] + patch + data[at + len(patch) :]
    for by_hub in (True, False):
        read(codec, data, by_hub)


@BOTH
def test_a_hostile_frame_takes_little_memory_and_time(subprotocol: str) -> None:
    codec = Codec(subprotocol)
    fuzz = Fuzz(1, subprotocol)
    wide = [
        [5, [[0, 0]] * 60_000],
        [2, "s", [[0, 0]] * 60_000],
        [3, 1, 1, [None] * 4096],
        [3, 1, 1, [None] * 120_000],
        [99, *[{}] * 120_000],
        [99, [[[]] * 1000] * 40],
        [8, "a", "b", "", 0.0, {str(number): 1.5 for number in range(20_000)}],
        [6, "j", 1, "run", ["x" * 260_000]],
        [10, 1, 0.0, [2**63] * 20_000],
    ]
    frames = [packed(tree, fuzz.as_json)[:MAX_FRAME] for tree in wide] + [fuzz._bomb() for _ in range(30)]
    began = time.monotonic()
    for data in frames:
        for by_hub in (True, False):
            tracemalloc.start()
            try:
                read(codec, data, by_hub)
                assert tracemalloc.get_traced_memory()[1] < 12 * MAX_FRAME
            finally:
                tracemalloc.stop()
    # A safety net: the worst of them takes a few milliseconds.
    assert time.monotonic() - began < 30
    assert isinstance(codec.decode_hub(packed([99, *[{}] * 1000], fuzz.as_json)), Unknown)


def test_what_a_session_remembers_of_a_hostile_peer_is_bounded() -> None:
    agent, hub = AgentSession(hello(), 0.0), HubSession(0.0)
    hub.receive(hello(), 0.0)
    hub.welcome("s", {}, 0.0)
    for number in range(70_000):
        agent.receive(Unknown(number + 1000), 0.0)
        for news in hub.receive(Open(StreamHead(number, number, "job", 0, 1, 1)), 0.0):
            assert isinstance(news, Opened)
            hub.position(news.key, 0)
    assert hub.closing is not None and hub.closing.code == Close.RATE
    assert agent.closing is None
    assert len(agent.unknown) < 1000
    assert sum(agent.unknown.values()) == 70_000
