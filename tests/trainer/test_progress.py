"""The counters of a job."""

import math
from pathlib import Path
from typing import Any

import pytest

from agent.trainer.progress import Progress, Schedule, perplexity
from protocol.jobspec import TrainingSpec
from protocol.worker import Limits, Parameters


@pytest.mark.parametrize(
    ("losses", "trend"),
    [
        ([5, 4, 3, 2], "insufficient_data"),
        ([5, 4, 3, 2, 1], "improving"),
        ([1, 2, 3, 4, 5], "degrading"),
        ([3, 3.1, 3, 3.1, 3, 3.1], "stable"),
        ([9] * 20 + [3.0] * 10, "stable"),
    ],
)
def test_the_trend_sets_the_newer_half_against_the_older(losses: list[float], trend: str) -> None:
    progress = Progress()
    for loss in losses:
        progress.add_train_loss(loss)
    assert progress.trend() == trend


def schedule(**changes: Any) -> Schedule:
    return Schedule.of(TrainingSpec(**changes), Limits())


def test_evaluations_without_improvement_are_counted() -> None:
    progress = Progress()
    plan = schedule()
    assert progress.add_evaluation({"eval_loss": 3.0}, 10, 0.1, plan)
    assert not progress.add_evaluation({"eval_loss": 3.5}, 20, 0.2, plan)
    assert not progress.add_evaluation({"eval_loss": math.nan}, 30, 0.3, plan)
    assert (progress.without_improvement, progress.best_eval_loss, progress.best_step) == (2, 3.0, 10)
    assert progress.add_evaluation({"eval_loss": 2.0}, 40, 0.4, plan)
    assert (progress.without_improvement, progress.best_eval_loss, progress.best_epoch) == (0, 2.0, 0.4)


def test_an_improvement_below_the_threshold_is_the_best_but_does_not_count() -> None:
    progress = Progress()
    plan = schedule(early_stopping_threshold=0.1)
    progress.add_evaluation({"eval_loss": 3.0}, 10, 0.1, plan)
    assert progress.add_evaluation({"eval_loss": 2.95}, 20, 0.2, plan)
    assert (progress.without_improvement, progress.best_step) == (1, 20)


def test_the_best_is_chosen_by_the_metric_that_the_job_names() -> None:
    progress = Progress()
    plan = schedule(metric_for_best="rewards_accuracy")
    assert progress.add_evaluation({"eval_loss": 0.7, "rewards_accuracy": 0.5}, 10, 0.1, plan)
    assert progress.add_evaluation({"eval_loss": 0.9, "rewards_accuracy": 0.8}, 20, 0.2, plan)
    assert not progress.add_evaluation({"eval_loss": 0.1, "rewards_accuracy": 0.6}, 30, 0.3, plan)
    assert (progress.best_step, progress.best_eval_loss, progress.best_value) == (20, 0.9, 0.8)
    assert progress.without_improvement == 1


def test_counters_come_back_as_they_were_saved(tmp_path: Path) -> None:
    progress = Progress(window_loss=1 / 3, owed={"train_loss": math.inf}, parameters=Parameters(save_steps=3))
    progress.add_train_loss(2.0)
    progress.save(tmp_path)
    assert Progress.load(tmp_path) == progress


def test_the_job_goes_before_the_owner_and_the_owner_before_nothing() -> None:
    limits = Limits(logging_steps=7, save_steps=70)
    assert Schedule.of(TrainingSpec(), limits).logging_steps == 7
    assert Schedule.of(TrainingSpec(), limits).save_steps == 70
    named = Schedule.of(TrainingSpec(logging_steps=2, save_steps=20), limits)
    assert (named.logging_steps, named.save_steps) == (2, 20)


def test_when_to_evaluate() -> None:
    def when(strategy: str) -> list[int]:
        training = TrainingSpec(eval_strategy=strategy, eval_steps=4)  # type: ignore[arg-type]
        schedule = Schedule.of(training, Limits())
        return [step for step in range(1, 11) if schedule.evaluates(step, step / 5)]

    assert when("no") == []
    assert when("steps") == [4, 8]
    assert when("epoch") == [5, 10]


def test_a_perplexity_too_large_for_a_number_is_infinite() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf
