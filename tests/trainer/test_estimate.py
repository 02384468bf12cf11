"""What a job is said to need, before it starts and at its start."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import LlamaConfig

from agent.trainer import check, entry, estimate, formula, sizes
from agent.trainer.errors import TrainerError
from agent.trainer.forecast import MEASURED
from agent.trainer.formula import GB, Rows, Situation
from agent.trainer.model import choose_precision
from protocol.failures import FailureReason
from protocol.jobspec import JobSpec, LoraSpec, ModelSpec, Quantization, TrainingSpec
from protocol.worker import Check, Estimated, Limits, Ready, Start
from tests.bench import estimate as bench
from tests.trainer.conftest import Jobs, RecordingLine, chat_rows, write_jsonl
from tests.trainer.test_healing import device

BIG = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def test_a_job_tells_its_needs_before_its_first_step_and_what_they_came_to(jobs: Jobs) -> None:
    line = jobs.run(training={"max_steps": 10})
    told = [event.estimate for event in line.of(Estimated)]
    kinds = [type(event) for event in line.events]
    assert kinds.index(Estimated) < kinds.index(Ready)
    assert len(told) == 2 and MEASURED not in told[0].parts
    assert told[0].total_steps == 10 and told[0].fits and told[0].host_gb > 0.3
    # The peak is that of all the tests in this process, so it can only be more.
    assert told[1].parts[MEASURED] > 0


def looked_at(start: Start) -> tuple[Any, RecordingLine]:
    line = RecordingLine({})
    assert check.check(Check(start.spec, start.workspace, start.limits), line) == 0
    return line.of(Estimated)[0].estimate, line


def test_a_check_measures_and_leaves_nothing(jobs: Jobs) -> None:
    start = jobs.start(
        eval_fraction=0.25, training={"max_steps": None, "epochs": 2, "eval_strategy": "epoch"}
    )
    found, _ = looked_at(start)
    assert found.total_steps == 18  # 36 of 48 rows, 4 at a time, twice
    assert found.step_seconds > 0 and found.total_seconds > 18 * found.step_seconds * 0.5
    assert found.fits and found.host_gb < found.free_host_gb
    assert sum(found.parts.values()) == pytest.approx(found.host_gb, rel=0.05)
    assert not any(Path(start.workspace.cache).rglob("*.arrow"))
    assert not any(path.name.startswith("probe-") for path in Path(start.workspace.cache).iterdir())
    assert not Path(start.workspace.checkpoints).exists() and not Path(start.workspace.output).exists()


def test_a_model_without_weights_here_is_measured_with_random_ones(
    jobs: Jobs, tiny_model: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    # Deeper than what is probed, so that the figures are extended.
    config = json.loads((bare / "config.json").read_text())
    config |= {"num_hidden_layers": 12, "layer_types": None}
    (bare / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    found, _ = looked_at(jobs.start(base=bare, lora=LoraSpec(r=4)))
    assert found.fits and found.step_seconds > 0


def test_a_check_finds_the_bad_row(jobs: Jobs, tmp_path: Path) -> None:
    rows = chat_rows(8)
    rows[5]["messages"] = [{"role": "user", "content": None}]
    with pytest.raises(TrainerError) as error:
        looked_at(jobs.start(rows=write_jsonl(tmp_path / "bad.jsonl", rows)))
    assert error.value.reason is FailureReason.DATA and error.value.rows == [6]


def test_rows_whose_prompts_fill_everything_are_no_job(jobs: Jobs, tmp_path: Path) -> None:
    rows = [{"prompt": "the sun " * 60, "completion": "sings"}] * 8
    with pytest.raises(TrainerError, match=r"Raise training\.max_length"):
        looked_at(jobs.start(rows=write_jsonl(tmp_path / "long.jsonl", rows), training={"max_length": 8}))


def situation(**changes: Any) -> Situation:
    """Return an 8B model on a device, where nothing is loaded."""
    training = {"batch_size": 8, "max_length": 4096, **changes.pop("training", {})}
    quantization = changes.pop("quantization", None)
    spec = JobSpec(
        job_id="big",
        model=ModelSpec(name="8b", quantization=quantization, dtype="bfloat16"),
        training=TrainingSpec(**training),
        **changes,
    )
    precision = choose_precision(spec, Limits(), lambda level, text: None)
    rows = Rows(1000, 0, 4096, 4096.0, 100)
    return Situation(spec, BIG, precision, rows, True, sizes.planned(spec, precision, BIG))


def test_an_8b_model_weighs_what_is_known_of_it() -> None:
    full, adapter = situation().sizes, situation(lora=LoraSpec(r=16)).sizes
    packed = situation(lora=LoraSpec(r=16), quantization=Quantization(bits=4, double_quant=True)).sizes
    assert full.parameters == 8_030_261_248 and full.weights / GB == pytest.approx(14.96, abs=0.05)
    assert full.optimizer == 2 * full.weights or full.optimizer == pytest.approx(2 * full.weights, rel=1e-3)
    assert adapter.trainable == 41_943_040
    # 6.98 B numbers in 4 bits with 8 bits for 64 of them; embeddings and head in 16.
    assert packed.weights / GB == pytest.approx(5.5, abs=0.2)


def test_advice_comes_with_figures_and_the_most_first() -> None:
    told = formula.advice(situation(lora=LoraSpec(r=16)))
    saved = [float(sentence.rsplit("about ", 1)[1].split(" ")[0]) for sentence in told if "GB" in sentence]
    assert saved == sorted(saved, reverse=True) and saved[0] > 10
    words = " ".join(told)
    assert "training.batch_size 4 with gradient_accumulation_steps 2" in words
    assert "training.max_length 2048" in words and "gradient_checkpointing" in words
    assert "4 bits" in words and "LoRA adapter" not in words
    assert "LoRA adapter" in " ".join(formula.advice(situation()))


def test_what_is_advised_saves_what_is_said() -> None:
    before = situation()
    half = situation(training={"batch_size": 4, "gradient_accumulation_steps": 2})
    told = next(one for one in formula.advice(before) if one.startswith("training.batch_size"))
    saved = formula._needs(before, 1.0) - formula._needs(half, 1.0)
    assert f"about {saved / GB:.1f} GB" in told


def test_advice_needs_no_model_for_a_job_that_ran_out_of_memory() -> None:
    told = estimate.advice_for(situation(lora=LoraSpec()).spec, Limits(), BIG, longest=1024)
    assert any("max_length 512" in one for one in told)
    nothing = situation(
        lora=LoraSpec(),
        quantization=Quantization(bits=4),
        training={"batch_size": 1, "max_length": 64, "gradient_checkpointing": True},
    )
    assert estimate.advice_for(nothing.spec, Limits(), BIG) == []


def test_a_job_whose_single_rows_do_not_fit_ends_with_advice_in_figures(jobs: Jobs) -> None:
    with device() as small, pytest.raises(TrainerError) as caught:
        small.rows = 0
        jobs.run("job")
    told = entry._savings(jobs.start("job"), caught.value)
    assert "A LoRA adapter of rank 16" in told and "gradient_checkpointing" in told
    assert "saves about" in told and "batch_size" not in told  # it has been one row already


def test_what_does_not_fit_is_said_so(jobs: Jobs) -> None:
    start = jobs.start(training={"batch_size": 512, "max_length": 4096})
    at = situation()
    rows = Rows(10_000, 0, 4096, 4096.0, 100)
    found = estimate.estimate(
        start.spec,
        start.workspace,
        start.limits,
        config=BIG,
        precision=at.precision,
        sizes=at.sizes,
        rows=rows,
        baseline=1 << 29,
    )
    assert not found.fits and found.advice


def test_disk_holds_the_checkpoints_that_are_kept_and_the_one_being_written(jobs: Jobs) -> None:
    at = situation(lora=LoraSpec(r=16))
    spec = msgspec.structs.replace(
        at.spec, training=msgspec.structs.replace(at.spec.training, save_steps=10, save_total_limit=2)
    )
    many, few = Rows(1000, 0, 4096, 4096.0, 100), Rows(1000, 0, 4096, 4096.0, 15)
    one = at.sizes.checkpoint
    assert estimate._disk(spec, Limits(), many, at.sizes) == 3 * one + at.sizes.trained
    assert estimate._disk(spec, Limits(), few, at.sizes) == 2 * one + at.sizes.trained


def test_layers_that_are_computed_twice_leave_holes_on_a_cpu() -> None:
    once = replace(situation(lora=LoraSpec()), on_cuda=False)
    twice = replace(situation(lora=LoraSpec(), training={"gradient_checkpointing": True}), on_cuda=False)
    layer = once.spec.training.batch_size * 4096 * formula._per_token(twice, BIG, 2, 4096)
    assert formula.step(twice).lost > formula.CHURN * layer
    assert formula.step(replace(twice, on_cuda=True)).lost == 0.0


@pytest.mark.parametrize("name", ["5M full", "30M nf4, double"])
def test_the_estimate_is_near_the_truth(tmp_path: Path, name: str) -> None:
    """Two of the benchmark's jobs, each estimated and trained in a process of its own."""
    bench.build(tmp_path, {bench.JOBS[name]["base"]})
    told = bench.child("check", bench.check_of(tmp_path, name))
    true = bench.child("run", bench.start_of(tmp_path, name))
    for said in (told["estimate"], true["early"]):
        assert -0.1 < bench.error(said, true).whole < 0.25


def test_the_start_s_formula_knows_quantised_dora_computed_twice(tmp_path: Path) -> None:
    """It was 29 % too low: mapped files beside 8-bit weights, and what is lost in computing layers again."""
    name = "30M DoRA int8, checkpointing"
    bench.build(tmp_path, {bench.JOBS[name]["base"]})
    true = bench.child("run", bench.start_of(tmp_path, name))
    assert -0.1 < bench.error(true["early"], true).whole < 0.25


def test_an_error_beyond_its_bound_misses_the_benchmark_s_target() -> None:
    good, low = bench.Error(0.05, 0.1), bench.Error(-0.11, -0.2)
    assert all(figure.ok for figure in bench.gates("any", {"a": good, "b": good}).values())
    told = bench.gates("any", {"a": good, "b": good, "c": low})
    assert [told[f"any_{name}"].ok for name in ("median", "worst", "too_low")] == [True, True, False]
    assert told["any_too_low"].detail["above_imports"] == -20.0 and told["any_too_low"].detail["job"] == "c"
    assert not bench.gates("any", {"a": bench.Error(0.26, 0.3)})["any_worst"].ok
