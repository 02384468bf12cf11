"""Orders, exact pause and the step boundary, on real runs of a tiny model."""

from typing import Any

import pytest

from agent.trainer.errors import TrainerError
from agent.trainer.output import weights_hash
from protocol.failures import FailureReason
from protocol.jobspec import LoraSpec, Quantization
from protocol.worker import (
    Cancel,
    EvaluateNow,
    Finished,
    Left,
    Metrics,
    Note,
    Parameters,
    Pause,
    Ready,
    Saved,
    SaveNow,
    SetParameters,
    Stop,
    Trained,
)
from tests.trainer.conftest import Jobs, curve

DROPOUT = LoraSpec(r=4, dropout=0.2)
EVERY_2 = {"eval_strategy": "steps", "eval_steps": 2}

EXACT: dict[str, dict[str, Any]] = {
    "full": {
        "training": {"batch_size": 2, "gradient_accumulation_steps": 2, **EVERY_2},
        "eval_fraction": 0.25,
    },
    "lora packed": {"lora": DROPOUT, "training": {"packing": True, "batch_size": 1}},
    "nf4": {
        "lora": DROPOUT,
        "quantization": Quantization(bits=4),
        "training": EVERY_2,
        "eval_fraction": 0.25,
    },
    "int8": {"lora": DROPOUT, "quantization": Quantization(bits=8)},
    "second epoch by length": {
        "lora": DROPOUT,
        "training": {"group_by_length": True, "batch_size": 12, "lr_scheduler_type": "cosine"},
    },
}


@pytest.mark.parametrize("case", EXACT)
def test_a_paused_job_goes_on_as_if_never_touched(case: str, jobs: Jobs) -> None:
    untouched = jobs.run("untouched", **EXACT[case])
    paused = jobs.run("paused", {5: [Pause()]}, **EXACT[case])
    assert paused.last == Left("paused", 6)
    assert [saved.step for saved in paused.of(Saved) if saved.reason == "pause"] == [6]
    resumed = jobs.run("paused", attempt=2, **EXACT[case])
    assert resumed.of(Ready)[0].start_step == 6
    assert curve(paused, resumed) == curve(untouched)
    assert resumed.last.weights_hash == untouched.last.weights_hash


def test_a_point_that_spans_a_pause_is_the_same(jobs: Jobs) -> None:
    training = {"logging_steps": 3}
    untouched = jobs.run("untouched", training=training)
    # Two looks a step: after the point of step 3, the fourth look is the end of step 5.
    paused = jobs.run("paused", {3: [Pause()]}, delay=3, training=training)
    assert paused.last == Left("paused", 5)
    resumed = jobs.run("paused", attempt=2, training=training)
    assert curve(paused, resumed) == curve(untouched)
    assert list(resumed.points) == [6, 8]


def test_a_pause_in_an_evaluation_puts_it_off_and_loses_nothing(jobs: Jobs) -> None:
    wanted = {"training": EVERY_2, "eval_fraction": 0.25}
    untouched = jobs.run("untouched", **wanted)
    # After the point of step 3: micro-batch, boundary, and the first held-out batch.
    paused = jobs.run("paused", {3: [Pause()]}, delay=2, **wanted)
    assert paused.last == Left("paused", 4)
    assert "eval_loss" not in paused.points[4]
    resumed = jobs.run("paused", attempt=2, **wanted)
    assert {"train_loss", "eval_loss"} <= resumed.points[4].keys()
    assert curve(paused, resumed) == curve(untouched)
    assert resumed.last.weights_hash == untouched.last.weights_hash


def test_a_pause_at_the_last_step_leaves_only_the_finish(jobs: Jobs) -> None:
    wanted = {"eval_fraction": 0.25}
    untouched = jobs.run("untouched", **wanted)
    paused = jobs.run("paused", {7: [Pause()]}, **wanted)
    assert paused.last == Left("paused", 8)
    resumed = jobs.run("paused", attempt=2, **wanted)
    assert resumed.of(Ready)[0].start_step == 8
    assert curve(paused, resumed) == curve(untouched)
    assert resumed.last.weights_hash == untouched.last.weights_hash
    assert resumed.last.values["final_eval_loss"] == untouched.last.values["final_eval_loss"]


def test_a_pause_before_the_first_step_leaves_at_once(jobs: Jobs) -> None:
    paused = jobs.run("paused", {0: [Pause()]}, eval_fraction=0.25)
    assert isinstance(paused.last, Left)
    assert paused.last.why == "paused"


def test_a_cancel_leaves_within_the_step_and_saves_nothing(jobs: Jobs) -> None:
    line = jobs.run("job", {2: [Cancel()]}, training={"gradient_accumulation_steps": 3})
    assert line.last == Left("cancelled", 2)
    assert line.of(Saved) == []
    assert not jobs.output().exists()


def test_a_stop_keeps_the_best(jobs: Jobs) -> None:
    # At such a rate an early evaluation is the best.
    wanted = {"training": {**EVERY_2, "learning_rate": 0.6, "max_steps": 40}, "eval_fraction": 0.25}
    line = jobs.run("job", {9: [Stop()]}, **wanted)
    end = line.last
    assert isinstance(end, Finished)
    assert line.of(Trained) == [Trained(10, "stop")]
    assert end.values["final_eval_loss"] == end.values["best_eval_loss"]
    best = end.values["best_step"]
    assert best < 10
    assert end.weights_hash == weights_hash(jobs.checkpoints() / f"step-{best:.0f}")
    assert any("best evaluation" in note.text for note in line.of(Note))


def test_early_stopping_counts_evaluations(jobs: Jobs) -> None:
    training = {**EVERY_2, "learning_rate": 0.6, "max_steps": 60, "early_stopping_patience": 2}
    line = jobs.run("job", training=training, eval_fraction=0.25)
    (trained,) = line.of(Trained)
    assert trained.why == "early_stopping"
    best = line.last.values["best_step"]
    assert trained.step == best + 4
    assert line.points[trained.step]["epochs_without_improvement"] == 2


def test_an_evaluation_that_a_pause_put_off_ends_the_job_all_the_same(jobs: Jobs) -> None:
    training = {**EVERY_2, "learning_rate": 0.6, "max_steps": 60, "early_stopping_patience": 2}
    untouched = jobs.run("untouched", training=training, eval_fraction=0.25)
    (ended,) = untouched.of(Trained)
    # After the point of the step before: micro-batch, boundary, and the first held-out batch of the last one.
    paused = jobs.run("paused", {ended.step - 1: [Pause()]}, delay=2, training=training, eval_fraction=0.25)
    assert paused.last == Left("paused", ended.step)
    resumed = jobs.run("paused", attempt=2, beside=True, training=training, eval_fraction=0.25)
    assert resumed.of(Trained) == [ended]
    assert curve(paused, resumed) == curve(untouched)
    assert resumed.last.weights_hash == untouched.last.weights_hash


def test_patience_that_is_lowered_is_over_after_another_look(jobs: Jobs) -> None:
    training = {**EVERY_2, "learning_rate": 0.6, "max_steps": 40, "logging_steps": 100}
    order = SetParameters(Parameters(early_stopping_patience=1))
    plain = jobs.run("plain", training=training, eval_fraction=0.25)
    worse = [step for step, values in plain.points.items() if values["epochs_without_improvement"] >= 1]
    at = next(step for step in worse if step + 2 in worse)
    line = jobs.run("job", {at: [order]}, training=training, eval_fraction=0.25)
    (trained,) = line.of(Trained)
    assert (trained.step, trained.why) == (at + 1, "early_stopping")
    # The step that ends it has its point, and the tokens up to there are counted.
    assert {"train_loss", "eval_loss"} <= line.points[trained.step].keys()
    assert line.last.values["tokens_seen"] > 0


def test_saves_and_evaluations_on_command_change_nothing(jobs: Jobs) -> None:
    wanted = {"lora": DROPOUT, "eval_fraction": 0.25}
    plain = jobs.run("plain", **wanted)
    asked = jobs.run("asked", {2: [SaveNow("c1"), EvaluateNow("c2")]}, **wanted)
    assert "eval_loss" in asked.points[3]
    assert [(saved.step, saved.command_id) for saved in asked.of(Saved) if saved.reason == "command"] == [
        (3, "c1")
    ]
    assert asked.last.weights_hash == plain.last.weights_hash


def test_an_evaluation_with_nothing_held_out_is_answered(jobs: Jobs) -> None:
    line = jobs.run("job", {2: [EvaluateNow("c2")]})
    assert any("no held-out rows" in note.text for note in line.of(Note))


def test_the_death_of_the_agent_saves_and_leaves(jobs: Jobs) -> None:
    lost = jobs.run("job", {3: ["gone"]})
    assert lost.last == Left("parent_lost", 4)
    assert [(saved.step, saved.reason) for saved in lost.of(Saved)] == [(4, "parent_lost")]
    again = jobs.run("job", attempt=2)
    untouched = jobs.run("untouched")
    assert again.last.weights_hash == untouched.last.weights_hash


@pytest.mark.parametrize("logging_steps", [1, 100])
def test_a_loss_that_is_no_number_ends_the_job_with_its_step(logging_steps: int, jobs: Jobs) -> None:
    # Found where a point is due, and where a checkpoint is: garbage is never saved.
    save_steps = 100 if logging_steps == 1 else 1
    training = {
        "learning_rate": 1e30,
        "max_grad_norm": 0,
        "logging_steps": logging_steps,
        "save_steps": save_steps,
    }
    with pytest.raises(TrainerError) as caught:
        jobs.run("job", training=training)
    assert caught.value.reason is FailureReason.NON_FINITE_LOSS
    assert caught.value.step == 2
    assert "step 2" in caught.value.sentence
    if logging_steps == 1:
        assert [event.step for event in jobs.line.of(Metrics)] == [1, 2]
    assert all(saved.step < 2 for saved in jobs.line.of(Saved))


def test_a_finish_that_was_killed_is_taken_up_without_another_step(jobs: Jobs) -> None:
    first = jobs.run("job", {4: [Stop()]})
    again = jobs.run("job", attempt=2)
    assert again.of(Ready)[0].start_step == 5
    assert again.of(Trained) == [Trained(5, "stop")]
    assert again.last.weights_hash == first.last.weights_hash


def test_a_stop_on_a_paused_job_ends_it_where_it_stood(jobs: Jobs) -> None:
    jobs.run("job", {3: [Pause()]}, eval_fraction=0.25)
    line = jobs.run("job", attempt=2, stop_at_once=True, eval_fraction=0.25)
    assert line.of(Trained) == [Trained(4, "stop")]
    assert "eval_loss" in line.points[4]
    assert isinstance(line.last, Finished)


def test_an_evaluation_leaves_the_gradient_of_4_bit_layers(jobs: Jobs) -> None:
    wanted = {"lora": DROPOUT, "quantization": Quantization(bits=4)}
    evaluated = jobs.run("evaluated", training=EVERY_2, eval_fraction=0.25, **wanted)
    norms = [values["grad_norm"] for step, values in evaluated.points.items() if step > 2]
    assert min(norms) > 0.1 * evaluated.points[1]["grad_norm"]
