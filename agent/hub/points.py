"""The curve: points in, and the current curve out."""

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import msgspec

from agent.hub.model import Job
from agent.hub.store import Db
from agent.hub.tables import job_seq
from protocol.codec import encode_record, number
from protocol.records import Point
from protocol.rest import METRIC_NAMES

BY_REST = -1
"""The epoch of shapes that came by REST."""
COUNTS = ("best_step", "epochs_without_improvement")
MOST_FIGURES = 1024
"""Names whose newest value is kept with the job."""

_point: msgspec.msgpack.Decoder[Point] = msgspec.msgpack.Decoder(Point)
_INSERT = "INSERT OR IGNORE INTO points (job, step, attempt, part, shape, body) VALUES (?,?,?,?,?,?)"


@dataclass
class Dot:
    """A point with its values by name, as the page draws it."""

    attempt: int
    step: int
    epoch: float
    time: float
    trend: str
    values: dict[str, float | None]

    def public(self) -> dict[str, Any]:
        """Return the platform's metric row."""
        row: dict[str, Any] = {
            "step": self.step,
            "epoch": self.epoch,
            "attempt": self.attempt,
            "timestamp": iso(self.time),
            "loss_trend": self.trend or None,
        }
        row.update(dict.fromkeys(METRIC_NAMES))
        row.update(self.values)
        for name in COUNTS:
            row[name] = count(row[name])
        return row


def count(value: float | None) -> int | float | None:
    """Return a counter as a whole number, which it is wherever it is measured."""
    return int(value) if value is not None and math.isfinite(value) and value == int(value) else value


def iso(time: float | None) -> str | None:
    """Return Unix seconds as the platform writes a time."""
    if time is None:
        return None
    try:
        return datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        return None


class Shapes:
    """The names of one job's points, within one transaction."""

    def __init__(self, db: Db, job_id: str) -> None:
        self._db = db
        self._job = job_id
        self._ids: dict[tuple[int, int], int] = {}
        self.names: dict[int, list[str]] = {}
        self._newest: dict[int, int] = {}
        rows = db.execute("SELECT id, epoch, schema_id, names FROM shapes WHERE job=? ORDER BY id", (job_id,))
        for shape, epoch, schema_id, names in rows:
            self._ids[epoch, schema_id] = shape
            if names is not None:
                self.names[shape] = names.split("\n")
                self._newest[schema_id] = shape

    def define(self, epoch: int, schema_id: int, names: Sequence[str]) -> None:
        """Note the names of a schema; they never change once points use them."""
        text = "\n".join(name.replace("\n", " ") for name in names)
        self._db.execute(
            "INSERT INTO shapes (job, epoch, schema_id, names) VALUES (?,?,?,?) "
            "ON CONFLICT (job, epoch, schema_id) DO UPDATE SET names=excluded.names",
            (self._job, epoch, schema_id, text),
        )
        row = self._db.execute(
            "SELECT id FROM shapes WHERE job=? AND epoch=? AND schema_id=?", (self._job, epoch, schema_id)
        ).fetchone()
        if epoch != BY_REST:
            # Points of an earlier start, whose own schema this hub has lost: it came from a backup.
            self._db.execute(
                "UPDATE shapes SET names=? WHERE job=? AND schema_id=? AND names IS NULL",
                (text, self._job, schema_id),
            )
        self._ids[epoch, schema_id] = row[0]
        self.names[row[0]] = list(names)
        self._newest[schema_id] = row[0]

    def find(self, epoch: int, schema_id: int) -> int:
        """Return the shape of a point; one whose schema is yet to come gets its place."""
        shape = self._ids.get((epoch, schema_id), self._newest.get(schema_id))
        if shape is None:
            cursor = self._db.execute(
                "INSERT INTO shapes (job, epoch, schema_id) VALUES (?,?,?)", (self._job, epoch, schema_id)
            )
            shape = int(cursor.lastrowid or 0)
            self._ids[epoch, schema_id] = shape
        return shape

    def by_names(self, names: Sequence[str]) -> int:
        """Return the shape with exactly these names."""
        wanted = list(names)
        for shape, known in self.names.items():
            if known == wanted:
                return shape
        taken = [schema_id for epoch, schema_id in self._ids if epoch == BY_REST]
        self.define(BY_REST, max(taken, default=0) + 1, wanted)
        return self._ids[BY_REST, max(taken, default=0) + 1]


Named = tuple[Point, list[str]]
"""A point and the names of its values."""


def store_points(
    db: Db, job: Job, shapes: Shapes, epoch: int, points: list[tuple[Point, bytes]]
) -> list[Named]:
    """Store points with their MessagePack and bring the job's figures up to date; return them with names."""
    seq = job_seq(db, job.id)
    rows = []
    stored: list[Named] = []
    found: dict[int, int] = {}
    for point, body in points:
        shape = found.get(point.schema_id)
        if shape is None:
            shape = found[point.schema_id] = shapes.find(epoch, point.schema_id)
        rows.append((seq, point.step, point.attempt, zlib.crc32(body), shape, body))
        stored.append((point, shapes.names.get(shape, [])))
    db.executemany(_INSERT, rows)
    refresh(job, _newest(stored))
    return stored


def _newest(points: list[Named]) -> list[Dot]:
    """Return those points that hold the newest value of some name, oldest first.

    Thousands may come in one commit, and naming every value of each would be most of its cost.
    """
    ordered = sorted(points, key=lambda one: (one[0].attempt, one[0].step))
    shapes = {id(names): names for _, names in ordered}
    missing = {shape: set(names) for shape, names in shapes.items()}
    needed: list[Dot] = []
    for point, names in reversed(ordered):
        left = missing[id(names)]
        if left or not needed:
            dot = named(point, names)
            if not needed or not left.isdisjoint(dot.values):
                left.difference_update(dot.values)
                needed.append(dot)
        elif not any(missing.values()):
            break
    return needed[::-1]


def store_rest_points(db: Db, job: Job, dots: list[Dot]) -> None:
    """Store points that came by REST without numbers: one with the same values is not stored twice."""
    seq = job_seq(db, job.id)
    shapes = Shapes(db, job.id)
    rows = []
    for dot in dots:
        names = sorted(dot.values)
        values = [dot.values[name] for name in names]
        record = Point(dot.time, dot.attempt, dot.step, dot.epoch, 0, list(values), dot.trend)
        same = msgspec.msgpack.encode((names, values, dot.epoch))
        rows.append(
            (seq, dot.step, dot.attempt, zlib.crc32(same), shapes.by_names(names), encode_record(record))
        )
    db.executemany(_INSERT, rows)
    refresh(job, dots)


def named(point: Point, names: list[str]) -> Dot:
    """Return a point with its values by name."""
    values = {
        name: number(value) for name, value in zip(names, point.values, strict=False) if value is not None
    }
    return Dot(point.attempt, point.step, point.epoch, point.time, point.trend, values)


def refresh(job: Job, dots: Iterable[Dot]) -> None:
    """Bring the job's newest figures up to date; an older point does not move them back."""
    figures = dict(job.figures)
    for dot in dots:
        if (dot.attempt, dot.step) >= (job.step_attempt, job.step):
            job.step_attempt, job.step = dot.attempt, dot.step
        if (dot.attempt, dot.step) >= (job.figures_attempt, job.figures_step):
            figures.update(dot.values)
            job.figures_attempt, job.figures_step, job.epoch = dot.attempt, dot.step, dot.epoch
            job.figures_time = dot.time
            job.trend = dot.trend or job.trend
        else:
            for name, value in dot.values.items():
                figures.setdefault(name, value)
    job.figures = dict(islice(figures.items(), MOST_FIGURES))


def curve(db: Db, job_id: str, after: int = -(2**62), limit: int = 100_000) -> list[Dot]:
    """Return the current curve: for each step the newest attempt's values, steps ascending."""
    seq = job_seq(db, job_id)
    shapes = Shapes(db, job_id).names
    rows = db.execute(
        "SELECT step, attempt, shape, body FROM points WHERE job=? AND step>? ORDER BY step, attempt",
        (seq, after),
    )
    dots: list[Dot] = []
    same: list[Dot] = []
    for _, _, shape, body in rows:
        dot = named(_point.decode(body), shapes.get(shape, []))
        if same and same[-1].step != dot.step:
            dots.append(_merged(same))
            same = []
            if len(dots) >= limit:
                return dots
        same.append(dot)
    if same:
        dots.append(_merged(same))
    return dots


def _merged(dots: list[Dot]) -> Dot:
    """Return the newest attempt's point of one step; its parts are laid together in the order of time."""
    newest = [dot for dot in dots if dot.attempt == dots[-1].attempt]
    if len(newest) == 1:
        return newest[0]
    newest.sort(key=lambda dot: dot.time)
    whole = newest[-1]
    for dot in newest[:-1]:
        whole.values = {**dot.values, **whole.values}
        whole.trend = whole.trend or dot.trend
    return whole
