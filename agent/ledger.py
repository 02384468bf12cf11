"""What is written down before it is done: jobs and outgoing records, in one transaction each."""

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import anyio
import anyio.abc
import msgspec
from loguru import logger

from agent.core.effects import Effect
from agent.core.job import Job
from agent.core.outbox import admit
from agent.runtime.journal import Journal, JournalFull, Tx
from protocol.lifecycle import TERMINAL
from protocol.messages import Lane
from protocol.records import AnyRecord, LogChunk, Notice, Point, Schema
from protocol.session import Key

OVER_QUOTA = (
    "The backend has not taken the records of this job for so long that their disk quota (OUTBOX_MAX_MB) is used up: "
    "from here on each ten seconds of the curve are one point (last, least, greatest, sum and count of every figure), "
    "and log lines stay on the machine."
)

DROPPED = "dropped:"
NAMES = "schema:"
"""Each schema that a job's points were sent with: its own record is deleted once the backend has it, and a backend
that comes from a backup asks for it again."""

job_encoder = msgspec.msgpack.Encoder()
job_decoder: msgspec.msgpack.Decoder[Job] = msgspec.msgpack.Decoder(Job)


@dataclass
class Batch:
    """What one transaction will hold, and what is done once it is committed."""

    jobs: dict[str, Job] = field(default_factory=dict)
    appends: list[tuple[str, int, bytes]] = field(default_factory=list)
    marks: dict[tuple[str, int], int] = field(default_factory=dict)
    """The newest event of each (job, attempt)."""
    points: list[tuple[str, int, int, bytes]] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    held: dict[str, str] = field(default_factory=dict)
    """Devices given to jobs by this batch."""
    freed: set[str] = field(default_factory=set)
    """Jobs whose process is gone."""
    dropped: dict[str, int] = field(default_factory=dict)
    """How many log lines of a job are left out and untold once this is committed."""
    told: set[str] = field(default_factory=set)
    """Jobs whose user is told here that the outbox is over its quota."""
    schemas: list[tuple[str, Schema]] = field(default_factory=list)


class Ledger:
    """The journal, and where the outgoing streams stand."""

    def __init__(self, journal: Journal, outbox_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self.journal = journal
        self.epoch = 0
        self.heads: dict[Key, int] = {}
        """Last number of every stream that has something to send."""
        self.backlog: dict[int, list[int]] = {lane: [0, 0] for lane in Lane}
        """Records and bytes not acknowledged, per lane."""
        self.drained = anyio.Event()
        """Set when everything is acknowledged; who waits puts a new one here first."""
        self.on_append: Callable[[], None] = lambda: None
        self.open_logs: set[str] = set()
        """Jobs that have had a process since their log was last read to its end: more of it is to be sent."""
        self._outbox_bytes = outbox_bytes
        self._clock = clock
        self._dropped: dict[str, int] = {}
        """Log lines of each job that were left out since the last that was kept; the journal has it too."""
        self._told: set[str] = set()

    async def load(self, epoch: int) -> list[Job]:
        """Begin this boot's streams and return the jobs of the journal."""
        self.epoch = epoch
        await self.journal.write(lambda tx: tx.set_epoch(epoch))
        for stream in await self.journal.read(lambda rows: rows.streams()):
            self.heads[Key(stream.epoch, stream.scope, stream.lane)] = stream.last
        self.count(await self.journal.read(lambda rows: rows.backlog()))
        await self._name_again()
        left_out = await self.journal.read(lambda rows: rows.metas(DROPPED))
        self._dropped = {scope: int(count) for scope, count in left_out.items() if count != "0"}
        return [job_decoder.decode(body) for _, body in await self.journal.read(lambda rows: rows.all_jobs())]

    async def _name_again(self) -> None:
        """Say the names of points that an earlier start left: its own word of them may be lost with the backend."""
        batch = Batch()
        for key in list(self.heads):
            if key.scope and key.lane == Lane.METRICS:
                for schema in await self.schemas(key.scope):
                    self.append(batch, key.scope, Lane.CONTROL, schema)
        if not batch.appends:
            return
        try:
            await self.write(batch)
        except JournalFull as error:
            # The backend has them, if it is the one that it was.
            logger.warning("the names of points cannot be said again: {}", error)

    async def schemas(self, job_id: str) -> list[Schema]:
        """Return the schemas that the points of a job were sent with."""
        kept = await self.journal.read(lambda rows: rows.metas(f"{NAMES}{job_id}:"))
        return [Schema(int(number), json.loads(names)) for number, names in kept.items()]

    def count(self, backlog: dict[int, tuple[int, int]]) -> None:
        """Take over what the journal says is not acknowledged."""
        for lane in Lane:
            self.backlog[lane] = list(backlog.get(lane, (0, 0)))
        if not any(records for records, _ in self.backlog.values()):
            self.drained.set()

    def append(self, batch: Batch, scope: str, lane: int, record: AnyRecord) -> None:
        """Add a record to a batch. Over the quota log lines are counted in place of kept.

        A log chunk without lines is kept all the same: it says how many were not.
        """
        logs = record if isinstance(record, LogChunk) else None
        dropped = self.left_out(scope, batch) if logs else 0
        if lane != Lane.CONTROL and self.over_quota and not (logs and not logs.lines):
            self._tell(batch, scope)
            if logs:
                batch.dropped[scope] = dropped + logs.dropped + len(logs.lines)
            return
        if not self.over_quota:
            self._told.discard(scope)
        if logs and dropped:
            record = msgspec.structs.replace(logs, dropped=logs.dropped + dropped)
            batch.dropped[scope] = 0
        if isinstance(record, Schema):
            batch.schemas.append((scope, record))
        batch.appends.append((scope, int(lane), admit(record)))

    def left_out(self, scope: str, batch: Batch | None = None) -> int:
        """Return how many log lines of a job were left out and nobody was told yet."""
        known = self._dropped.get(scope, 0)
        return batch.dropped.get(scope, known) if batch else known

    def append_points(self, batch: Batch, scope: str, points: list[Point]) -> None:
        """Add points of a job, merged already where the outbox is over its quota; see `agent.core.merging`."""
        if points and self.over_quota:
            self._tell(batch, scope)
        lane = int(Lane.METRICS)
        batch.appends += [(scope, lane, admit(point)) for point in points]

    def _tell(self, batch: Batch, scope: str) -> None:
        """Say once that not everything of a job is kept."""
        if scope and scope not in self._told and scope not in batch.told:
            batch.told.add(scope)
            notice = Notice(self._clock(), "warning", OVER_QUOTA)
            batch.appends.append((scope, int(Lane.CONTROL), admit(notice)))

    async def trim(
        self,
        upto: Mapping[Key, int],
        *,
        gone: Collection[Key] = (),
        notes: Mapping[str, str] | None = None,
        ended: Iterable[str] = (),
    ) -> None:
        """Delete records that are delivered, or whose streams are ``gone``; keep the notes in the same commit."""

        def change(tx: Tx) -> dict[int, tuple[int, int]]:
            for key, last in upto.items():
                tx.trim(key.epoch, key.scope, key.lane, last)
            for name, value in (notes or {}).items():
                tx.set_meta(name, value)
            scrub_told(tx, ended)
            return tx.backlog()

        self.count(await self.journal.write(change))
        for key, last in upto.items():
            if (key.epoch != self.epoch or key in gone) and self.heads.get(key) == last:
                self.heads.pop(key)

    async def on_its_way(self, key: Key, seq: int) -> bool:
        """Tell whether a record is not acknowledged yet."""
        streams = await self.journal.read(lambda rows: rows.streams())
        return any(Key(one.epoch, one.scope, one.lane) == key and one.first <= seq for one in streams)

    @property
    def over_quota(self) -> bool:
        """Whether the backend has not taken more than OUTBOX_MAX_MB of records."""
        return sum(size for _, size in self.backlog.values()) > self._outbox_bytes

    async def write(self, batch: Batch, also: Callable[[Tx], None] | None = None) -> None:
        """Commit a batch. Raises JournalFull, and then nothing of it is written."""
        changed = [
            (job.job_id, str(job.state), job.order, job_encoder.encode(job)) for job in batch.jobs.values()
        ]

        named = {
            f"{NAMES}{scope}:{schema.schema_id}": json.dumps(schema.names) for scope, schema in batch.schemas
        }

        def change(tx: Tx) -> list[int]:
            for changed_row in changed:
                tx.put_job(*changed_row)
            for (job_id, attempt), number in batch.marks.items():
                tx.mark_event(job_id, attempt, number)
            if batch.points:
                tx.put_points(batch.points)
            for scope, count in batch.dropped.items():
                tx.set_meta(DROPPED + scope, str(count))
            for name, names in named.items():
                tx.set_meta(name, names)
            if also is not None:
                also(tx)
            return [tx.append_all(*key, bodies) for key, bodies in streams.items()]

        streams: dict[tuple[str, int], list[bytes]] = {}
        for scope, lane, body in batch.appends:
            streams.setdefault((scope, lane), []).append(body)
        numbers = await self.journal.write(change)
        # Not before: of a batch that did not fit the disk nothing has happened, and it comes again.
        self._dropped |= batch.dropped
        self._told |= batch.told
        for ((scope, lane), bodies), number in zip(streams.items(), numbers, strict=True):
            self.heads[Key(self.epoch, scope, lane)] = number
            self.backlog[lane][0] += len(bodies)
            self.backlog[lane][1] += sum(map(len, bodies))


def scrub_told(tx: Tx, ended: Iterable[str]) -> None:
    """Delete the tokens of those of the ended jobs whose last word has arrived: they serve for nothing any more."""
    waiting = {one.scope for one in tx.streams() if one.last >= one.first}
    for job_id in ended:
        body = tx.get_job(job_id)
        # By what is in the journal: since the caller looked it may have been retried, and has its token anew.
        alive = body is not None and job_decoder.decode(body).state not in TERMINAL
        if job_id not in waiting and not alive:
            tx.scrub_secrets(job_id)
