"""The agent's end of a connection: what it sends, what it holds back, and when it gives up."""

import pytest

from protocol.fields import MAX_FRAME
from protocol.messages import (
    Ack,
    Bye,
    Close,
    Desired,
    Goaway,
    Heartbeat,
    HeartbeatAck,
    HubMessage,
    Open,
    StreamAck,
    StreamClosed,
    Tomb,
    Welcome,
)
from protocol.session import (
    FRAME_TARGET,
    SILENCE,
    WELCOME_WITHIN,
    Acked,
    AgentSession,
    Closing,
    Dropped,
    Key,
    Welcomed,
)
from tests.protocol.sessions import CONTROL, LOGS, METRICS, agent, bodies, head, hello, said

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


def test_a_goodbye_waits_for_the_welcome() -> None:
    session = AgentSession(hello(), 0.0)
    session.bye("sleep", 60.0)
    assert said(session) == [hello()]
    session.receive(Welcome("s", []), 0.0)
    assert said(session) == [Bye("sleep", 60.0)]


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


@pytest.mark.parametrize("message", [Ack([]), Desired("j", 1, "run"), Goaway("x"), StreamClosed(1, "x")])
def test_nothing_may_come_before_welcome(message: HubMessage) -> None:
    session = AgentSession(hello(), 0.0)
    assert session.receive(message, 0.0) == []
    assert session.closing == Closing(Close.MALFORMED, "a message came before WELCOME")


def test_a_heartbeat_before_welcome_is_answered() -> None:
    session = AgentSession(hello(), 0.0)
    session.receive(Heartbeat(4), 0.0)
    assert said(session)[1:] == [HeartbeatAck(4)]


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


def test_records_that_a_read_brought_before_they_were_announced_are_not_asked_for_again() -> None:
    session = agent(head(CONTROL, 1, 1), head(METRICS, 1, 1, 2))
    session.send(CONTROL, 1, bodies(2))
    session.appended(CONTROL, 2)
    wish = session.next_read()
    assert wish is not None and wish[0] == METRICS


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
