"""The backend's end of a session. Use `protocol.session`."""

from collections import deque

import msgspec

from protocol.codec import Unknown
from protocol.messages import (
    Ack,
    AgentMessage,
    Bye,
    Close,
    Command,
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
from protocol.session_base import (
    MOST_STREAMS,
    SILENCE,
    WELCOME_WITHIN,
    Apply,
    Base,
    Buried,
    Greeted,
    HubNews,
    Key,
    Left,
    Opened,
)

LAST = 2**63 - 1
"""The largest number of a record and of an epoch: what a database calls a big integer."""


class HubSession(Base):
    """The backend's end of one connection."""

    def __init__(self, now: float, heartbeat: float = 15.0) -> None:
        super().__init__(now, heartbeat)
        self.hello: Hello | None = None
        self.welcomed = False
        self._began = now
        self._out: deque[HubMessage] = deque()
        self._keys: dict[int, Key] = {}
        self._received: dict[Key, int] = {}
        """What has come of each stream; -1 for one that is refused."""
        self._durable: dict[Key, int] = {}
        """What of that is committed: the only number an acknowledgement may carry."""
        self._acks: dict[int, int] = {}

    def __repr__(self) -> str:
        state = "closing" if self.closing else "open" if self.welcomed else "awaiting HELLO"
        return f"<HubSession {state}, {len(self._keys)} streams>"

    def receive(self, message: AgentMessage | Unknown, now: float) -> list[HubNews]:
        """Take what the agent sent; return what the shell must do, in order."""
        if not self._hear(message, now) or self.closing:
            return []
        if isinstance(message, Hello):
            return self._greeted(message)
        if isinstance(message, Heartbeat):
            # At any time: an agent that has slept asks for a sign of life, also while it waits for WELCOME.
            self._out.append(HeartbeatAck(message.nonce))
            return []
        if not self.welcomed:
            self._close(Close.MALFORMED, "a message came before HELLO was answered")
            return []
        match message:
            case Open(stream=head):
                return self._opened(head)
            case Data(sid=sid, lo=lo, records=records):
                return self._data(sid, lo, records)
            case Tomb():
                return self._tomb(message)
            case Bye(reason=reason, until=until):
                return [Left(reason, until)]
        return []

    def _greeted(self, hello: Hello) -> list[HubNews]:
        if self.hello is not None:
            self._close(Close.MALFORMED, "a second HELLO")
            return []
        if any(head.epoch > LAST for head in hello.streams):
            self._close(Close.MALFORMED, "an epoch has at most 63 bits")
            return []
        self.hello = hello
        for head in hello.streams:
            self._keys[head.sid] = Key(head.epoch, head.scope, head.lane)
        return [Greeted(hello)]

    def _opened(self, head: StreamHead) -> list[HubNews]:
        key = Key(head.epoch, head.scope, head.lane)
        if head.epoch > LAST:
            self._close(Close.MALFORMED, "an epoch has at most 63 bits")
            return []
        if head.sid in self._keys or key in self._received:
            self._close(Close.MALFORMED, f"stream {head.sid} was opened twice")
            return []
        if len(self._keys) >= MOST_STREAMS:
            self._close(Close.RATE, f"more than {MOST_STREAMS} streams on one connection")
            return []
        self._keys[head.sid] = key
        return [Opened(key)]

    def welcome(self, session_id: str, acks: dict[Key, int], server_time: float) -> None:
        """Answer HELLO with what is durable of each stream it named (0 where nothing is)."""
        self.welcomed = True
        self._received = {key: acks.get(key, 0) for key in self._keys.values()}
        self._durable = dict(self._received)
        positions = [StreamAck(sid, self._received[key]) for sid, key in self._keys.items()]
        self._out.append(Welcome(session_id, positions, self.heartbeat, server_time=server_time))

    def position(self, key: Key, ack: int) -> None:
        """Answer `Opened`: what is durable of a stream."""
        self._received[key] = self._durable[key] = ack

    def refuse(self, key: Key, reason: str) -> None:
        """Refuse one stream for good; what still comes of it is passed over."""
        for sid, known in self._keys.items():
            if known == key:
                self._received[key] = -1
                self._out.append(StreamClosed(sid, reason))

    def refuses(self, scope: str) -> bool:
        """Tell whether a stream of ``scope`` was refused on this connection."""
        return any(key.scope == scope and received < 0 for key, received in self._received.items())

    def close(self, code: int, reason: str) -> None:
        """End the connection with a reason the agent can act on."""
        self._close(code, reason)

    def say(self, message: Desired | Command | Goaway) -> None:
        """Queue a message that is not the session's own."""
        self._out.append(message)

    def _data(self, sid: int, lo: int, records: list[msgspec.Raw]) -> list[HubNews]:
        key = self._keys.get(sid)
        if key is None:
            self._close(Close.MALFORMED, f"stream {sid} was never opened")
            return []
        have = self._received.get(key)
        if have is None:
            self._close(Close.MALFORMED, f"stream {sid} has no position yet")
            return []
        if have < 0:
            return []
        hi = lo + len(records) - 1
        if lo > have + 1:
            self._close(Close.GAP, f"record {lo} came after {have}")
            return []
        if hi <= have:
            self._acknowledge(sid, key)
            return []
        self._received[key] = hi
        return [Apply(key, have + 1, records[have + 1 - lo :])]

    def _tomb(self, tomb: Tomb) -> list[HubNews]:
        key = self._keys.get(tomb.sid)
        if key is None or not tomb.lo <= tomb.hi <= LAST:
            self._close(Close.MALFORMED, f"a tombstone for {tomb.lo} to {tomb.hi} of stream {tomb.sid}")
            return []
        have = self._received.get(key, -1)
        if have < 0:
            return []
        if tomb.hi <= have:
            self._acknowledge(tomb.sid, key)
            return []
        if tomb.lo > have + 1:
            self._close(Close.GAP, f"tombstone {tomb.lo} came after {have}")
            return []
        self._received[key] = tomb.hi
        return [Buried(key, have + 1, tomb.hi, tomb.reason, tomb.count)]

    def committed(self, key: Key, seq: int) -> None:
        """Note that the store holds the stream up to ``seq``, durably: only now may it be acknowledged."""
        self._durable[key] = max(seq, self._durable.get(key, 0))
        for sid, known in self._keys.items():
            if known == key and self._received.get(key, -1) >= 0:
                self._acknowledge(sid, key)

    def _acknowledge(self, sid: int, key: Key) -> None:
        # A REST append that was carried out late may have stored more than came on this connection. The agent
        # would take the acknowledgement of what it has not sent here for a defect.
        self._acks[sid] = min(self._durable[key], self._received[key])

    def tick(self, now: float) -> float:
        """Do what is due; return when to call again."""
        if self.closing:
            return now
        if self.hello is None and now - self._began >= WELCOME_WITHIN:
            self._close(1002, f"no HELLO within {WELCOME_WITHIN:g} s")
            return now
        if self._silent(now):
            return now
        silent = self._heard + SILENCE * self.heartbeat
        return silent if self.hello is not None else min(silent, self._began + WELCOME_WITHIN)

    def outgoing(self, now: float) -> list[HubMessage]:
        """Take what must be sent now; acknowledgements are gathered into one frame."""
        if self._acks:
            self._out.append(Ack([StreamAck(sid, seq) for sid, seq in self._acks.items()]))
            self._acks = {}
        taken = list(self._out)
        self._out.clear()
        if taken:
            self._said = now
        return taken
