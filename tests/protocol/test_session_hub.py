"""The backend's end of a connection: what it applies, what it acknowledges, and when."""

from protocol.messages import (
    Ack,
    Close,
    Data,
    Heartbeat,
    HeartbeatAck,
    Open,
    StreamAck,
    StreamClosed,
    StreamHead,
    Tomb,
    Welcome,
)
from protocol.session import (
    Apply,
    Buried,
    Closing,
    HubSession,
    Opened,
)
from tests.protocol.sessions import CONTROL, METRICS, head, hello, hub
from tests.protocol.simulation import raw

# Greeting


def test_without_a_hello_the_backend_gives_up() -> None:
    session = HubSession(100.0)
    assert session.tick(109.9) == 110.0
    assert session.closing is None
    session.tick(110.0)
    assert session.closing == Closing(1002, "no HELLO within 10 s")


def test_data_before_hello_is_a_defect() -> None:
    session = HubSession(0.0)
    session.receive(Data(1, 1, [raw("x")]), 0.0)
    assert session.closing == Closing(Close.MALFORMED, "a message came before HELLO was answered")


def test_heartbeats_are_answered_at_any_time() -> None:
    session = HubSession(0.0)
    for nonce, message in enumerate((hello(), None, None)):
        session.receive(Heartbeat(nonce), 0.0)
        assert session.outgoing(0.0) == [HeartbeatAck(nonce)]
        if message is not None:
            session.receive(message, 0.0)
    assert session.closing is None
    session.welcome("s", {}, 0.0)
    assert isinstance(session.outgoing(0.0)[0], Welcome)


def test_after_closing_nothing_is_taken() -> None:
    session = hub(head(CONTROL, 1, 1))
    session.close(Close.STALE, "another has taken over")
    assert session.receive(Data(1, 1, [raw("x")]), 0.0) == []
    session.close(Close.GAP, "later")
    assert session.closing == Closing(Close.STALE, "another has taken over")


# Streams that end


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


def test_a_number_that_no_database_holds_is_a_defect() -> None:
    large = StreamHead(2, 2**63, "job", 0, 1, 1)
    session = HubSession(0.0)
    session.receive(hello(large), 0.0)
    opened, buried = hub(head(CONTROL, 1, 1)), hub(head(CONTROL, 1, 1))
    opened.receive(Open(large), 0.0)
    for one in (session, opened):
        assert one.closing == Closing(Close.MALFORMED, "an epoch has at most 63 bits")
    assert buried.receive(Tomb(1, 1, 2**63, "overflow", 1), 0.0) == []
    assert buried.closing is not None and buried.closing.code == Close.MALFORMED


def test_only_the_new_part_of_a_frame_is_applied() -> None:
    session = hub(head(CONTROL, 1, 9), acks={CONTROL: 2})
    records = [raw(str(number)) for number in range(5)]
    assert session.receive(Data(1, 1, records), 0.0) == [Apply(CONTROL, 3, records[2:])]
    assert session.receive(Data(1, 6, records[:1]), 0.0) == [Apply(CONTROL, 6, records[:1])]


def test_what_came_by_another_way_is_not_acknowledged_on_this_connection() -> None:
    session = hub(head(CONTROL, 1, 9))
    session.receive(Data(1, 1, [raw("a"), raw("b")]), 0.0)
    session.outgoing(0.0)
    # A REST append of before was carried out only now: the store holds 9.
    session.committed(CONTROL, 9)
    assert session.outgoing(0.0) == [Ack([StreamAck(1, 2)])]
    assert session.receive(Data(1, 3, [raw("c")]), 0.0) == [Apply(CONTROL, 3, [raw("c")])]
    session.committed(CONTROL, 9)
    assert session.outgoing(0.0) == [Ack([StreamAck(1, 3)])]


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


# The rest


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
