"""Both ends of a conversation, brought to the point where a test begins."""

from protocol.messages import (
    AgentMessage,
    Hello,
    StreamAck,
    StreamHead,
    Welcome,
)
from protocol.session import (
    AgentSession,
    Greeted,
    HubSession,
    Key,
)
from tests.protocol.golden import MACHINE
from tests.protocol.simulation import raw

EPOCH = 7
CONTROL, METRICS, LOGS = (Key(EPOCH, "job", lane) for lane in range(3))


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
