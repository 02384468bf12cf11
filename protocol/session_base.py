"""What both ends of a session share: its words, its heartbeats and its deadlines. Use `protocol.session`."""

from dataclasses import dataclass

import msgspec

from protocol.codec import Unknown
from protocol.messages import (
    Command,
    Desired,
    Goaway,
    HeartbeatAck,
    Hello,
)

SILENCE = 2.5
"""A peer is dead after this many heartbeat intervals without a byte."""
WELCOME_WITHIN = 10.0
"""Seconds from HELLO to WELCOME."""
FRAME_TARGET = 64 * 1024
"""Bytes of records in one DATA frame, unless a single record is larger: on a slow line what is urgent
waits for one frame, and an acknowledgement comes with each."""
MOST_STREAMS = 65_536
"""Streams that an agent may open on one connection."""
MOST_UNKNOWN = 256
"""Different tags of newer peers that are counted apart; those after them are counted together, as -1."""
FRAME_HEAD = 512
"""Bytes of a frame that DATA keeps free for its head."""


@dataclass(frozen=True)
class Key:
    """A stream, for ever."""

    epoch: int
    scope: str
    lane: int


@dataclass(frozen=True)
class Closing:
    """The session wants its connection closed."""

    code: int
    reason: str


# What a session has to say to its shell.


@dataclass(frozen=True)
class Welcomed:
    session_id: str
    server_time: float


@dataclass(frozen=True)
class Acked:
    """Delete everything of the stream up to ``seq``."""

    key: Key
    seq: int


@dataclass(frozen=True)
class Dropped:
    """The backend refuses this stream for good: delete what is held of it."""

    key: Key
    reason: str


@dataclass(frozen=True)
class Greeted:
    """An agent said HELLO; answer with `HubSession.welcome`."""

    hello: Hello


@dataclass(frozen=True)
class Opened:
    """A stream is new on this connection; answer with `HubSession.position` at once."""

    key: Key


@dataclass(frozen=True)
class Apply:
    """Commit these records of a stream, ``lo`` the first one's number; then call `HubSession.committed`."""

    key: Key
    lo: int
    records: list[msgspec.Raw]


@dataclass(frozen=True)
class Buried:
    """Records ``lo`` to ``hi`` will never come; commit that, then call `HubSession.committed`."""

    key: Key
    lo: int
    hi: int
    reason: str
    count: int


@dataclass(frozen=True)
class Left:
    """The agent says that it will be silent."""

    reason: str
    until: float


AgentNews = Welcomed | Acked | Dropped | Desired | Command | Goaway
HubNews = Greeted | Opened | Apply | Buried | Left


class Base:
    """What both ends do alike: answer heartbeats, send them, notice silence."""

    def __init__(self, now: float, heartbeat: float) -> None:
        self.heartbeat = heartbeat
        self.closing: Closing | None = None
        self.unknown: dict[int, int] = {}
        self._heard = now
        self._said = now
        self._nonce = 0
        self.beats_answered = 0

    def _hear(self, message: object, now: float) -> bool:
        """Note that the peer lives; return False for what needs no more than that."""
        self._heard = now
        if isinstance(message, Unknown):
            tag = message.tag if message.tag in self.unknown or len(self.unknown) < MOST_UNKNOWN else -1
            self.unknown[tag] = self.unknown.get(tag, 0) + 1
            return False
        if isinstance(message, HeartbeatAck):
            self.beats_answered += 1
            return False
        return True

    def heard(self, now: float) -> None:
        """Note bytes that are not yet a whole message."""
        self._heard = now

    def _close(self, code: int, reason: str) -> None:
        if self.closing is None:
            self.closing = Closing(code, reason)

    def _silent(self, now: float) -> bool:
        if now - self._heard < SILENCE * self.heartbeat:
            return False
        self._close(1006, f"nothing was heard for {SILENCE * self.heartbeat:g} s")
        return True
