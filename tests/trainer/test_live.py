"""Parameters that change while a job trains."""

import math
from typing import Any

import pytest

from protocol.worker import (
    Cancel,
    Note,
    Parameters,
    ParametersSet,
    Pause,
    Ready,
    Saved,
    SetParameters,
)
from tests.trainer.conftest import Jobs, curve


def test_a_new_learning_rate_keeps_the_shape_of_the_schedule(jobs: Jobs) -> None:
    plain = jobs.run("plain", training={"lr_scheduler_type": "cosine"})
    line = jobs.run(
        "job",
        {3: [SetParameters(Parameters(learning_rate=2e-2))]},
        training={"lr_scheduler_type": "cosine"},
    )
    # The point of step 3 is said at its end; the order is taken at the end of step 4.
    (told,) = line.of(ParametersSet)
    assert told == ParametersSet(5, Parameters(learning_rate=2e-2))
    for step in range(1, 9):
        factor = 2 if step >= 5 else 1
        assert line.points[step]["learning_rate"] == pytest.approx(
            factor * plain.points[step]["learning_rate"]
        )
    assert line.points[5]["train_loss"] == plain.points[5]["train_loss"]
    assert line.points[6]["train_loss"] != plain.points[6]["train_loss"]


def test_a_new_learning_rate_survives_a_pause(jobs: Jobs) -> None:
    faster = SetParameters(Parameters(learning_rate=2e-2))
    untouched = jobs.run("untouched", {2: [faster]})
    paused = jobs.run("paused", {2: [faster, Pause()]})
    resumed = jobs.run("paused", attempt=2, parameters=Parameters(learning_rate=2e-2))
    assert resumed.of(ParametersSet) == []
    assert curve(paused, resumed) == curve(untouched)
    assert resumed.last.weights_hash == untouched.last.weights_hash


def test_parameters_set_while_paused_hold_from_the_first_step(jobs: Jobs) -> None:
    jobs.run("job", {3: [Pause()]})
    line = jobs.run("job", attempt=2, parameters=Parameters(learning_rate=2e-2, logging_steps=2))
    assert line.of(ParametersSet) == [ParametersSet(5, Parameters(learning_rate=2e-2, logging_steps=2))]
    assert list(line.points) == [6, 8]
    assert line.points[6]["learning_rate"] == pytest.approx(2e-2 * 3 / 8)


def test_steps_of_saving_and_evaluating_change(jobs: Jobs) -> None:
    order = SetParameters(Parameters(save_steps=3, eval_steps=1, early_stopping_patience=9))
    line = jobs.run(
        "job", {2: [order]}, training={"eval_strategy": "steps", "eval_steps": 100}, eval_fraction=0.25
    )
    assert [step for step, values in line.points.items() if "eval_loss" in values] == [0, 3, 4, 5, 6, 7, 8]
    assert {saved.step for saved in line.of(Saved) if saved.reason == "schedule"} == {3, 6}


def test_schedules_survive_a_pause(jobs: Jobs) -> None:
    order = SetParameters(Parameters(logging_steps=4))
    jobs.run("job", {1: [order]}, delay=0)
    paused = jobs.run("paused", {1: [order], 4: [Pause()]})
    resumed = jobs.run("paused", attempt=2)
    assert list(paused.points) == [1, 4]
    assert list(resumed.points) == [8]


def test_the_same_rows_in_smaller_micro_batches_are_the_same_steps(jobs: Jobs) -> None:
    plain = jobs.run("plain")
    order = SetParameters(Parameters(batch_size=2, gradient_accumulation_steps=2))
    line = jobs.run("job", {3: [order]})
    (told,) = line.of(ParametersSet)
    assert told == ParametersSet(5, Parameters(batch_size=2, gradient_accumulation_steps=2))
    for step, values in plain.points.items():
        assert line.points[step]["train_loss"] == pytest.approx(values["train_loss"], abs=1e-5)
        assert line.points[step]["tokens_seen"] == values["tokens_seen"]
        assert line.points[step]["epoch"] == values["epoch"]
    assert line.of(Note) == []


def test_a_larger_effective_batch_takes_each_row_once_and_survives_a_pause(jobs: Jobs) -> None:
    order = SetParameters(Parameters(gradient_accumulation_steps=3))
    training = {"max_steps": 10, "batch_size": 4}
    untouched = jobs.run("untouched", {2: [order]}, training=training)
    paused = jobs.run("paused", {2: [order], 4: [Pause()]}, training=training)
    resumed = jobs.run("paused", attempt=2, training=training)
    # 3 steps of 4 rows and 3 of 12 are the 48 rows of an epoch.
    assert untouched.points[6]["epoch"] == 1.0
    whole = jobs.run("whole", training={"max_steps": 12, "batch_size": 4})
    assert untouched.points[6]["tokens_seen"] == whole.points[12]["tokens_seen"]
    assert "An optimizer step now takes 12 rows in place of 4" in untouched.of(Note)[0].text
    assert resumed.of(Ready)[0].gradient_accumulation_steps == 3
    assert curve(paused, resumed) == curve(untouched)
    assert resumed.last.weights_hash == untouched.last.weights_hash


def test_what_cannot_be_set_is_refused_with_a_sentence_and_the_rest_is_taken(jobs: Jobs) -> None:
    line = jobs.run("job", {2: [SetParameters(Parameters(batch_size=100_000, save_steps=3, eval_steps=5))]})
    (told,) = line.of(ParametersSet)
    assert told.parameters == Parameters(save_steps=3)
    assert "batch_size must be at least 1 and at most 65536, not 100000." in told.refused
    assert "eval_steps has no effect" in told.refused


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (Parameters(learning_rate=-1.0), "learning_rate must be above 0 and at most 100, not -1.0."),
        (Parameters(learning_rate=math.inf), "learning_rate must be above 0 and at most 100, not inf."),
        (Parameters(learning_rate=math.nan), "learning_rate must be above 0 and at most 100, not nan."),
        (
            Parameters(early_stopping_patience=0),
            "early_stopping_patience must be at least 1 and at most 1000000000, not 0.",
        ),
    ],
)
def test_what_a_job_may_not_have_is_refused_while_it_runs(value: Parameters, why: str, jobs: Jobs) -> None:
    line = jobs.run("job", {2: [SetParameters(value)]}, training={"max_steps": 4})
    (told,) = line.of(ParametersSet)
    assert (told.refused, told.parameters) == (why, Parameters())


def test_what_was_set_after_the_checkpoint_is_replayed_at_its_step(jobs: Jobs) -> None:
    faster = Parameters(learning_rate=2e-2, logging_steps=1)
    training = {"save_steps": 3}
    untouched = jobs.run("untouched", {3: [SetParameters(faster)]}, training=training)
    (told,) = untouched.of(ParametersSet)
    lost = jobs.run("lost", {3: [SetParameters(faster)], 4: [Cancel()]}, training=training)
    again = jobs.run(
        "lost", attempt=2, training=training, parameters=faster, applied=[(told.step, told.parameters)]
    )
    assert again.of(Ready)[0].start_step == 3
    (put_back,) = again.of(ParametersSet)
    assert (put_back.step, put_back.parameters, put_back.replayed) == (told.step, told.parameters, True)
    assert curve(lost, again) == curve(untouched)
    assert again.last.weights_hash == untouched.last.weights_hash


def replayed(jobs: Jobs, name: str, applied: list[tuple[int, Parameters]], **changes: Any) -> Any:
    """Run a job's second attempt after its first was lost; return what it says."""
    return jobs.run(name, attempt=2, applied=applied, **changes)


def told(line: Any) -> list[tuple[int, Parameters]]:
    return [(event.step, event.parameters) for event in line.of(ParametersSet)]


def test_changes_of_one_step_are_replayed_in_their_order(jobs: Jobs) -> None:
    orders = [SetParameters(Parameters(learning_rate=rate)) for rate in (2e-2, 3e-2, 2e-2)]
    untouched = jobs.run("untouched", {4: orders}, training={"save_steps": 3})
    jobs.run("lost", {4: orders, 5: [Cancel()]}, training={"save_steps": 3})
    again = replayed(
        jobs, "lost", told(untouched), parameters=Parameters(learning_rate=2e-2), training={"save_steps": 3}
    )
    assert told(again) == told(untouched)
    assert all(event.replayed for event in again.of(ParametersSet))
    assert again.last.weights_hash == untouched.last.weights_hash


def test_an_old_wish_does_not_come_after_a_new_one(jobs: Jobs) -> None:
    old = [(6, Parameters(learning_rate=9e-2, save_steps=4))]
    jobs.run("lost", {3: [Cancel()]}, training={"save_steps": 3})
    again = replayed(
        jobs, "lost", old, parameters=Parameters(learning_rate=1e-3, save_steps=4), training={"save_steps": 3}
    )
    assert told(again) == [(4, Parameters(learning_rate=1e-3)), (6, Parameters(save_steps=4))]


def test_what_a_resume_itself_had_set_is_replayed_too(jobs: Jobs) -> None:
    training = {"save_steps": 3}
    jobs.run("job", {2: [Pause()]}, training=training)
    untouched = jobs.run("job", attempt=2, parameters=Parameters(learning_rate=3e-2), training=training)
    jobs.run("lost", {2: [Pause()]}, training=training)
    jobs.run("lost", {4: [Cancel()]}, attempt=2, parameters=Parameters(learning_rate=3e-2), training=training)
    # The checkpoint is the one of the pause: what the second attempt set at its start is not in it.
    third = jobs.run(
        "lost",
        attempt=3,
        parameters=Parameters(learning_rate=3e-2),
        applied=told(untouched),
        training=training,
    )
    assert third.of(Ready)[0].start_step == 3
    assert third.last.weights_hash == untouched.last.weights_hash
