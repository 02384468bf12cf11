"""The agent's end of a session. Use `protocol.session`."""

from collections import deque
from dataclasses import dataclass

import msgspec

from protocol.codec import Unknown
from protocol.fields import MAX_FRAME
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
    FRAME_HEAD,
    FRAME_TARGET,
    SILENCE,
    WELCOME_WITHIN,
    Acked,
    AgentNews,
    Base,
    Dropped,
    Key,
    Welcomed,
)


@dataclass
class _Sending:
    """Where the agent stands with one stream."""

    sid: int
    last: int
    sent: int
    acked: int


class AgentSession(Base):
    """The agent's end of one connection."""

    def __init__(self, hello: Hello, now: float, heartbeat: float = 15.0) -> None:
        super().__init__(now, heartbeat)
        self.welcome: Welcome | None = None
        self._began = now
        self._out: deque[AgentMessage] = deque([hello])
        self._streams: dict[Key, _Sending] = {}
        self._ready: set[Key] = set()
        self._keys: dict[int, Key] = {}
        self._flight: deque[tuple[Key, int, int, int]] = deque()
        self._flight_records = 0
        self._flight_bytes = 0
        self._epoch = hello.epoch
        self._refused: set[Key] = set()
        self._unsaid: list[Open | Bye] = []
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
        self._mark(key, _Sending(head.sid, head.last, before, before))
        self._keys[head.sid] = key
        self._sid = max(self._sid, head.sid)
        return key

    def _mark(self, key: Key, stream: _Sending) -> None:
        """Keep where a stream stands, and whether it has something to send."""
        self._streams[key] = stream
        if stream.sent < stream.last:
            self._ready.add(key)
        else:
            self._ready.discard(key)

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
                self._ready.discard(key)
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
                self._mark(key, stream)
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
            # A read may have brought these records already, when they were committed while it ran.
            self._mark(key, stream)

    def next_read(self) -> tuple[Key, int, int] | None:
        """Return (stream, after which number, bytes at most) to read from the journal and `send`, or None.

        Most urgent lane first; within a lane older epochs come first, since they were opened first.
        """
        if self.welcome is None or self.closing:
            return None
        room = self.welcome.window_bytes - self._flight_bytes
        if self._flight_records >= self.welcome.window_records or (room <= 0 and self._flight):
            return None
        if not self._ready:
            return None
        key = min(self._ready, key=lambda one: (one.lane, self._streams[one].sid))
        return key, self._streams[key].sent, min(max(room, 4096), self.frame_room, FRAME_TARGET)

    def send(self, key: Key, lo: int, bodies: list[bytes]) -> None:
        """Queue records read from the journal: ``lo`` is the first one's number."""
        stream = self._streams.get(key)
        if stream is None or not bodies:
            return
        assert lo == stream.sent + 1, f"{lo} does not follow {stream.sent}"
        stream.sent = lo + len(bodies) - 1
        self._mark(key, stream)
        size = sum(map(len, bodies))
        self._flight.append((key, stream.sent, len(bodies), size))
        self._flight_records += len(bodies)
        self._flight_bytes += size
        self._out.append(Data(stream.sid, lo, [msgspec.Raw(body) for body in bodies]))

    def key(self, sid: int) -> Key | None:
        """Return the stream of a number; None for one that is not open."""
        return self._keys.get(sid)

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
        self._mark(key, stream)
        self._flight.append((key, hi, 1, 0))
        self._flight_records += 1
        self._out.append(Tomb(stream.sid, lo, hi, reason, hi - lo + 1))  # type: ignore[arg-type]  # checked by the encoder's peer

    def bye(self, reason: str, until: float = 0.0) -> None:
        """Queue the word that explains a planned silence; before WELCOME it waits for that."""
        (self._unsaid if self.welcome is None else self._out).append(Bye(reason, until))

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
