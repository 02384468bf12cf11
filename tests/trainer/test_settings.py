"""What of a job's settings cannot be done is refused before anything is loaded; what does nothing is said."""

import sys
from typing import Any

import pytest
from transformers.training_args import OptimizerNames

from agent.trainer import check, settings
from agent.trainer.errors import TrainerError
from protocol.failures import FailureReason
from protocol.jobspec import JobSpec, Method, ModelSpec, TrainingSpec
from protocol.worker import Check, Finished, Metrics, Note
from tests.trainer.conftest import Jobs, RecordingLine


def spec(method: Method = Method.SFT, **training: Any) -> JobSpec:
    return JobSpec(job_id="job", model=ModelSpec(name="m"), method=method, training=TrainingSpec(**training))


def refused(one: JobSpec) -> str:
    with pytest.raises(TrainerError) as caught:
        settings.check(one)
    assert caught.value.reason is FailureReason.SPEC
    return caught.value.sentence


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optim", [str(name.value) for name in OptimizerNames])
def test_every_optimizer_trains_or_is_refused_in_a_sentence(optim: str, jobs: Jobs) -> None:
    try:
        line = jobs.run(training={"max_steps": 2, "optim": optim, "save_steps": 1})
    except TrainerError as error:
        assert optim not in settings.OPTIMIZERS + settings.BITSANDBYTES
        assert error.reason is FailureReason.SPEC
        assert error.sentence.startswith(
            f"training.optim: this agent cannot train with {optim}; it can with "
        )
        return
    assert line.of(Finished)[0].step == 2
    assert optim in settings.OPTIMIZERS + settings.BITSANDBYTES


def test_an_optimizer_whose_package_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = spec(optim="paged_adamw_8bit")
    settings.check(wanted)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert refused(wanted) == (
        "training.optim: paged_adamw_8bit is of the package bitsandbytes, which is not installed here. Install it "
        "where the agent is installed, or use adamw_torch."
    )
    settings.check(spec(optim="adafactor"))


@pytest.mark.parametrize("method", [Method.SFT, Method.DPO])
def test_the_metrics_that_are_accepted_are_those_of_an_evaluation(
    method: Method, jobs: Jobs, pair_file: Any
) -> None:
    rows = {"rows": pair_file} if method is Method.DPO else {}
    line = jobs.run(eval_fraction=0.25, method=method, training={"max_steps": 1}, **rows)
    first = next(event.values for event in line.of(Metrics) if event.step == 0)
    measured = {name for name in first if name.startswith("eval_") or name == "perplexity"}
    # The loss of pairs has one too, which is not shown; jobs of before may be compared by it.
    assert set(settings.metrics(method)) - measured == ({"perplexity"} if method is Method.DPO else set())
    assert measured <= set(settings.metrics(method))


def test_a_metric_that_does_not_exist_is_refused_with_those_that_do() -> None:
    assert refused(spec(metric_for_best="eval_accuracy", eval_strategy="epoch")) == (
        "training.metric_for_best: an evaluation of sft has no measure eval_accuracy; it has eval_loss, perplexity."
    )
    asked = {"metric_for_best": "eval_rewards_margin", "load_best_at_end": True}
    settings.check(spec(Method.DPO, **asked))
    assert "eval_rewards_margin" in refused(spec(**asked))


def test_a_metric_that_nothing_is_compared_by_refuses_no_job() -> None:
    """The platform's page writes one that nobody has ever read."""
    settings.check(spec(metric_for_best="accuracy"))


def test_a_check_and_a_start_refuse_the_same_metric(jobs: Jobs) -> None:
    wanted = {"metric_for_best": "accuracy", "eval_strategy": "epoch"}
    with pytest.raises(TrainerError) as started:
        jobs.run(eval_fraction=0.25, training=wanted)
    start = jobs.start(eval_fraction=0.25, training=wanted)
    with pytest.raises(TrainerError) as looked:
        check.check(Check(start.spec, start.workspace, start.limits), RecordingLine({}))
    assert str(started.value) == str(looked.value)
    assert "has no measure accuracy" in str(started.value)


NONE_HELD_OUT = (
    "Without effect, because no rows are held out to evaluate on (data.eval_fraction or data.eval_path): "
)
NOT_ASKED = "Without effect, because training.eval_strategy is no (only an evaluation on command counts): "


@pytest.mark.parametrize(
    ("training", "held_out", "said"),
    [
        ({}, False, ""),
        ({"eval_strategy": "epoch"}, False, NONE_HELD_OUT + "training.eval_strategy."),
        (
            {"eval_strategy": "steps", "early_stopping_patience": 2, "load_best_at_end": True},
            False,
            NONE_HELD_OUT
            + "training.eval_strategy, training.early_stopping_patience, training.load_best_at_end.",
        ),
        ({"metric_for_best": "perplexity"}, False, NONE_HELD_OUT + "training.metric_for_best."),
        (
            {"early_stopping_patience": 2, "load_best_at_end": True},
            True,
            NOT_ASKED + "training.early_stopping_patience, training.load_best_at_end.",
        ),
        ({"eval_strategy": "steps", "early_stopping_patience": 2, "load_best_at_end": True}, True, ""),
    ],
)
def test_what_will_not_act_is_named(training: dict[str, Any], held_out: bool, said: str) -> None:
    assert settings.in_vain(spec(**training), held_out=held_out) == said


def test_what_will_not_act_is_said_by_a_check_and_once_by_a_job(jobs: Jobs) -> None:
    training = {"early_stopping_patience": 2, "save_steps": 2}
    start = jobs.start(training=training)
    line = RecordingLine({})
    assert check.check(Check(start.spec, start.workspace, start.limits), line) == 0

    def told(line: RecordingLine) -> list[str]:
        return [note.text for note in line.of(Note) if note.text.startswith("Without effect")]

    assert told(line) == [NONE_HELD_OUT + "training.early_stopping_patience."]
    assert told(jobs.run(training=training)) == told(line)
    assert told(jobs.run(attempt=2, training=training)) == []
