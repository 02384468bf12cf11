"""Points that become one while the outbox is over its quota."""

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent.core.merging import EVERY, Merge, merged
from protocol.worker import Metrics


def point(step: int, **values: float) -> Metrics:
    return Metrics(step, step / 10, float(step), values, "stable")


def through(
    points: list[tuple[int, Metrics]], tight: list[bool], seconds: float = 1.0
) -> tuple[Merge | None, Any]:
    held, sent = None, []
    for at, ((attempt, metrics), is_tight) in enumerate(zip(points, tight, strict=True)):
        held, more = merged(held, attempt, metrics, tight=is_tight, now=at * seconds)
        sent += more
    return held, sent


def test_with_room_every_point_goes_as_it_is() -> None:
    points = [(1, point(step, loss=1.0)) for step in range(5)]
    assert through(points, [False] * 5) == (None, points)


def test_ten_seconds_become_one_point_that_hides_nothing() -> None:
    losses = [4.0, 9.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 5.0]
    points = [(1, point(step, loss=loss)) for step, loss in enumerate(losses, start=1)]
    points[3][1].values["eval_loss"] = 7.0
    held, [(attempt, one)] = through(points, [True] * 11)
    assert held is None
    assert (attempt, one.step, one.time, one.epoch, one.trend) == (1, 11, 11.0, 1.1, "stable")
    assert one.values == {
        "merged.points": 11.0,
        "merged.first_step": 1.0,
        "loss": 5.0,
        "loss.min": 1.0,
        "loss.max": 9.0,
        "loss.sum": sum(losses),
        "loss.count": 11.0,
        "eval_loss": 7.0,
        "eval_loss.min": 7.0,
        "eval_loss.max": 7.0,
        "eval_loss.sum": 7.0,
        "eval_loss.count": 1.0,
    }


def test_what_is_held_back_goes_first_when_there_is_room_again() -> None:
    points = [(1, point(step, loss=float(step))) for step in (1, 2, 3)]
    held, sent = through(points, [True, True, False])
    assert held is None
    assert [(metrics.step, metrics.values["loss"]) for _, metrics in sent] == [(2, 2.0), (3, 3.0)]
    assert sent[0][1].values["merged.points"] == 2.0


def test_a_single_point_that_was_held_back_is_what_it_was() -> None:
    points = [(1, point(1, loss=1.0)), (1, point(2, loss=2.0))]
    assert through(points, [True, False])[1] == points


def test_another_attempt_is_not_mixed_with_the_one_before() -> None:
    points = [(1, point(7, loss=7.0)), (2, point(5, loss=5.0))]
    held, sent = through(points, [True, True])
    assert sent == [points[0]]
    assert held is not None
    assert (held.attempt, held.first_step) == (2, 5)


def test_a_loss_that_is_no_number_is_not_hidden() -> None:
    points = [(1, point(step, loss=loss)) for step, loss in enumerate([1.0, math.nan, 2.0], start=1)]
    held, _ = through(points, [True] * 3)
    assert held is not None
    values = held.metrics().values
    assert math.isnan(values["loss.min"])
    assert math.isnan(values["loss.max"])
    assert math.isnan(values["loss.sum"])
    assert values["loss"] == 2.0


@given(
    losses=st.lists(st.floats(-100, 100), min_size=1, max_size=60),
    tight=st.lists(st.booleans(), min_size=60, max_size=60),
    seconds=st.sampled_from([0.5, 3.0, EVERY]),
)
def test_nothing_is_lost_and_nothing_counted_twice(
    losses: list[float], tight: list[bool], seconds: float
) -> None:
    points = [(1, point(step, loss=loss)) for step, loss in enumerate(losses, start=1)]
    held, sent = through(points, tight[: len(points)], seconds)
    if held is not None:
        sent.append((held.attempt, held.metrics()))
    assert sum(int(one.values.get("merged.points", 1)) for _, one in sent) == len(points)
    assert math.isclose(
        sum(one.values.get("loss.sum", one.values["loss"]) for _, one in sent), sum(losses), abs_tol=1e-6
    )
    assert [one.step for _, one in sent] == sorted({one.step for _, one in sent})
