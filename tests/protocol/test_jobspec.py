"""A job is typed and closed."""

import math
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from msgspec import inspect

from protocol.jobspec import (
    RUNNABLE,
    BadSpec,
    DataSpec,
    JobSpec,
    LoraSpec,
    Method,
    ModelSpec,
    TrainingSpec,
    not_within,
)
from protocol.trainingconfig import job_spec
from protocol.worker import Parameters


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


NEEDED: dict[str, dict[str, Any]] = {
    "model": {"name": "m"},
    "model.quantization": {"bits": 4},
    "branch": {"job_id": "j0"},
    "samples": {"prompt": "p"},
}
"""What a part cannot be without."""

Limit = tuple[str, Any, Any]
"""Path of a setting, a value just beyond its limit, and the nearest one within it (LEFT: there is none to try)."""
LEFT = object()


def limits_of(path: str, kind: inspect.Type) -> Iterator[Limit]:
    """Yield every limit that a setting of this type has."""
    match kind:
        case inspect.UnionType(types=types):
            for one in types:
                yield from limits_of(path, one)
        case inspect.StructType(fields=fields):
            yield f"{path}.unheard_of" if path else "unheard_of", 1, LEFT
            for field in fields:
                yield from limits_of(f"{path}.{field.encode_name}".lstrip("."), field.type)
        case inspect.ListType(item_type=item, max_length=most):
            if most is not None:
                whole = NEEDED.get(path, "x")
                yield path, [whole] * (most + 1), [whole] * most
            for inner, beyond, within in limits_of(path, item):
                name = inner.removeprefix(path).lstrip(".")
                if name:
                    part = NEEDED.get(path, {})
                    yield path, [{**part, name: beyond}], LEFT if within is LEFT else [{**part, name: within}]
                else:
                    yield path, [beyond], LEFT if within is LEFT else [within]
            yield path, "another", LEFT
        case inspect.IntType(ge=least, le=most):
            assert least is not None and most is not None, f"{path} has no limit"
            yield path, least - 1, least
            yield path, most + 1, most
            yield path, least + 0.5, LEFT
            yield path, "another", LEFT
        case inspect.FloatType(gt=above, ge=least, lt=below, le=most):
            low, high = (above if above is not None else least), (below if below is not None else most)
            assert low is not None and high is not None, f"{path} has no limit"
            yield (
                path,
                low if above is not None else math.nextafter(low, -math.inf),
                math.nextafter(low, math.inf),
            )
            yield path, high if below is not None else math.nextafter(high, math.inf), math.nextafter(high, 0)
            yield from ((path, odd, LEFT) for odd in (math.nan, math.inf, -math.inf, "another"))
        case inspect.StrType(min_length=least, max_length=most, pattern=pattern):
            assert most is not None or pattern, f"{path} has no limit"
            if most is not None:
                yield path, "x" * (most + 1), "x" * most
            if least:
                yield path, "x" * (least - 1), "x" * least
            if pattern:
                yield path, "x" * 129, "x" * 128
            yield path, 1, LEFT
        case inspect.LiteralType() | inspect.EnumType():
            yield path, "another", LEFT
        case inspect.BoolType():
            yield path, "yes", LEFT
            yield path, 1, LEFT
        case inspect.NoneType():
            pass
        case _:
            raise AssertionError(f"{path}: a kind of setting that no test knows: {kind}")


LIMITS = list(limits_of("", inspect.type_info(JobSpec)))


def tree(path: str, value: Any) -> dict[str, Any]:
    """Return a job with one setting."""
    root: dict[str, Any] = {"job_id": "j1", "model": {"name": "m"}}
    at, so_far = root, ""
    *parts, last = path.split(".")
    for part in parts:
        so_far = f"{so_far}.{part}".lstrip(".")
        at = at.setdefault(part, dict(NEEDED.get(so_far, {})))
    at[last] = value
    return root


@pytest.mark.parametrize(
    ("path", "beyond", "within"), LIMITS, ids=[f"{path}-{at}" for at, (path, *_) in enumerate(LIMITS)]
)
def test_every_limit_holds_and_names_its_setting(path: str, beyond: Any, within: Any) -> None:
    with pytest.raises(msgspec.ValidationError) as refused:
        msgspec.convert(tree(path, beyond), JobSpec)
    where = str(refused.value).rpartition(" - at `$")[2]
    named = path.rpartition(".")[0] if path.endswith("unheard_of") else path
    assert where.lstrip(".").startswith((named, "`")), refused.value
    assert named or "unheard_of" in str(refused.value)
    if within is not LEFT:
        msgspec.convert(tree(path, within), JobSpec)


def test_the_limits_are_all_there() -> None:
    found = {path for path, _, _ in LIMITS}
    assert {f"training.{name}" for name in TrainingSpec.__struct_fields__} <= found
    assert {"job_id", "samples", "lora.r", "dpo.beta", "branch.job_id", "model.quantization.bits"} <= found
    assert len(LIMITS) > 200


OF_TRAINING = [
    (path, beyond)
    for path, beyond, _ in LIMITS
    if path.startswith("training.")
    and not path.endswith(("unheard_of", "epochs", "metric_for_best", "load_best_at_end"))
]


@pytest.mark.parametrize(
    ("path", "beyond"), OF_TRAINING, ids=[f"{path}-{at}" for at, (path, _) in enumerate(OF_TRAINING)]
)
def test_a_config_beyond_a_limit_of_training_is_refused_in_a_sentence(path: str, beyond: Any) -> None:
    config = {"model": {"name": "m"}, "training": {path.removeprefix("training."): beyond}}
    if path == "training.warmup_ratio" and not beyond:
        return  # the page's word for none
    with pytest.raises(BadSpec) as refused:
        job_spec("j1", config)
    assert refused.value.path == path
    assert refused.value.why.endswith(".") and "`$" not in refused.value.why


def test_what_changes_while_a_job_runs_has_the_jobs_own_limits() -> None:
    for name in set(Parameters.__struct_fields__) - {"step_rows"}:
        mine = [(beyond, within) for path, beyond, within in LIMITS if path == f"training.{name}"]
        for beyond, within in mine:
            if not isinstance(beyond, str):
                assert not_within(name, beyond)
            if within is not LEFT:
                assert not_within(name, within) == ""
    assert not_within("learning_rate", math.inf) == "above 0 and at most 100"
    assert not_within("early_stopping_patience", 0) == "at least 1 and at most 1000000000"


def test_every_platform_method_is_known_and_some_can_run() -> None:
    assert set(Method) == {"sft", "cpt", "dpo", "orpo", "rlhf"}
    assert set(RUNNABLE) <= set(Method)


def test_a_refusal_names_its_path() -> None:
    assert str(BadSpec("training.x", "no such setting.")) == "training.x: no such setting."
    assert str(BadSpec("", "no.")) == "no."


def test_defaults_lie_within_their_own_limits() -> None:
    for part in (TrainingSpec(), DataSpec(), LoraSpec()):
        assert msgspec.convert(msgspec.to_builtins(part), type(part)) == part
