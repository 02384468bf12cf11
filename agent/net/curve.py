"""The points of a job's curve at the platform, which numbers none: each inserted once, and what is made again told."""

import math
import time
from typing import Any

import msgspec

from agent.net import hosted
from agent.net.client import Unclear, Unreached
from agent.net.drain import READ_BYTES
from agent.net.hosted import Memo, kind_of
from agent.net.jobrow import JobRow
from agent.net.memos import Memos
from protocol.lifecycle import TERMINAL
from protocol.messages import Lane
from protocol.records import Point, Schema
from protocol.rest import METRICS
from protocol.session import Key

POINTS = 500
"""Points of a batch: an insert of so many is still quick, and what is in doubt is read back in one page."""
PAGE, PAGE_MOST = 1000, 5000
LATE, LATE_BY = 64, 30.0
"""Points that wait, and seconds for which the first of them did, beyond which they are history: the page is told first
how the job stands now."""
SHOW_EVERY = 10.0
"""Seconds between two such words of one job: a key may ask 100 times a minute."""
AGAIN = (
    "Steps {first} to {last} are made again from step {start} and come out otherwise; where this chart has a value "
    "already it keeps that one."
)

Stored = dict[tuple[str, int], float | None]
"""By kind and step: the loss of the points that the platform holds."""


class Curve:
    """Sends points, and keeps the figures above the chart true."""

    def __init__(self, memos: Memos, row: JobRow) -> None:
        self._memos = memos
        self._row = row
        self._names: dict[int, list[str]] = {}
        self._sure: set[str] = set()
        """Jobs whose last batch of points is known to be stored."""
        self._stored: dict[str, Stored] = {}
        """Of jobs whose steps are being made again."""
        self._late: set[str] = set()
        """Jobs whose history is being sent."""
        self._shown: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Curve sure={self._sure} late={self._late}>"

    def in_doubt(self) -> None:
        """Nothing is known of what was sent last."""
        self._sure.clear()

    def learn(self, schema: Schema) -> dict[str, str]:
        """Take the names of points, and return the note that keeps them."""
        self._names[schema.schema_id] = schema.names
        return {f"schema:{schema.schema_id}": msgspec.json.encode(schema.names).decode()}

    async def send(self, key: Key, records: list[tuple[int, Any]], memo: Memo) -> tuple[int, int]:
        """Send a batch; return up to which record, and how many points of it. Raises RestError."""
        job_id, at = key.scope, records[0][0]
        if job_id not in self._sure:
            await self._settle(job_id, memo)
        # What is known to be there is known whether or not the records are settled: else it would be taken for a batch
        # in doubt.
        kept = await self._memos.of(job_id)
        kept.knows(memo)
        head = self._memos.uplink.heads().get(key, at)
        waited = time.time() - getattr(records[0][1], "time", math.inf)
        if head - at >= LATE and waited >= LATE_BY and job_id not in self._late:
            await self._show(job_id, memo)
            self._late.add(job_id)
        rows: list[dict[str, Any]] = []
        fresh: Stored = {}
        again = False
        for seq, record in records:
            at = seq
            if isinstance(record, Point):
                row = hosted.row_of(record, await self._schema(key, record.schema_id))
                news = memo.fresh(row)
                # One of an attempt that the platform has points of already was only in doubt.
                if not news and record.attempt > memo.attempt:
                    again = True
                    news = await self._fills(job_id, record.attempt, row, memo, fresh)
                elif news:
                    memo.holds(row)
                    memo.attempt = max(memo.attempt, record.attempt)
                if news:
                    rows.append(row)
                    fresh[_place(row)] = _loss(row)
                else:
                    memo.carried = hosted.carry([row], memo.carried)
            if len(rows) >= POINTS:
                break
        if rows:
            memo.carried = hosted.carry(rows, memo.carried)
        if again or job_id in self._late or hosted.blank(rows):
            memo.owes = True
        if rows:
            # What the call keeps: after a crash nothing else would say that the figures are to be shown.
            kept.owes = memo.owes
            self._sure.discard(job_id)
            await self._memos.call("POST", METRICS, job_id, {"job_id": job_id, "metrics": rows})
            memo.rows += len(rows)
            kept.knows(memo)
        if again and job_id in self._stored:
            self._stored[job_id] |= fresh
        else:
            self._stored.pop(job_id, None)
        through = at >= head and job_id in self._late
        await self.refresh(job_id, memo, now=through)
        if through:
            self._late.discard(job_id)
        self._sure.add(job_id)
        return at, len(rows)

    # The figures above the chart

    async def refresh(self, job_id: str, memo: Memo, *, now: bool = False) -> None:
        """Show how the job stands, where that is owed; not too often while it lives. Raises RestError.

        The platform takes its summary from the last batch, whatever came before that.
        """
        job = self._memos.uplink.jobs().get(job_id)
        ended = job is None or job.state in TERMINAL
        due = self._memos.clock() - self._shown.get(job_id, -math.inf) >= SHOW_EVERY
        if memo.owes and (now or ended or due):
            await self._show(job_id, memo)

    async def _show(self, job_id: str, memo: Memo) -> None:
        job = self._memos.uplink.jobs().get(job_id)
        await self._row.show(job_id, hosted.live(job) if job is not None else {})
        self._shown[job_id] = self._memos.clock()
        memo.owes = False

    # Names

    async def _schema(self, key: Key, schema_id: int) -> list[str]:
        if schema_id not in self._names:
            text = await self._memos.uplink.noted(f"schema:{schema_id}")
            if text:
                self._names[schema_id] = msgspec.json.decode(text, type=list[str])
            else:
                await self._look_ahead(Key(key.epoch, key.scope, Lane.CONTROL))
        return self._names.get(schema_id, [])

    async def _look_ahead(self, key: Key) -> None:
        """Learn the names that stand in the control lane, which may be held up."""
        for _, body in await self._memos.uplink.read(key, 0, READ_BYTES):
            if isinstance(record := hosted.record_of(body), Schema):
                self._names[record.schema_id] = record.names

    # What is stored there

    async def _settle(self, job_id: str, memo: Memo) -> None:
        """Learn which points of ours the platform holds; only its last rows can be news."""
        self._stored.pop(job_id, None)
        known, left = (memo.train, memo.eval), self._memos.left(job_id)
        offset = max(0, memo.rows - 50)
        rows = await self._read(job_id, offset)
        for row in rows:
            memo.holds(row)
        memo.rows = max(memo.rows, offset + len(rows))
        # A batch is stored whole or not at all, and only one is ever in doubt: once it is seen, it is there.
        if left > 0 and (memo.train, memo.eval) == known:
            raise Unreached(f"job {job_id}: the points that were sent last may still be stored", left)

    async def _read(self, job_id: str, offset: int, limit: int = PAGE) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            path = f"{METRICS}?job_id={job_id}&limit={limit}&offset={offset}"
            page = (await self._memos.client.get(path)).get("metrics")
            if not isinstance(page, list):
                raise Unclear(f"job {job_id}: the backend does not say which points it holds")
            found += [row for row in page if isinstance(row, dict) and isinstance(row.get("step"), int)]
            offset += len(page)
            if len(page) < limit:
                return found

    async def _fills(self, job_id: str, attempt: int, row: dict[str, Any], memo: Memo, fresh: Stored) -> bool:
        """Take a step that was made before; tell whether the chart has a hole there that it fills.

        After a lost worker the values are equal, and that is all. After a rewind, or a resume with other inputs, they
        are not, and the platform can neither correct nor delete a point: whoever looks at the chart is told.
        """
        if job_id not in self._stored:
            stored: Stored = {}
            for one in await self._read(job_id, 0, PAGE_MOST):
                if stored.get(_place(one)) is None:
                    stored[_place(one)] = _loss(one)
            self._stored[job_id] = stored
        place, known = _place(row), self._stored[job_id]
        if place not in fresh and place not in known:
            return False
        before, value = fresh.get(place, known.get(place)), _loss(row)
        if before == value or (before is not None and value is not None and math.isclose(before, value)):
            return False
        if memo.remade != attempt:
            await self._tell_again(job_id, attempt, int(row["step"]), memo)
        return before is None

    async def _tell_again(self, job_id: str, attempt: int, first: int, memo: Memo) -> None:
        kept = await self._memos.of(job_id)
        memo.remade = kept.remade = attempt
        known = memo.begun[1] if memo.begun[0] == attempt else first - 1
        text = AGAIN.format(first=first, last=max(memo.train, memo.eval), start=min(known, first - 1))
        # Both at once: it is said once.
        await self._memos.uplink.announce({job_id: text}, self._memos.note(job_id, kept))


def _place(row: dict[str, Any]) -> tuple[str, int]:
    return kind_of(row), int(row["step"])


def _loss(row: dict[str, Any]) -> float | None:
    value = row.get("eval_loss" if kind_of(row) == "eval" else "train_loss")
    return float(value) if isinstance(value, int | float) else None
