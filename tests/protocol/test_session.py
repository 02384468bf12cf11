"""The conversation: what is produced arrives once and in order, whatever the network does."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import Unknown
from protocol.fields import MAX_FRAME
from protocol.messages import (
    Ack,
    AgentMessage,
    Bye,
    Close,
    Data,
    Desired,
    Goaway,
    Heartbeat,
    HeartbeatAck,
    Hello,
    HubMessage,
    Open,
    StreamAck,
    StreamClosed,
    StreamHead,
    Tomb,
    Welcome,
)
from protocol.session import (
    FRAME_TARGET,
    SILENCE,
    WELCOME_WITHIN,
    Acked,
    AgentSession,
    Apply,
    Buried,
    Closing,
    Dropped,
    Greeted,
    HubSession,
    Key,
    Left,
    Opened,
    Welcomed,
)
from tests.protocol.golden import MACHINE
from tests.protocol.simulation import World, raw

EPOCH = 7
CONTROL, METRICS, LOGS = (Key(EPOCH, "job", lane) for lane in range(3))
SHORT = 250
LONG = 6000


def hello(*heads: StreamHead, epoch: int = EPOCH) -> Hello:
    return Hello("agent_0123456789abcdef", "i", 1, 1, epoch, MACHINE, list(heads))


def head(key: Key, first: int, last: int, sid: int = 1) -> StreamHead:
    return StreamHead(sid, key.epoch, key.scope, key.lane, first, last)


def agent(
    *heads: StreamHead, acks: dict[int, int] | None = None, epoch: int = EPOCH, **terms: int
) -> AgentSession:
    """An agent that was welcomed at 0, with nothing left to say."""
    session = AgentSession(hello(*heads, epoch=epoch), 0.0)
    session.receive(
        Welcome("s", [StreamAck(sid, seq) for sid, seq in (acks or {}).items()], 15.0, **terms), 0.0
    )
    session.outgoing(0.0)
    return session


def hub(*heads: StreamHead, acks: dict[Key, int] | None = None) -> HubSession:
    """A backend that has welcomed an agent at 0, with nothing left to say."""
    session = HubSession(0.0)
    [greeted] = session.receive(hello(*heads), 0.0)
    assert isinstance(greeted, Greeted)
    session.welcome("s", acks or {}, 1.5)
    session.outgoing(0.0)
    return session


def bodies(count: int, size: int = 10) -> list[bytes]:
    return [bytes(raw("x" * size)) for _ in range(count)]


def said(session: AgentSession) -> list[AgentMessage]:
    return session.outgoing(0.0)


# The simulation


@given(st.integers(0, 2**32))
@settings(max_examples=120, deadline=None, database=None)
def test_what_is_produced_arrives_once_and_in_order(seed: int) -> None:
    world = World(seed)
    world.run(SHORT)
    assert world.stored() == world.produced
    assert world.refused == [], "no end may find fault with the other"


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None, database=None)
def test_a_backend_restored_from_a_backup_lacks_what_it_lost_and_nothing_else(seed: int) -> None:
    world = World(seed, restores=True)
    world.run(SHORT)
    assert world.refused == []
    for key, texts in world.produced.items():
        # A stream that the agent had nothing left of is not heard of again: its end may be missing.
        stored = world.stored().get(key, [])
        assert len(stored) <= len(texts)
        assert all(one in (None, other) for one, other in zip(stored, texts, strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_many_long_runs(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        world = World(seed)
        world.run(LONG if seed % 20 == 0 else 2 * SHORT)
        assert world.stored() == world.produced, seed
        assert world.refused == [], seed


# Greeting


def test_hello_goes_first_and_alone() -> None:
    session = AgentSession(hello(), 0.0)
    session.appended(CONTROL, 3)
    assert said(session) == [hello()]
    assert session.next_read() is None
    news = session.receive(Welcome("s-1", [], server_time=5.0), 0.0)
    assert news == [Welcomed("s-1", 5.0)]
    # A stream that came up in between is opened only now: a backend may answer HELLO in its own time.
    assert said(session) == [Open(head(CONTROL, 1, 3))]
    assert session.next_read() is not None


def test_without_a_welcome_the_agent_gives_up() -> None:
    session = AgentSession(hello(), 100.0)
    assert session.tick(100.0) == 100.0 + WELCOME_WITHIN
    session.tick(100.0 + WELCOME_WITHIN)
    assert session.closing == Closing(1006, "no WELCOME within 10 s")


def test_silence_is_watched_apart_from_what_is_said() -> None:
    session = AgentSession(hello(), 0.0)
    assert session.watch(0.0) == WELCOME_WITHIN
    session.receive(Welcome("s", []), 4.0)
    session.outgoing(4.0)
    assert session.watch(20.0) == 4.0 + SILENCE * 15.0
    assert session.outgoing(20.0) == [], "watching says nothing"
    session.watch(4.0 + SILENCE * 15.0)
    assert session.closing == Closing(1006, "nothing was heard for 37.5 s")


def test_without_a_hello_the_backend_gives_up() -> None:
    session = HubSession(100.0)
    session.tick(109.9)
    assert session.closing is None
    session.tick(110.0)
    assert session.closing == Closing(1002, "no HELLO within 10 s")


@pytest.mark.parametrize("message", [Ack([]), Desired("j", 1, "run"), Goaway("x"), StreamClosed(1, "x")])
def test_nothing_may_come_before_welcome(message: HubMessage) -> None:
    session = AgentSession(hello(), 0.0)
    assert session.receive(message, 0.0) == []
    assert session.closing == Closing(Close.MALFORMED, "a message came before WELCOME")


def test_a_heartbeat_before_welcome_is_answered() -> None:
    session = AgentSession(hello(), 0.0)
    session.receive(Heartbeat(4), 0.0)
    assert said(session)[1:] == [HeartbeatAck(4)]


def test_a_second_welcome_or_hello_is_a_defect() -> None:
    one = agent()
    one.receive(Welcome("t", []), 0.0)
    assert one.closing == Closing(Close.MALFORMED, "a second WELCOME")
    other = hub()
    assert other.receive(hello(), 0.0) == []
    assert other.closing == Closing(Close.MALFORMED, "a second HELLO")


def test_data_before_hello_is_a_defect() -> None:
    session = HubSession(0.0)
    session.receive(Data(1, 1, [raw("x")]), 0.0)
    assert session.closing == Closing(Close.MALFORMED, "a message came before HELLO was answered")


def test_after_closing_nothing_is_taken() -> None:
    session = hub(head(CONTROL, 1, 1))
    session.close(Close.STALE, "another has taken over")
    assert session.receive(Data(1, 1, [raw("x")]), 0.0) == []
    session.close(Close.GAP, "later")
    assert session.closing == Closing(Close.STALE, "another has taken over")


# Where streams stand


def test_a_reconnect_sends_only_what_the_backend_lacks() -> None:
    session = AgentSession(hello(head(CONTROL, 4, 9)), 0.0)
    news = session.receive(Welcome("s", [StreamAck(1, 6)]), 0.0)
    assert news == [Welcomed("s", 0.0), Acked(CONTROL, 6)]
    assert session.next_read() == (CONTROL, 6, FRAME_TARGET)


def test_a_restored_backend_is_told_what_is_gone() -> None:
    session = AgentSession(hello(head(CONTROL, 4, 9)), 0.0)
    assert session.receive(Welcome("s", [StreamAck(1, 1)]), 0.0) == [Welcomed("s", 0.0)]
    assert said(session)[1:] == [Tomb(1, 2, 3, "trimmed", 2)]
    assert session.next_read() == (CONTROL, 3, FRAME_TARGET)
    # Its acknowledgement of the tombstone is no news to the journal.
    assert session.receive(Ack([StreamAck(1, 3)]), 0.0) == []


def test_a_restored_journal_holds_nothing_the_backend_lacks() -> None:
    old = Key(3, "job", 0)
    session = AgentSession(hello(head(old, 1, 5)), 0.0)
    assert session.receive(Welcome("s", [StreamAck(1, 8)]), 0.0) == [Welcomed("s", 0.0), Acked(old, 5)]
    assert session.closing is None
    assert session.next_read() is None


def test_an_ack_beyond_this_epochs_own_end_is_a_defect() -> None:
    session = AgentSession(hello(head(CONTROL, 1, 5)), 0.0)
    assert session.receive(Welcome("s", [StreamAck(1, 8)]), 0.0) == []
    assert session.closing == Closing(Close.GAP, "the backend acknowledges 8 of a stream that ends at 5")


def test_an_ack_of_what_was_not_sent_is_a_defect() -> None:
    session = agent(head(CONTROL, 1, 5))
    session.receive(Ack([StreamAck(1, 1)]), 0.0)
    assert session.closing == Closing(Close.GAP, "the backend acknowledges 1, but 0 was the last sent")


def test_acks_never_move_back_and_unknown_streams_are_passed_over() -> None:
    session = agent(head(CONTROL, 1, 5))
    session.send(CONTROL, 1, bodies(5))
    assert session.receive(Ack([StreamAck(1, 4), StreamAck(99, 7)]), 0.0) == [Acked(CONTROL, 4)]
    assert session.receive(Ack([StreamAck(1, 2)]), 0.0) == []
    assert session.receive(Ack([StreamAck(1, 5)]), 0.0) == [Acked(CONTROL, 5)]
    assert session.in_flight == 0


def test_lanes_go_by_urgency_and_older_streams_before_newer() -> None:
    old = Key(3, "job", 0)
    session = agent(head(old, 1, 1, 1), head(LOGS, 1, 1, 2), head(METRICS, 1, 1, 3))
    session.appended(CONTROL, 1)
    order = []
    while (wish := session.next_read()) is not None:
        order.append(wish[0])
        session.send(wish[0], 1, bodies(1))
    assert order == [old, CONTROL, METRICS, LOGS]


# The window


def test_the_window_counts_records() -> None:
    session = agent(head(CONTROL, 1, 9), window_records=3)
    session.send(CONTROL, 1, bodies(2))
    assert session.next_read() is not None
    session.send(CONTROL, 3, bodies(1))
    assert session.next_read() is None
    session.receive(Ack([StreamAck(1, 3)]), 0.0)
    assert session.in_flight == 0
    assert session.next_read() is not None


def test_the_window_counts_bytes() -> None:
    session = agent(head(CONTROL, 1, 9), window_bytes=5000)
    session.send(CONTROL, 1, bodies(1, size=3000))
    wish = session.next_read()
    assert wish is not None
    assert wish[2] == 4096, "a read is never so small that it could never hold a record"
    session.send(CONTROL, 2, bodies(1, size=3000))
    assert session.next_read() is None
    # One ack of both gives all of it back.
    session.receive(Ack([StreamAck(1, 2)]), 0.0)
    assert session.next_read() == (CONTROL, 2, 5000)


def test_a_tombstone_takes_room_and_gives_it_back() -> None:
    session = agent(head(CONTROL, 1, 9), window_records=1)
    session.bury(CONTROL, 1, 8, "corrupt")
    assert said(session) == [Tomb(1, 1, 8, "corrupt", 8)]
    assert session.next_read() is None
    session.receive(Ack([StreamAck(1, 8)]), 0.0)
    assert session.next_read() is not None


def test_a_dropped_stream_gives_its_room_back() -> None:
    session = agent(head(CONTROL, 1, 3, 1), head(METRICS, 1, 3, 2), window_records=3)
    session.send(CONTROL, 1, bodies(3))
    assert session.next_read() is None
    assert session.receive(StreamClosed(1, "deleted"), 0.0) == [Dropped(CONTROL, "deleted")]
    assert session.in_flight == 0
    assert session.next_read() == (METRICS, 0, FRAME_TARGET)


def test_a_frame_is_as_large_as_the_backend_takes() -> None:
    assert agent().frame_room == MAX_FRAME - 512
    assert agent(max_frame=4096).frame_room == 4096 - 512
    assert agent(max_frame=10 * MAX_FRAME).frame_room == MAX_FRAME - 512, "nor larger than the contract says"


def test_records_are_sent_without_holes() -> None:
    session = agent(head(CONTROL, 1, 9))
    session.send(CONTROL, 1, bodies(2))
    with pytest.raises(AssertionError):
        session.send(CONTROL, 4, bodies(1))
    session.send(CONTROL, 3, [])
    assert len(said(session)) == 1


# Streams that end


def test_a_refused_stream_is_not_opened_again() -> None:
    session = agent(head(CONTROL, 1, 3))
    session.receive(StreamClosed(1, "deleted"), 0.0)
    session.appended(CONTROL, 4)
    session.send(CONTROL, 4, bodies(1))
    session.bury(CONTROL, 4, 4, "corrupt")
    assert said(session) == []
    assert session.receive(StreamClosed(1, "again"), 0.0) == []
    # The number is not used again: the backend still passes over what comes of it.
    session.appended(METRICS, 1)
    assert said(session) == [Open(head(METRICS, 1, 1, 2))]


def test_the_backend_passes_over_what_still_comes_of_a_refused_stream() -> None:
    session = hub(head(CONTROL, 1, 9), head(METRICS, 1, 9, 2))
    session.refuse(CONTROL, "deleted")
    assert session.outgoing(0.0) == [StreamClosed(1, "deleted")]
    assert session.receive(Data(1, 1, [raw("x")]), 0.0) == []
    assert session.receive(Tomb(1, 5, 6, "overflow", 2), 0.0) == []
    session.committed(CONTROL, 3)
    assert session.outgoing(0.0) == [], "nor is it acknowledged"
    assert session.closing is None
    assert session.receive(Data(2, 1, [raw("x")]), 0.0) == [Apply(METRICS, 1, [raw("x")])]


def test_a_stream_that_was_never_opened_is_a_defect() -> None:
    session = hub()
    session.receive(Data(4, 1, [raw("x")]), 0.0)
    assert session.closing == Closing(Close.MALFORMED, "stream 4 was never opened")


def test_a_stream_is_opened_once_and_has_a_position_first() -> None:
    session = hub()
    assert session.receive(Open(head(CONTROL, 1, 3)), 0.0) == [Opened(CONTROL)]
    early = hub()
    early.receive(Open(head(CONTROL, 1, 3)), 0.0)
    early.receive(Data(1, 1, [raw("x")]), 0.0)
    assert early.closing == Closing(Close.MALFORMED, "stream 1 has no position yet")
    session.position(CONTROL, 2)
    assert session.receive(Data(1, 1, [raw("a"), raw("b"), raw("c")]), 0.0) == [Apply(CONTROL, 3, [raw("c")])]
    session.receive(Open(head(CONTROL, 1, 3, 2)), 0.0)
    assert session.closing == Closing(Close.MALFORMED, "stream 2 was opened twice")


# Receiving


def test_only_the_new_part_of_a_frame_is_applied() -> None:
    session = hub(head(CONTROL, 1, 9), acks={CONTROL: 2})
    records = [raw(str(number)) for number in range(5)]
    assert session.receive(Data(1, 1, records), 0.0) == [Apply(CONTROL, 3, records[2:])]
    assert session.receive(Data(1, 6, records[:1]), 0.0) == [Apply(CONTROL, 6, records[:1])]


def test_only_what_is_committed_is_acknowledged() -> None:
    session = hub(head(CONTROL, 1, 9))
    session.receive(Data(1, 1, [raw("a"), raw("b")]), 0.0)
    assert session.outgoing(0.0) == []
    # Said again before the commit: there is still nothing to acknowledge but what stands.
    session.receive(Data(1, 1, [raw("a")]), 0.0)
    assert session.outgoing(0.0) == [Ack([StreamAck(1, 0)])]
    session.committed(CONTROL, 2)
    assert session.outgoing(0.0) == [Ack([StreamAck(1, 2)])]
    session.receive(Data(1, 1, [raw("a")]), 0.0)
    session.receive(Tomb(1, 1, 2, "overflow", 2), 0.0)
    assert session.outgoing(0.0) == [Ack([StreamAck(1, 2)])], "a repeat is acknowledged again"


def test_acks_of_several_streams_share_a_frame() -> None:
    session = hub(head(CONTROL, 1, 9), head(METRICS, 1, 9, 2))
    session.receive(Data(1, 1, [raw("a")]), 0.0)
    session.receive(Data(2, 1, [raw("a")]), 0.0)
    session.committed(CONTROL, 1)
    session.committed(METRICS, 1)
    assert session.outgoing(0.0) == [Ack([StreamAck(1, 1), StreamAck(2, 1)])]


def test_a_hole_closes_the_connection() -> None:
    one = hub(head(CONTROL, 1, 9))
    one.receive(Data(1, 3, [raw("a")]), 0.0)
    assert one.closing == Closing(Close.GAP, "record 3 came after 0")
    other = hub(head(CONTROL, 1, 9))
    other.receive(Tomb(1, 3, 4, "overflow", 2), 0.0)
    assert other.closing == Closing(Close.GAP, "tombstone 3 came after 0")


def test_a_tombstone_fills_its_place() -> None:
    session = hub(head(CONTROL, 1, 9), acks={CONTROL: 2})
    assert session.receive(Tomb(1, 1, 6, "overflow", 4), 0.0) == [Buried(CONTROL, 3, 6, "overflow", 4)]
    assert session.receive(Data(1, 7, [raw("a")]), 0.0) == [Apply(CONTROL, 7, [raw("a")])]
    session.receive(Tomb(1, 9, 8, "overflow", 0), 0.0)
    assert session.closing is not None
    assert session.closing.code == Close.MALFORMED


# Liveness


def test_a_heartbeat_is_sent_when_due_and_not_before() -> None:
    session = agent()
    assert session.tick(14.9) == 15.0
    assert session.outgoing(14.9) == []
    assert session.tick(15.0, [1, 2, 3]) == 30.0
    assert session.outgoing(15.0) == [Heartbeat(1, 0.0, [1, 2, 3])]


def test_whatever_is_said_is_as_good_as_a_heartbeat() -> None:
    session = agent(head(CONTROL, 1, 1))
    session.send(CONTROL, 1, bodies(1))
    assert len(session.outgoing(10.0)) == 1
    assert session.tick(24.9) == 25.0


def test_a_silent_peer_is_dead_after_its_limit() -> None:
    for session in (agent(), hub()):
        limit = SILENCE * 15.0
        session.tick(limit - 0.1)
        assert session.closing is None
        session.tick(limit)
        assert session.closing == Closing(1006, "nothing was heard for 37.5 s")
        assert session.tick(limit + 1) == limit + 1


def test_any_byte_is_a_sign_of_life() -> None:
    session = agent()
    session.receive(HeartbeatAck(1), 30.0)
    session.heard(40.0)
    session.tick(70.0)
    assert session.closing is None
    assert session.beats_answered == 1


def test_the_backend_sets_the_interval() -> None:
    session = AgentSession(hello(), 0.0)
    session.receive(Welcome("s", [], 2.0), 0.0)
    session.outgoing(0.0)
    assert session.tick(0.0) == 2.0


def test_a_probe_shortens_the_limit_once() -> None:
    session = agent()
    session.receive(HeartbeatAck(1), 100.0)
    session.probe(101.0, within=5.0)
    assert session.outgoing(101.0) == [Heartbeat(1)]
    session.tick(105.9)
    assert session.closing is None
    session.receive(HeartbeatAck(1), 105.95)
    session.tick(140.0)
    assert session.closing is None
    session.outgoing(140.0)
    session.probe(141.0, within=5.0)
    session.tick(146.0)
    assert session.closing is not None


def test_both_answer_heartbeats() -> None:
    one, other = agent(), hub()
    one.receive(Heartbeat(5), 1.0)
    assert one.outgoing(1.0) == [HeartbeatAck(5)]
    other.receive(Heartbeat(6, 1.0, [0]), 1.0)
    assert other.outgoing(1.0) == [HeartbeatAck(6)]


# The rest


def test_a_message_of_the_future_is_counted_and_passed_over() -> None:
    session = agent()
    for _ in range(2):
        assert session.receive(Unknown(77), 50.0) == []
    assert session.unknown == {77: 2}
    assert session.closing is None
    assert hub().receive(Unknown(77), 0.0) == []


def test_a_planned_silence_is_explained() -> None:
    one, other = agent(), hub()
    one.bye("sleep", 99.0)
    assert said(one) == [Bye("sleep", 99.0)]
    assert other.receive(Bye("sleep", 99.0), 0.0) == [Left("sleep", 99.0)]


def test_what_is_wanted_is_handed_on() -> None:
    one, other = agent(), hub()
    wish = Desired("job", 3, "pause")
    other.say(wish)
    assert other.outgoing(0.0) == [wish]
    assert one.receive(wish, 0.0) == [wish]


def test_the_welcome_says_where_every_stream_stands() -> None:
    session = HubSession(0.0, 20.0)
    session.receive(hello(head(CONTROL, 1, 9), head(METRICS, 1, 9, 2)), 0.0)
    session.welcome("s-1", {CONTROL: 4}, 1.5)
    [welcome] = session.outgoing(0.0)
    assert isinstance(welcome, Welcome)
    assert (welcome.session_id, welcome.acks, welcome.heartbeat_s) == (
        "s-1",
        [StreamAck(1, 4), StreamAck(2, 0)],
        20.0,
    )


def test_repr_says_how_it_stands() -> None:
    session = agent(head(CONTROL, 1, 9))
    session.send(CONTROL, 1, bodies(2))
    assert repr(session) == "<AgentSession open, 1 streams, 2 in flight>"
    assert repr(AgentSession(hello(), 0.0)) == "<AgentSession greeting, 0 streams, 0 in flight>"
    assert repr(hub()) == "<HubSession open, 0 streams>"
    assert repr(HubSession(0.0)) == "<HubSession awaiting HELLO, 0 streams>"
    assert msgspec.structs.asdict(hello())["boot"] == 1
