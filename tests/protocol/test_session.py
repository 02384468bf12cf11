"""The conversation: what is produced arrives once and in order, whatever the network does."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.codec import Unknown
from protocol.messages import (
    Bye,
    Close,
    Desired,
    Heartbeat,
    HeartbeatAck,
    Welcome,
)
from protocol.session import (
    SILENCE,
    AgentSession,
    Closing,
    HubSession,
    Left,
)
from tests.protocol.sessions import CONTROL, agent, bodies, head, hello, hub, said
from tests.protocol.simulation import World, check

SHORT = 250
LONG = 6000
FOUND = (2, 55, 240)
"""Seeds that found the backend acknowledging, on a connection, what a late REST append had stored."""


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


@pytest.mark.parametrize("seed", FOUND)
def test_what_once_went_wrong_goes_well(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_a_hundred_thousand_schedules(block: int) -> None:
    for seed in range(block * 5000, (block + 1) * 5000):
        check(seed, LONG if seed % 500 == 0 else SHORT)


# Greeting


def test_a_second_welcome_or_hello_is_a_defect() -> None:
    one = agent()
    one.receive(Welcome("t", []), 0.0)
    assert one.closing == Closing(Close.MALFORMED, "a second WELCOME")
    other = hub()
    assert other.receive(hello(), 0.0) == []
    assert other.closing == Closing(Close.MALFORMED, "a second HELLO")


# Liveness


def test_a_silent_peer_is_dead_after_its_limit() -> None:
    for session in (agent(), hub()):
        limit = SILENCE * 15.0
        session.tick(limit - 0.1)
        assert session.closing is None
        session.tick(limit)
        assert session.closing == Closing(1006, "nothing was heard for 37.5 s")
        assert session.tick(limit + 1) == limit + 1


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


def test_repr_says_how_it_stands() -> None:
    session = agent(head(CONTROL, 1, 9))
    session.send(CONTROL, 1, bodies(2))
    assert repr(session) == "<AgentSession open, 1 streams, 2 in flight>"
    assert repr(AgentSession(hello(), 0.0)) == "<AgentSession greeting, 0 streams, 0 in flight>"
    assert repr(hub()) == "<HubSession open, 0 streams>"
    assert repr(HubSession(0.0)) == "<HubSession awaiting HELLO, 0 streams>"
    assert msgspec.structs.asdict(hello())["boot"] == 1
