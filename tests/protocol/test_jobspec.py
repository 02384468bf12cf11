"""A job is typed and closed."""

from typing import Any

import msgspec
import pytest

from protocol.jobspec import RUNNABLE, BadSpec, DataSpec, JobSpec, LoraSpec, Method, ModelSpec, TrainingSpec


def convert(**tree: Any) -> JobSpec:
    return msgspec.convert({"job_id": "j1", "model": {"name": "m"}, **tree}, JobSpec)


def test_a_job_needs_no_more_than_an_id_and_a_model() -> None:
    assert convert() == JobSpec(job_id="j1", model=ModelSpec(name="m"))


def test_it_survives_the_wire_whole() -> None:
    job = convert(
        lora={"r": 8, "target_modules": ["q_proj"]},
        data={"path": "a.jsonl", "eval_fraction": 0.1},
        training={"max_steps": 5, "learning_rate": 1e-3},
        samples=[{"prompt": "p", "answer": "a"}],
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(job), type=JobSpec) == job
    assert isinstance(job.lora, LoraSpec)
    assert job.lora.target_modules == ["q_proj"]


@pytest.mark.parametrize("bad", ["", ".hidden", "../up", "a/b", "a\\b", "a b", "x" * 129, "a\n", "-rf"])
def test_an_id_cannot_leave_its_folder(bad: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        convert(job_id=bad)


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ({"training": {"lerning_rate": 1}}, "$.training"),
        ({"training": {"batch_size": 0}}, "$.training.batch_size"),
        ({"training": {"batch_size": 2.5}}, "$.training.batch_size"),
        ({"training": {"learning_rate": float("nan")}}, "$.training.learning_rate"),
        ({"training": {"lr_scheduler_type": "steep"}}, "$.training.lr_scheduler_type"),
        ({"training": {"seed": 2**32}}, "$.training.seed"),
        ({"model": {"name": ""}}, "$.model.name"),
        ({"model": {"name": "m", "quantization": {"bits": 3}}}, "$.model.quantization.bits"),
        ({"lora": {"r": 0}}, "$.lora.r"),
        ({"lora": {"target_modules": "q_proj,v_proj"}}, "$.lora.target_modules"),
        ({"data": {"eval_fraction": 1}}, "$.data.eval_fraction"),
        ({"samples": [{"prompt": "p"}] * 17}, "$.samples"),
        ({"method": "grpo"}, "$.method"),
    ],
)
def test_what_is_out_of_bounds_is_refused_with_its_path(part: dict[str, Any], path: str) -> None:
    with pytest.raises(msgspec.ValidationError) as refused:
        convert(**part)
    assert f"`{path}`" in str(refused.value)


def test_every_platform_method_is_known_and_some_can_run() -> None:
    assert set(Method) == {"sft", "cpt", "dpo", "orpo", "rlhf"}
    assert set(RUNNABLE) <= set(Method)


def test_a_refusal_names_its_path() -> None:
    assert str(BadSpec("training.x", "no such setting.")) == "training.x: no such setting."
    assert str(BadSpec("", "no.")) == "no."


def test_defaults_lie_within_their_own_limits() -> None:
    for part in (TrainingSpec(), DataSpec(), LoraSpec()):
        assert msgspec.convert(msgspec.to_builtins(part), type(part)) == part
