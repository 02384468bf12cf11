"""How long a trainer may say nothing."""

import msgspec

from agent.core.pace import NO_SAVE_YET, NO_STEP_YET, SLACK, Pace
from protocol.worker import Failed, Left, Metrics, Parameters, ParametersSet, Ready, Saved, Trained
from tests.protocol.golden import EVENTS

READY = Ready(100, 1.0, 0, 64, 0, "cpu", 1, 1, 2, 4)


def point(step: int, **values: float) -> Metrics:
    return Metrics(step, 0.0, 0.0, values or {"train_loss": 1.0})


def running(
    seconds: float = 10.0, every: int = 1, ready: Ready = READY, points: int = 5
) -> tuple[Pace, float]:
    """A trainer whose steps have taken ``seconds`` so far, and the time of its last point."""
    pace, now = Pace(factor=20, shortest=30), 1000.0
    pace.heard(ready, now)
    for number in range(1, points + 1):
        now += seconds * every
        pace.heard(point(number * every), now)
    return pace, now


def test_a_trainer_that_was_not_heard_of_in_many_times_the_usual_while_stands_still() -> None:
    pace, now = running(10)
    limit = 10 * (1 + 20) + NO_SAVE_YET * 30
    assert pace.usual == 10 and pace.limit() == limit
    assert pace.overdue(now + limit) == ""
    said = pace.overdue(now + limit + 1)
    assert "after step 5" in said and "10 s" in said and f"({limit:.0f} s are allowed)" in said


def test_points_that_come_every_so_many_steps_are_waited_for() -> None:
    pace, _ = running(10, every=50)
    assert pace.limit() == 10 * (50 + 20) + NO_SAVE_YET * 30
    pace, _ = running(10)
    pace.heard(ParametersSet(6, Parameters(logging_steps=100)), 2000.0)
    assert pace.limit() == 10 * (100 + 20) + NO_SAVE_YET * 30


def test_quick_steps_are_given_the_shortest_limit_and_more_until_a_save_was_seen() -> None:
    pace, now = running(0.01)
    assert pace.limit() > 30
    pace.heard(msgspec.structs.replace(_saved(), seconds=50.0, stall=0.5), now)
    assert pace.limit() == 30
    pace.heard(msgspec.structs.replace(_saved(), seconds=40.0, stall=0.0), now)
    assert pace.limit() > SLACK * 40, "one that training stood still for"


def _saved() -> Saved:
    event = EVENTS["Saved"]
    assert isinstance(event, Saved)
    return event


def test_before_the_first_point_a_step_may_take_long() -> None:
    pace = Pace(20, 30)
    assert pace.overdue(1e9) == "", "loading a model is no step"
    pace.heard(READY, 5.0)
    assert pace.overdue(5.0 + NO_STEP_YET * 30) == ""
    assert "no step has ended yet" in pace.overdue(6.0 + NO_STEP_YET * 30)


def test_an_evaluation_is_allowed_for_before_it_was_seen_and_measured_after() -> None:
    ready = msgspec.structs.replace(READY, eval_rows=8000)
    pace, now = running(10, ready=ready)
    # 8 rows a step: 1000 times the rows of a step.
    assert pace.limit() >= SLACK * 10 * 1000
    pace.heard(point(6, eval_loss=1.0), now + 10 + 90)
    assert pace.limit() == 10 * 21 + SLACK * 90 + NO_SAVE_YET * 30
    assert pace.usual == 10, "what an evaluation lasted is no step's time"


def test_what_is_not_training_is_not_watched() -> None:
    for event in (Trained(5, "steps"), Left("paused", 5), EVENTS["Failed"]):
        assert isinstance(event, Trained | Left | Failed)
        pace, now = running(10)
        pace.heard(event, now)
        assert pace.overdue(now + 1e9) == ""


def test_time_in_which_nothing_could_be_heard_does_not_count() -> None:
    pace, now = running(10)
    pace.alive(now + 1e6)
    assert pace.overdue(now + 1e6 + pace.limit()) == ""
    assert pace.overdue(now + 1e6 + pace.limit() + 1) != ""


def test_a_rewind_to_an_earlier_step_is_no_puzzle() -> None:
    pace, now = running(10)
    pace.heard(point(2), now + 50)
    pace.heard(point(3), now + 60)
    assert pace.usual == 10
    assert "after step 3" in pace.overdue(now + 1e6)
