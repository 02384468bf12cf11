"""The conversation of an agent and a backend, without I/O: both ends use it.

Feed a session what arrived and what time it is; drain what it wants sent and what it has to
say. It opens no socket, reads no clock and stores nothing: records are read from the
journal, and committed to the store, by the shell around it.
"""

from collections import deque
from dataclasses import dataclass

import msgspec

from protocol.codec import Unknown
from protocol.messages import (
    MAX_FRAME,
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

SILENCE = 2.5
"""A peer is dead after this many heartbeat intervals without a byte."""
WELCOME_WITHIN = 10.0
"""Seconds from HELLO to WELCOME."""
FRAME_TARGET = 64 * 1024
"""Bytes of records in one DATA frame, unless a single record is larger: on a slow line what is urgent
waits for one frame, and an acknowledgement comes with each."""
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


class _Base:
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
            self.unknown[message.tag] = self.unknown.get(message.tag, 0) + 1
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


@dataclass
class _Sending:
    """Where the agent stands with one stream."""

    sid: int
    last: int
    sent: int
    acked: int


class AgentSession(_Base):
    """The agent's end of one connection."""

    def __init__(self, hello: Hello, now: float, heartbeat: float = 15.0) -> None:
        super().__init__(now, heartbeat)
        self.welcome: Welcome | None = None
        self._began = now
        self._out: deque[AgentMessage] = deque([hello])
        self._streams: dict[Key, _Sending] = {}
        self._keys: dict[int, Key] = {}
        self._flight: deque[tuple[Key, int, int, int]] = deque()
        self._flight_records = 0
        self._flight_bytes = 0
        self._epoch = hello.epoch
        self._refused: set[Key] = set()
        self._unsaid: list[Open] = []
        self._sid = 0
        """The highest ever used: a number is not used again after its stream was refused."""
        for head in hello.streams:
            self._add(head)

    def __repr__(self) -> str:
        state = "closing" if self.closing else "open" if self.welcome else "greeting"
        return f"<AgentSession {state}, {len(self._streams)} streams, {self._flight_records} in flight>"

    def _add(self, head: StreamHead) -> Key:
        key = Key(head.epoch, head.scope, head.lane)
        before = head.first - 1
        self._streams[key] = _Sending(head.sid, head.last, before, before)
        self._keys[head.sid] = key
        self._sid = max(self._sid, head.sid)
        return key

    @property
    def frame_room(self) -> int:
        """Bytes of records that one DATA frame may hold, in the encoding of this connection."""
        return min(self.welcome.max_frame, MAX_FRAME) - FRAME_HEAD if self.welcome else 0

    @property
    def in_flight(self) -> int:
        """Records sent and not yet acknowledged."""
        return self._flight_records

    def receive(self, message: HubMessage | Unknown, now: float) -> list[AgentNews]:
        """Take what the backend sent; return what the shell must do."""
        if not self._hear(message, now) or self.closing:
            return []
        match message:
            case Welcome():
                return self._welcomed(message)
            case Heartbeat(nonce=nonce):
                self._out.append(HeartbeatAck(nonce))
                return []
            case _ if self.welcome is None:
                self._close(Close.MALFORMED, "a message came before WELCOME")
                return []
            case Ack(acks=acks):
                return self._acknowledged(acks)
            case Desired() | Command() | Goaway():
                return [message]
            case StreamClosed(sid=sid, reason=reason):
                key = self._keys.pop(sid, None)
                if key is None:
                    return []
                self._refused.add(key)
                self._forget_flight(key, self._streams.pop(key).last)
                return [Dropped(key, reason)]
        return []

    def _welcomed(self, message: Welcome) -> list[AgentNews]:
        if self.welcome is not None:
            self._close(Close.MALFORMED, "a second WELCOME")
            return []
        self.welcome = message
        # The owner may want a sharper eye than the backend asks for, never a duller one.
        self.heartbeat = min(self.heartbeat, message.heartbeat_s)
        # A backend may answer HELLO in its own time, and must not meet a stream in between.
        self._out.extend(self._unsaid)
        self._unsaid.clear()
        known = {ack.sid: ack.seq for ack in message.acks}
        news: list[AgentNews] = [Welcomed(message.session_id, message.server_time)]
        for key, stream in self._streams.items():
            seq = known.get(stream.sid, 0)
            if seq > stream.last and key.epoch != self._epoch:
                # This journal was restored from an older copy; what it holds of the stream is there already.
                seq = stream.last
            if seq > stream.last:
                self._close(
                    Close.GAP, f"the backend acknowledges {seq} of a stream that ends at {stream.last}"
                )
                return []
            if seq >= stream.acked:
                stream.acked = stream.sent = seq
                if seq:
                    news.append(Acked(key, seq))
            else:
                # The backend was restored from an older state, and what it lacks is deleted here.
                lost = stream.acked - seq
                self._out.append(Tomb(stream.sid, seq + 1, stream.acked, "trimmed", lost))
        return news

    def _acknowledged(self, acks: list[StreamAck]) -> list[AgentNews]:
        news: list[AgentNews] = []
        for ack in acks:
            key = self._keys.get(ack.sid)
            if key is None:
                continue
            stream = self._streams[key]
            if ack.seq > stream.sent:
                self._close(
                    Close.GAP, f"the backend acknowledges {ack.seq}, but {stream.sent} was the last sent"
                )
                return news
            if ack.seq > stream.acked:
                stream.acked = ack.seq
                self._forget_flight(key, ack.seq)
                news.append(Acked(key, ack.seq))
        return news

    def _forget_flight(self, key: Key, seq: int) -> None:
        kept: deque[tuple[Key, int, int, int]] = deque()
        for entry in self._flight:
            if entry[0] == key and entry[1] <= seq:
                self._flight_records -= entry[2]
                self._flight_bytes -= entry[3]
            else:
                kept.append(entry)
        self._flight = kept

    def appended(self, key: Key, last: int) -> None:
        """Note that the journal holds the stream up to ``last``.

        A stream that is new is opened; one that the backend has refused on this connection is not.
        """
        stream = self._streams.get(key)
        if stream is None:
            if key in self._refused:
                return
            self._sid += 1
            head = StreamHead(self._sid, key.epoch, key.scope, key.lane, 1, last)
            self._add(head)
            (self._unsaid if self.welcome is None else self._out).append(Open(head))
        elif last > stream.last:
            stream.last = last

    def next_read(self) -> tuple[Key, int, int] | None:
        """Return (stream, after which number, bytes at most) to read from the journal and `send`, or None.

        Most urgent lane first; within a lane older epochs come first, since they were opened first.
        """
        if self.welcome is None or self.closing:
            return None
        room = self.welcome.window_bytes - self._flight_bytes
        if self._flight_records >= self.welcome.window_records or (room <= 0 and self._flight):
            return None
        ready = [key for key, stream in self._streams.items() if stream.sent < stream.last]
        if not ready:
            return None
        key = min(ready, key=lambda one: (one.lane, self._streams[one].sid))
        return key, self._streams[key].sent, min(max(room, 4096), self.frame_room, FRAME_TARGET)

    def send(self, key: Key, lo: int, bodies: list[bytes]) -> None:
        """Queue records read from the journal: ``lo`` is the first one's number."""
        stream = self._streams.get(key)
        if stream is None or not bodies:
            return
        assert lo == stream.sent + 1, f"{lo} does not follow {stream.sent}"
        stream.sent = lo + len(bodies) - 1
        size = sum(map(len, bodies))
        self._flight.append((key, stream.sent, len(bodies), size))
        self._flight_records += len(bodies)
        self._flight_bytes += size
        self._out.append(Data(stream.sid, lo, [msgspec.Raw(body) for body in bodies]))

    def last(self, key: Key) -> int:
        """Return the last number that was announced of a stream; 0 for one that is not open."""
        stream = self._streams.get(key)
        return stream.last if stream else 0

    def bury(self, key: Key, lo: int, hi: int, reason: str) -> None:
        """Queue a tombstone for records that the journal cannot give any more."""
        stream = self._streams.get(key)
        if stream is None or hi < lo:
            return
        assert lo == stream.sent + 1
        stream.sent = hi
        self._flight.append((key, hi, 1, 0))
        self._flight_records += 1
        self._out.append(Tomb(stream.sid, lo, hi, reason, hi - lo + 1))  # type: ignore[arg-type]  # checked by the encoder's peer

    def bye(self, reason: str, until: float = 0.0) -> None:
        """Queue the word that explains a planned silence."""
        self._out.append(Bye(reason, until))

    def probe(self, now: float, within: float = 5.0) -> None:
        """Ask for a sign of life within ``within`` seconds: after a sleep, when the clock jumped."""
        self._beat(now)
        self._heard = min(self._heard, now - SILENCE * self.heartbeat + within)

    def tick(self, now: float, backlog: list[int] | None = None) -> float:
        """Do what is due; return when to call again."""
        dead = self.watch(now)
        if self.closing or self.welcome is None:
            return dead
        if now - self._said >= self.heartbeat:
            self._beat(now, backlog)
        return min(self._said + self.heartbeat, dead)

    def watch(self, now: float) -> float:
        """Close the connection if the backend has been silent for too long; return when to look again."""
        if self.closing:
            return now
        if self.welcome is None:
            if now - self._began >= WELCOME_WITHIN:
                self._close(1006, f"no WELCOME within {WELCOME_WITHIN:g} s")
            return self._began + WELCOME_WITHIN
        if self._silent(now):
            return now
        return self._heard + SILENCE * self.heartbeat

    def _beat(self, now: float, backlog: list[int] | None = None) -> None:
        self._nonce += 1
        self._said = now
        self._out.append(Heartbeat(self._nonce, 0.0, backlog or []))

    def outgoing(self, now: float) -> list[AgentMessage]:
        """Take what must be sent now."""
        taken = list(self._out)
        self._out.clear()
        if taken:
            self._said = now
        return taken


class HubSession(_Base):
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
            case Heartbeat(nonce=nonce):
                self._out.append(HeartbeatAck(nonce))
            case Bye(reason=reason, until=until):
                return [Left(reason, until)]
        return []

    def _greeted(self, hello: Hello) -> list[HubNews]:
        if self.hello is not None:
            self._close(Close.MALFORMED, "a second HELLO")
            return []
        self.hello = hello
        for head in hello.streams:
            self._keys[head.sid] = Key(head.epoch, head.scope, head.lane)
        return [Greeted(hello)]

    def _opened(self, head: StreamHead) -> list[HubNews]:
        key = Key(head.epoch, head.scope, head.lane)
        if head.sid in self._keys or key in self._received:
            self._close(Close.MALFORMED, f"stream {head.sid} was opened twice")
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
            self._acks[sid] = self._durable[key]
            return []
        self._received[key] = hi
        return [Apply(key, have + 1, records[have + 1 - lo :])]

    def _tomb(self, tomb: Tomb) -> list[HubNews]:
        key = self._keys.get(tomb.sid)
        if key is None or tomb.hi < tomb.lo:
            self._close(Close.MALFORMED, f"a tombstone for {tomb.lo} to {tomb.hi} of stream {tomb.sid}")
            return []
        have = self._received.get(key, -1)
        if have < 0:
            return []
        if tomb.hi <= have:
            self._acks[tomb.sid] = self._durable[key]
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
                self._acks[sid] = self._durable[key]

    def tick(self, now: float) -> float:
        """Do what is due; return when to call again."""
        if self.closing:
            return now
        if self.hello is None and now - self._began >= WELCOME_WITHIN:
            self._close(1002, f"no HELLO within {WELCOME_WITHIN:g} s")
            return now
        if self._silent(now):
            return now
        return self._heard + SILENCE * self.heartbeat

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
