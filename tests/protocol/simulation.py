"""An agent, a backend and a bad network between them, all from one seed and without a clock.

`python -m tests.protocol.simulation --schedules 100000 --seed 0` runs so many and prints what happened.

Both ends are the real sessions with the real codec. What is made up is what surrounds them: a
journal, a store whose commits take their time, connections that lose whatever is on the way, and
REST appends while there is no connection, which may be carried out when nobody waits for them any more.
"""

import random
import sys
from collections import Counter, deque
from dataclasses import dataclass, field

import msgspec

from protocol.codec import Codec, encode_record
from protocol.messages import SUBPROTOCOLS, Close, Hello, StreamHead
from protocol.records import Notice
from protocol.session import (
    Acked,
    AgentSession,
    Apply,
    Buried,
    Greeted,
    HubSession,
    Key,
    Opened,
)
from tests.protocol.golden import MACHINE
from tests.support.schedules import many

HEARTBEAT = 15.0
PART = b""
"""A frame that was cut in its middle: bytes came, and no message."""


@dataclass
class Journal:
    """What the agent's disk holds."""

    boot: int = 0
    epoch: int = 0
    streams: dict[Key, list[bytes | None]] = field(default_factory=dict)
    """None: the disk has damaged it, and it is buried instead of sent."""
    acked: dict[Key, int] = field(default_factory=dict)

    def heads(self) -> list[StreamHead]:
        """Return the streams that have something to send, and all of this epoch, oldest first."""
        wanted = [
            key
            for key, rows in self.streams.items()
            if self.acked[key] < len(rows) or key.epoch == self.epoch
        ]
        return [
            StreamHead(sid, key.epoch, key.scope, key.lane, self.acked[key] + 1, len(self.streams[key]))
            for sid, key in enumerate(wanted, start=1)
        ]


@dataclass
class Store:
    """What the backend's disk holds."""

    rows: dict[Key, list[str | None]] = field(default_factory=dict)
    """None: buried."""
    owner: tuple[int, int] = (0, 0)

    def have(self, key: Key) -> int:
        """Return up to where the stream is durable."""
        return len(self.rows.get(key, []))

    def take(self, key: Key, lo: int, texts: list[str | None]) -> int | None:
        """Append what is new, in one transaction; None where records before it are missing."""
        have = self.have(key)
        if lo > have + 1:
            return None
        self.rows.setdefault(key, []).extend(texts[have + 1 - lo :] if lo + len(texts) - 1 > have else [])
        return self.have(key)

    def copy(self) -> "Store":
        """Return a backup."""
        return Store({key: list(rows) for key, rows in self.rows.items()}, self.owner)


@dataclass
class Wire:
    """A connection: what is on the way in each direction, and both ends as they see it."""

    codec: Codec
    agent: AgentSession
    hub: HubSession
    up: deque[bytes] = field(default_factory=deque)
    down: deque[bytes] = field(default_factory=deque)
    commits: deque[tuple[Key, int, list[str | None]]] = field(default_factory=deque)
    cut: bool = False
    """Nothing more gets through; an end may not know yet."""
    agent_gone: bool = False
    hub_gone: bool = False
    owner: tuple[int, int] = (0, 0)


@dataclass(eq=False)
class Append:
    """A REST append on its way."""

    key: Key
    lo: int
    texts: list[str | None]


class World:
    """One run. Everything that can happen is a method; ``run`` makes a schedule of them."""

    def __init__(self, seed: int, *, restores: bool = False) -> None:
        self.random = random.Random(seed)
        self.restores = restores
        self.now = 1000.0
        self.journal = Journal()
        self.store = Store()
        self.backup = Store()
        self.wires: list[Wire] = []
        self.produced: dict[Key, list[str | None]] = {}
        self.appends: list[Append] = []
        self.awaited: Append | None = None
        """The one whose answer the agent waits for: it makes one at a time."""
        self.attempt = 0
        self.happened: Counter[str] = Counter()
        self.refused: list[tuple[int, str]] = []
        """Where an end found fault with the other; silence and takeovers are no faults."""
        self.restart_agent()

    @property
    def wire(self) -> Wire | None:
        """The agent's connection, if it has one: it never has two."""
        return next((wire for wire in self.wires if not wire.agent_gone), None)

    # The agent

    def restart_agent(self) -> None:
        """Kill the agent and start it: its connection is left open at the other end."""
        if self.wire:
            self.wire.agent_gone = True
        self.awaited = None
        self.journal.boot += 1
        self.journal.epoch = self.random.getrandbits(63)
        self.attempt = 0

    def produce(self) -> None:
        """Append to a stream of this epoch."""
        key = Key(self.journal.epoch, self.random.choice(["", "job-1", "job-2"]), self.random.randrange(3))
        rows = self.journal.streams.setdefault(key, [])
        self.journal.acked.setdefault(key, 0)
        for _ in range(self.random.choice([1, 1, 1, 3, 20])):
            text = f"{key.scope}/{key.lane}/{len(rows) + 1}"
            damaged = self.random.random() < 0.03
            rows.append(None if damaged else encode_record(Notice(0.0, "info", text)))
            self.produced.setdefault(key, []).append(None if damaged else text)

    def dial(self) -> None:
        """Connect, dropping what connection there was."""
        if self.wire:
            self.wire.agent_gone = True
        # REST is stopped before HELLO; what it had sent may still be carried out.
        self.awaited = None
        self.attempt += 1
        hello = Hello(
            "agent_0123456789abcdef",
            "i",
            self.journal.boot,
            self.attempt,
            self.journal.epoch,
            MACHINE,
            self.journal.heads(),
        )
        codec = Codec(self.random.choice(SUBPROTOCOLS))
        self.wires.append(Wire(codec, AgentSession(hello, self.now), HubSession(self.now)))

    def agent_writes(self) -> None:
        """Do what the writing half of the agent's link does once."""
        wire = self.wire
        if wire is None:
            self.dial()
            return
        session = wire.agent
        for key, rows in self.journal.streams.items():
            if self.journal.acked[key] < len(rows) or key.epoch == self.journal.epoch:
                session.appended(key, len(rows))
        if (wish := session.next_read()) is not None:
            key, after, _ = wish
            ahead = self.journal.streams[key][after : after + self.random.choice([1, 2, 50])]
            damaged = [body is None for body in ahead]
            if damaged[0]:
                run = damaged.index(False) if False in damaged else len(damaged)
                session.bury(key, after + 1, after + run, "corrupt")
            else:
                run = damaged.index(True) if True in damaged else len(damaged)
                session.send(key, after + 1, [body for body in ahead[:run] if body is not None])
        session.tick(self.now)
        for message in session.outgoing(self.now):
            if not wire.cut:
                wire.up.append(wire.codec.encode(message))
        if session.closing:
            if session.closing.code >= Close.DRAIN:
                self.refused.append((session.closing.code, session.closing.reason))
            wire.agent_gone = True

    def agent_reads(self) -> None:
        """Take one frame."""
        wire = self.wire
        if wire is None or not wire.down:
            return
        frame = wire.down.popleft()
        if frame == PART:
            wire.agent.heard(self.now)
            return
        for news in wire.agent.receive(wire.codec.decode_hub(frame), self.now):
            if isinstance(news, Acked):
                key, seq = news.key, news.seq
                self.journal.acked[key] = max(seq, self.journal.acked[key])

    def append(self) -> None:
        """Send some records by REST, while there is no connection and no other append to wait for."""
        waiting = [key for key, rows in self.journal.streams.items() if self.journal.acked[key] < len(rows)]
        if self.wire or self.awaited or not waiting:
            return
        key = min(waiting, key=lambda one: one.lane)
        after = self.journal.acked[key]
        self.awaited = Append(
            key, after + 1, self.produced[key][after : after + self.random.choice([1, 3, 50])]
        )
        self.appends.append(self.awaited)
        self.happened["append"] += 1

    # The backend

    def take_append(self) -> None:
        """Carry out a REST append, an abandoned one too; its answer may be lost."""
        if not self.appends:
            return
        append = self.appends.pop(self.random.randrange(len(self.appends)))
        have = self.store.take(append.key, append.lo, append.texts)
        if append is not self.awaited:
            self.happened["late append"] += 1
            return
        self.awaited = None
        if have is not None and self.random.random() < 0.7:
            self.journal.acked[append.key] = max(have, self.journal.acked[append.key])
        else:
            self.happened["lost answer"] += 1

    def hub_reads(self) -> None:
        """Take one frame of any connection, of an abandoned one too: what was sent may still arrive."""
        for wire in self.random.sample(self.wires, len(self.wires)):
            if wire.hub_gone or not wire.up:
                continue
            frame = wire.up.popleft()
            if frame == PART:
                wire.hub.heard(self.now)
                return
            message = wire.codec.decode_agent(frame)
            for news in wire.hub.receive(message, self.now):
                if isinstance(news, Greeted):
                    self._greet(wire, news.hello)
                elif isinstance(news, Opened):
                    wire.hub.position(news.key, self.store.have(news.key))
                elif isinstance(news, Apply):
                    texts = [wire.codec.decode_record(raw).text for raw in news.records]  # type: ignore[union-attr]
                    wire.commits.append((news.key, news.lo, texts))
                elif isinstance(news, Buried):
                    wire.commits.append((news.key, news.lo, [None] * (news.hi - news.lo + 1)))
            self._hub_writes(wire)
            return

    def _greet(self, wire: Wire, hello: Hello) -> None:
        wire.owner = (hello.boot, hello.attempt)
        if wire.owner <= self.store.owner:
            wire.hub.close(Close.STALE, f"{self.store.owner} owns this id")
            return
        self.store.owner = wire.owner
        for other in self.wires:
            if other is not wire and not other.hub_gone:
                # Fenced first, and what it had not committed goes with it.
                other.hub_gone = True
                other.commits.clear()
        keys = [Key(head.epoch, head.scope, head.lane) for head in hello.streams]
        wire.hub.welcome("s", {key: self.store.have(key) for key in keys}, 0.0)

    def _hub_writes(self, wire: Wire) -> None:
        wire.hub.tick(self.now)
        for message in wire.hub.outgoing(self.now):
            if not wire.cut:
                wire.down.append(wire.codec.encode(message))
        if wire.hub.closing:
            if wire.hub.closing.code > Close.STALE:
                self.refused.append((wire.hub.closing.code, wire.hub.closing.reason))
            wire.hub_gone = True

    def hub_commits(self) -> None:
        """Finish one transaction, and say so."""
        for wire in self.wires:
            if wire.hub_gone or not wire.commits:
                continue
            key, lo, texts = wire.commits.popleft()
            have = self.store.take(key, lo, texts)
            if have is None:
                wire.hub.close(Close.GAP, f"{lo} came after {self.store.have(key)}")
            else:
                wire.hub.committed(key, have)
            self._hub_writes(wire)
            return

    def restart_hub(self) -> None:
        """Kill the backend: what it had not committed is lost, and every connection with it."""
        for wire in self.wires:
            wire.hub_gone = True
            wire.commits.clear()
            wire.down.clear()
        if self.restores and self.random.random() < 0.3:
            self.store = self.backup.copy()
        if self.restores and self.random.random() < 0.5:
            self.backup = self.store.copy()

    # The network

    def cut(self) -> None:
        """End a connection: a part of what is on the way is lost, at either end's notice or not."""
        if not self.wires:
            return
        wire = self.random.choice(self.wires)
        wire.cut = True
        for queue in (wire.up, wire.down):
            while queue and self.random.random() < 0.7:
                queue.pop()
                self.happened["lost frame"] += 1
            if queue and self.random.random() < 0.3:
                queue[-1] = PART
                self.happened["frame cut"] += 1
        if self.random.random() < 0.7:
            wire.agent_gone = True
        if self.random.random() < 0.7:
            wire.hub_gone = True

    def _notice(self) -> None:
        """An end learns of the other's absence once everything on the way has been read."""
        for wire in list(self.wires):
            if wire.hub_gone and not wire.down:
                wire.agent_gone = True
            if wire.agent_gone and not wire.up:
                wire.hub_gone = True
            if wire.agent_gone and wire.hub_gone:
                self.wires.remove(wire)

    def wait(self) -> None:
        """Let time go by."""
        self.now += self.random.choice([0.01, 0.1, 1.0, 20.0])

    def run(self, steps: int) -> None:
        """Let ``steps`` things happen, then let the network be good until nothing is left to do."""
        usual = [self.agent_writes, self.agent_reads, self.hub_reads, self.hub_commits]
        usual += [self.append, self.take_append]
        rare = [self.cut, self.dial, self.restart_hub, self.restart_agent, self.wait]
        for _ in range(steps):
            self._notice()
            draw = self.random.random()
            if draw < 0.12:
                self.produce()
            elif draw < 0.18:
                event = self.random.choice(rare)
                self.happened[event.__name__] += 1
                event()
            else:
                self.random.choice(usual)()
        self.calm()

    def calm(self) -> None:
        """Let the network be good until nothing is left to do."""
        while self.appends:
            self.take_append()
        for _ in range(5000):
            self._notice()
            # A cut that nobody has noticed ends by silence.
            self.now += 0.1
            for part in (self.agent_writes, self.hub_reads, self.hub_commits, self.agent_reads):
                part()
            rest = any(self.journal.acked[key] < len(rows) for key, rows in self.journal.streams.items())
            if not rest and self.wire and not self.wire.up and not self.wire.down:
                return
        raise AssertionError(f"it never comes to rest: {self.wire}, {self.refused[-3:]}")

    def stored(self) -> dict[Key, list[str | None]]:
        """Return what the backend has, without streams that are empty."""
        return {key: rows for key, rows in self.store.rows.items() if rows}


def raw(text: str) -> msgspec.Raw:
    """Return a record as the journal holds it."""
    return msgspec.Raw(encode_record(Notice(0.0, "info", text)))


def check(seed: int, steps: int = 250) -> Counter[str]:
    """Run one schedule; raise AssertionError where what is stored is not what was produced."""
    world = World(seed)
    world.run(steps)
    stored = world.stored()
    lost = sum(len(texts) - len(stored.get(key, [])) for key, texts in world.produced.items())
    assert stored == world.produced, f"the backend has other records; {lost} more were produced"
    assert world.refused == [], f"an end found fault with the other: {world.refused}"
    records = sum(map(len, stored.values()))
    return world.happened + Counter({"records": records})


if __name__ == "__main__":
    sys.exit(many(check, sys.argv[1:], prog="tests.protocol.simulation"))
