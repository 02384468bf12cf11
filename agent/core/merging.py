"""Points of the curve while the outbox is over its quota: several become one, before it has a number.

A merged point is a point like any other, at the last of its steps, with the last value under each name; beside it
stand the least, the greatest, the sum and the count of the values, and how many points it is made of.
"""

import msgspec

from protocol.worker import Metrics

EVERY = 10.0
"""Seconds of training that become one point."""
POINTS, FIRST_STEP = "merged.points", "merged.first_step"


class Spread(msgspec.Struct, frozen=True):
    """What became of the values under one name."""

    last: float
    least: float
    greatest: float
    total: float
    count: int

    def with_value(self, value: float) -> "Spread":
        # NaN is neither less nor greater than anything, and must be seen in all of them.
        odd = value != value
        return Spread(
            value,
            value if odd else min(self.least, value),
            value if odd else max(self.greatest, value),
            self.total + value,
            self.count + 1,
        )


class Merge(msgspec.Struct, frozen=True):
    """Points that are not sent yet; kept with the job, so that a crash loses none of them."""

    attempt: int
    began: float
    first_step: int
    newest: Metrics
    points: int
    values: dict[str, Spread]

    def with_point(self, metrics: Metrics) -> "Merge":
        values = dict(self.values)
        for name, value in metrics.values.items():
            before = values.get(name)
            values[name] = before.with_value(value) if before else Spread(value, value, value, value, 1)
        return msgspec.structs.replace(self, newest=metrics, points=self.points + 1, values=values)

    def metrics(self) -> Metrics:
        """Return the merged point; a single one is what it was."""
        if self.points == 1:
            return self.newest
        values: dict[str, float] = {POINTS: float(self.points), FIRST_STEP: float(self.first_step)}
        for name, spread in self.values.items():
            values |= {
                name: spread.last,
                f"{name}.min": spread.least,
                f"{name}.max": spread.greatest,
                f"{name}.sum": spread.total,
                f"{name}.count": float(spread.count),
            }
        return msgspec.structs.replace(self.newest, values=values)


Sent = list[tuple[int, Metrics]]
"""Points to send, each with its attempt."""


def merged(
    open_: Merge | None, attempt: int, metrics: Metrics, *, tight: bool, now: float
) -> tuple[Merge | None, Sent]:
    """Return what is held back after another point, and what is to be sent now.

    ``tight``: the outbox is over its quota.
    """
    sent: Sent = []
    if open_ is not None and (open_.attempt != attempt or not tight):
        sent.append((open_.attempt, open_.metrics()))
        open_ = None
    if not tight:
        return None, [*sent, (attempt, metrics)]
    if open_ is None:
        open_ = Merge(attempt, now, metrics.step, metrics, 0, {})
    open_ = open_.with_point(metrics)
    if now - open_.began >= EVERY:
        return None, [*sent, (attempt, open_.metrics())]
    return open_, sent
