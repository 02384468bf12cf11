"""Both sessions between two real SQLite files: the agent's journal and the hub's database, under a state machine.

Hypothesis picks what happens next and shrinks what went wrong. Slower than the simulation of `tests.protocol` by
hundreds, and closer: numbers are given, deleted and remembered by the code that does it in the programs.
"""

import shutil
import sqlite3
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.hub import ingest, logs
from agent.hub.model import Job
from agent.hub.schema import SCHEMA
from agent.hub.tables import add_job
from agent.runtime.journal_schema import connect
from agent.runtime.journal_tables import Reader, Tx
from protocol.codec import Codec, encode_record
from protocol.messages import SUBPROTOCOL_MSGPACK, Hello, StreamHead
from protocol.records import LogChunk, Point
from protocol.session import Acked, AgentSession, Apply, Greeted, HubSession, Key, Opened
from tests.protocol.golden import MACHINE

AGENT, JOB = "agent_0123456789abcdef", "job"
CODEC = Codec(SUBPROTOCOL_MSGPACK)


class _Killed(Exception):
    """The process died before its commit."""


class Link(RuleBasedStateMachine):
    """One job's points and log lines, from the journal to the hub."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.attempt, self.boot, self.epoch = 0.0, 0, 0, 0
        self.lines: list[str] = []
        self.steps = 0
        self.agent: AgentSession | None = None
        self.hub: HubSession | None = None
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.applies: deque[Apply] = deque()
        self.late: list[tuple[Key, int, list[bytes]]] = []
        """REST appends that may be carried out at any time."""
        self.took: list[int] = []
        """Step of each point that the hub stored, as often as it did: its table holds none twice."""

    @initialize()
    def begin(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="machine-"))
        self.db = self._open_hub()
        self.db.executescript(SCHEMA)
        add_job(
            self.db,
            Job(id=JOB, agent_id=AGENT, token="t", config="{}", created_at=0.0, updated_at=0.0),
        )
        self._boot()

    def teardown(self) -> None:
        if hasattr(self, "db"):
            try:
                self._calm()
            finally:
                self.journal.close()
                self.db.close()
                shutil.rmtree(self.path)

    # The agent's end

    def _boot(self) -> None:
        self.journal, aside = connect(self.path / "journal.sqlite")
        assert aside is None
        self.boot += 1
        # Random in the agent; here it must only be new.
        self.epoch += 1
        self._change(lambda tx: tx.set_epoch(self.epoch))

    def _change(self, change: Callable[[Tx], object], *, killed: bool = False) -> None:
        self.journal.execute("BEGIN IMMEDIATE")
        change(Tx(self.journal, self.path / "journal.sqlite"))
        if not killed:
            self.journal.execute("COMMIT")

    def _read(self) -> Reader:
        return Reader(self.journal)

    def _produced(self, lane: int, count: int) -> list[bytes]:
        if lane == 1:
            return [
                encode_record(Point(0.0, 1, self.steps + number, 0.0, 1, [1.0]))
                for number in range(1, count + 1)
            ]
        at = len(self.lines)
        return [
            encode_record(LogChunk(0.0, 1, at + number, [f"line {at + number}"])) for number in range(count)
        ]

    @rule(lane=st.sampled_from([1, 2]), count=st.integers(1, 5))
    def produce(self, lane: int, count: int) -> None:
        bodies = self._produced(lane, count)
        self._change(lambda tx: tx.append_all(JOB, lane, bodies))
        if lane == 1:
            self.steps += count
        else:
            self.lines += [f"line {len(self.lines) + number}" for number in range(count)]
        if self.agent is not None:
            for stream in self._read().streams():
                self.agent.appended(Key(stream.epoch, stream.scope, stream.lane), stream.last)

    @rule(lane=st.sampled_from([1, 2]))
    def killed_before_the_commit(self, lane: int) -> None:
        bodies = self._produced(lane, 2)
        self._change(lambda tx: tx.append_all(JOB, lane, bodies), killed=True)
        self.restart_agent()

    @rule()
    def restart_agent(self) -> None:
        self.journal.close()
        self.attempt = 0
        self.cut()
        self._boot()

    @rule()
    def dial(self) -> None:
        self.cut()
        self.attempt += 1
        heads = [
            StreamHead(sid, stream.epoch, stream.scope, stream.lane, stream.first, stream.last)
            for sid, stream in enumerate(self._read().streams(), start=1)
        ]
        hello = Hello(AGENT, "i", self.boot, self.attempt, self.epoch, MACHINE, heads)
        self.agent, self.hub = AgentSession(hello, self.now), HubSession(self.now)

    @precondition(lambda self: self.agent is not None)
    @rule(limit=st.integers(1, 4))
    def agent_writes(self, limit: int) -> None:
        assert self.agent is not None
        if (wish := self.agent.next_read()) is not None:
            key, after, size = wish
            rows = self._read().records(key.epoch, key.scope, key.lane, after, limit, size)
            assert [seq for seq, _ in rows] == list(range(after + 1, after + 1 + len(rows)))
            self.agent.send(key, after + 1, [body for _, body in rows if body is not None])
        self.up += [CODEC.encode(message) for message in self.agent.outgoing(self.now)]

    @precondition(lambda self: self.down)
    @rule()
    def agent_reads(self) -> None:
        assert self.agent is not None
        for news in self.agent.receive(CODEC.decode_hub(self.down.popleft()), self.now):
            if isinstance(news, Acked):
                key, seq = news.key, news.seq
                self._change(lambda tx, key=key, seq=seq: tx.trim(key.epoch, key.scope, key.lane, seq))  # type: ignore[misc]
        assert self.agent.closing is None, self.agent.closing

    @rule(lane=st.sampled_from([1, 2]), answered=st.booleans(), late=st.booleans())
    def rest(self, lane: int, answered: bool, late: bool) -> None:
        """Append by REST; with a connection there, it was sent before that and is carried out later."""
        streams = [
            stream for stream in self._read().streams() if stream.lane == lane and stream.first <= stream.last
        ]
        if streams:
            stream = streams[0]
            key = Key(stream.epoch, stream.scope, stream.lane)
            rows = self._read().records(key.epoch, key.scope, key.lane, stream.first - 1, 4, 1 << 20)
            append = (key, stream.first, [body for _, body in rows if body is not None])
            if late or self.agent is not None:
                self.late.append(append)
                return
            ack = self._store(*append)
            if answered:
                self._change(lambda tx: tx.trim(key.epoch, key.scope, key.lane, ack))

    # The hub's end

    def _open_hub(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path / "hub.sqlite3", isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        return db

    def _store(self, key: Key, lo: int, bodies: list[bytes], *, killed: bool = False) -> int:
        """Apply records in one transaction; ``killed``: the hub dies before its commit."""
        self.db.execute("BEGIN IMMEDIATE")
        raws = [msgspec.Raw(body) for body in bodies]
        try:
            done = ingest.apply(self.db, AGENT, key, lo, raws, CODEC, 0.0)
        except ingest.Gap as gap:
            self.db.execute("ROLLBACK")
            return gap.ack
        if not killed:
            self.db.execute("COMMIT")
            self.took += [point.step for point, _ in done.points]
        return done.ack

    @precondition(lambda self: self.late)
    @rule(which=st.integers(0, 100))
    def late_rest(self, which: int) -> None:
        self._store(*self.late.pop(which % len(self.late)))

    @precondition(lambda self: self.up)
    @rule()
    def hub_reads(self) -> None:
        assert self.hub is not None
        for news in self.hub.receive(CODEC.decode_agent(self.up.popleft()), self.now):
            match news:
                case Greeted(hello=hello):
                    keys = [Key(head.epoch, head.scope, head.lane) for head in hello.streams]
                    acks = {key: ingest.position(self.db, AGENT, key) for key in keys}
                    self.hub.welcome("s", acks, 0.0)
                case Opened(key=key):
                    self.hub.position(key, ingest.position(self.db, AGENT, key))
                case Apply():
                    self.applies.append(news)
        assert self.hub.closing is None, self.hub.closing
        self._hub_writes()

    def _hub_writes(self) -> None:
        assert self.hub is not None
        self.down += [CODEC.encode(message) for message in self.hub.outgoing(self.now)]

    @precondition(lambda self: self.applies)
    @rule()
    def hub_commits(self) -> None:
        assert self.hub is not None
        one = self.applies.popleft()
        ack = self._store(one.key, one.lo, [bytes(raw) for raw in one.records])
        self.hub.committed(one.key, ack)
        self._hub_writes()

    @precondition(lambda self: self.applies)
    @rule()
    def hub_killed_before_its_commit(self) -> None:
        one = self.applies.popleft()
        self._store(one.key, one.lo, [bytes(raw) for raw in one.records], killed=True)
        self.db.close()
        self.db = self._open_hub()
        self.cut()

    # The network

    @rule(
        limit=st.sampled_from([1, 3, 50]),
        lane=st.sampled_from([1, 2]),
        late=st.sampled_from(["", "before", "after"]),
    )
    def all_goes_well(self, limit: int, lane: int, late: str = "") -> None:
        """One exchange; ``late``: an append of before is carried out before its commit, or after it."""
        if late:
            self.rest(lane, answered=False, late=True)
        if self.agent is None:
            self.dial()
        for _ in range(2):
            self.agent_writes(limit)
            while self.up:
                self.hub_reads()
            while self.down:
                self.agent_reads()
        if late == "before" and self.late:
            self.late_rest(-1)
        while self.applies:
            self.hub_commits()
        while self.down:
            self.agent_reads()
        if late == "after" and self.late:
            self.late_rest(-1)

    @rule()
    def cut(self) -> None:
        """All that is on its way is lost, and what the hub had not begun to store."""
        self.agent = self.hub = None
        for queue in (self.up, self.down, self.applies):
            queue.clear()

    @invariant()
    def the_hub_has_a_part_of_it_in_order(self) -> None:
        if hasattr(self, "db"):
            have, _ = logs.read(self.db, JOB, 10_000, 0)
            assert have == self.lines[: len(have)]

    def _calm(self) -> None:
        """Let everything go well until nothing is left; then all of it must be there."""
        while self.late:
            self.late_rest(0)
        self.dial()
        for _ in range(60):
            self.all_goes_well(50, 1)
            if all(stream.first > stream.last for stream in self._read().streams()):
                break
        else:
            raise AssertionError("not all was acknowledged")
        have, total = logs.read(self.db, JOB, 10_000, 0)
        assert (have, total) == (self.lines, len(self.lines))
        steps = [row[0] for row in self.db.execute("SELECT step FROM points ORDER BY step, part")]
        assert steps == self.took == list(range(1, self.steps + 1))


Link.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestLink = Link.TestCase


class LongLink(Link):
    """The long form: some ten minutes, more where a disk is slow."""


LongLink.TestCase.settings = settings(Link.TestCase.settings, max_examples=2_000, stateful_step_count=80)
TestLongLink = pytest.mark.slow(LongLink.TestCase)
