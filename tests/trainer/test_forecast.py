"""What every job tells of its needs at its start, and what it adds once its first steps were seen."""

import itertools

import pytest

from agent.trainer import forecast
from agent.trainer.forecast import MEASURED, STEPS
from agent.trainer.progress import Schedule
from protocol.jobspec import TrainingSpec
from protocol.worker import Estimate, Estimated, Limits
from tests.trainer.conftest import Jobs


def test_ten_steps_tell_how_long_the_job_takes(jobs: Jobs) -> None:
    line = jobs.run(
        training={"max_steps": STEPS + 2, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 3},
        eval_fraction=0.25,
    )
    first, second = (event.estimate for event in line.of(Estimated))
    assert first.step_seconds is None and first.total_seconds is None
    assert second.total_steps == STEPS + 2 and MEASURED in second.parts
    assert second.step_seconds is not None and second.step_seconds > 0
    assert second.total_seconds is not None and second.total_seconds >= (STEPS + 2) * second.step_seconds


@pytest.mark.parametrize(
    ("training", "steps", "told"),
    [
        ({}, [2.0] * 9, (2.0, 0.0)),
        # After each third step an evaluation of 5 seconds, after each fourth a save of 1.
        (
            {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 4},
            [2.0, 2.0, 7.0, 3.0, 2.0, 7.0, 2.0, 3.0, 7.0],
            (2.0, 5.0),
        ),
        # No step without one: then it is a part of each.
        ({"eval_strategy": "steps", "eval_steps": 1}, [7.0] * 9, (7.0, 0.0)),
    ],
)
def test_evaluations_and_saves_are_no_part_of_a_step(
    training: dict[str, object], steps: list[float], told: tuple[float, float]
) -> None:
    schedule = Schedule.of(TrainingSpec(**training), Limits())
    estimate = Estimate(device="cpu", host_gb=1.0, disk_gb=1.0, free_host_gb=1.0, free_disk_gb=1.0)
    reality = forecast._Reality(estimate, lambda event: None, schedule, lambda step, evaluation: None)
    for number, now in enumerate(itertools.accumulate(steps, initial=100.0), start=1):
        reality.stepped(number, 0.5, now)
    assert reality._times() == pytest.approx(told)
