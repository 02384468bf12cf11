"""Out of memory on real runs of a tiny model: a hook raises the allocator's own exception."""

import contextlib
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers.models.llama.modeling_llama import LlamaMLP

from agent.trainer.errors import TrainerError
from protocol.failures import FailureReason
from protocol.jobspec import LoraSpec, Method, Quantization
from protocol.worker import (
    Cancel,
    Left,
    Metrics,
    Note,
    Parameters,
    ParametersSet,
    Pause,
    Ready,
    Saved,
    SetParameters,
)
from tests.trainer.conftest import Jobs, RecordingLine, curve

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."


def cuda_error() -> Exception:
    return torch.OutOfMemoryError(CUDA)


def cpu_error() -> Exception:
    return RuntimeError(CPU)


class Device:
    """A device with room for so many rows at once in an MLP, forward or backward."""

    def __init__(self, error: Callable[[], Exception]) -> None:
        self.rows = 1 << 30
        self.error = error
        self.training_only = True
        self.refusals = 0
        self.once_in: set[int] = set()
        """Calls that fail once, however few rows."""
        self.calls = 0

    def allocate(self, module: Any, tensors: Any) -> None:
        if not isinstance(module, LlamaMLP) or (self.training_only and not module.training):
            return
        self.calls += 1
        rows = tensors[0].shape[0]
        if rows > self.rows or self.calls in self.once_in:
            self.refusals += 1
            raise self.error()


@contextlib.contextmanager
def device(error: Callable[[], Exception] = cuda_error, backward: bool = False) -> Iterator[Device]:
    made = Device(error)

    def forward(module: Any, args: Any) -> None:
        # A pass that nothing is learnt from keeps nothing for the way back.
        if torch.is_grad_enabled() or not made.training_only:
            made.allocate(module, args)

    def watch_backward(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, LlamaMLP) and output.requires_grad:
            output.register_hook(lambda gradient: made.allocate(module, (gradient,)))

    hooks = torch.nn.modules.module
    if backward:
        handle = hooks.register_module_forward_hook(watch_backward)
    else:
        handle = hooks.register_module_forward_pre_hook(forward)
    try:
        yield made
    finally:
        handle.remove()


def same_within(one: RecordingLine, other: RecordingLine, tolerance: float) -> None:
    assert one.points.keys() == other.points.keys()
    for step, values in other.points.items():
        assert one.points[step].get("train_loss") == pytest.approx(values.get("train_loss"), abs=tolerance)
        assert one.points[step].get("eval_loss") == pytest.approx(values.get("eval_loss"), abs=tolerance)
        assert one.points[step]["tokens_seen"] == values["tokens_seen"]


@pytest.mark.parametrize(
    ("error", "backward"), [(cuda_error, False), (cpu_error, True)], ids=["forward", "backward"]
)
def test_a_step_that_does_not_fit_is_made_in_smaller_micro_batches(
    error: Callable[[], Exception], backward: bool, jobs: Jobs
) -> None:
    wanted = {"training": {"gradient_accumulation_steps": 2}, "lora": LoraSpec(r=4)}
    plain = jobs.run("plain", **wanted)
    with device(error, backward) as small:
        small.rows = 1
        line = jobs.run("job", **wanted)
    assert small.refusals == 2
    # Four rows, then two, then one; the effective batch of eight stays.
    assert [(told.step, told.parameters.batch_size) for told in line.of(ParametersSet)] == [(1, 2), (1, 1)]
    assert line.of(ParametersSet)[-1].parameters.gradient_accumulation_steps == 8
    notes = [note.text for note in line.of(Note)]
    assert len(notes) == 2
    assert "effective batch stays 8" in notes[0]
    assert "differs by" in notes[0]
    same_within(line, plain, 1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_memory_that_runs_out_in_the_middle_costs_no_step(packing: bool, jobs: Jobs) -> None:
    training = {"packing": packing, "batch_size": 2 if packing else 4}
    plain = jobs.run("plain", training=training)
    with device() as small:
        small.once_in = {9, 10}  # in the fifth step, twice in a row
        line = jobs.run("job", training=training)
    assert small.refusals == 2
    assert len(line.of(Metrics)) == len(plain.of(Metrics))
    same_within(line, plain, 1e-5)


def test_memory_in_pieces_is_tried_again_at_the_same_size(jobs: Jobs) -> None:
    plain = jobs.run("plain", lora=LoraSpec(r=4, dropout=0.3))
    with device() as small:
        small.once_in = {6}
        line = jobs.run("job", lora=LoraSpec(r=4, dropout=0.3))
    assert small.refusals == 1
    assert line.of(ParametersSet) == []
    # The same masks are drawn again, so not a bit differs.
    assert curve(line) == curve(plain)
    assert line.last.weights_hash == plain.last.weights_hash


def test_a_healed_run_is_resumed_exactly(jobs: Jobs) -> None:
    def run(name: str, script: dict[int, list[Any]], **changes: Any) -> RecordingLine:
        with device() as small:
            small.rows = 2
            return jobs.run(name, script, lora=LoraSpec(r=4, dropout=0.2), **changes)

    untouched = run("untouched", {})
    paused = run("paused", {4: [Pause()]})
    resumed = run("paused", {}, attempt=2)
    assert resumed.of(Ready)[0].batch_size == 2
    assert resumed.of(ParametersSet) == []
    assert curve(paused, resumed) == curve(untouched)
    assert resumed.last.weights_hash == untouched.last.weights_hash


def test_an_evaluation_that_does_not_fit_is_made_in_smaller_batches(jobs: Jobs) -> None:
    wanted = {"training": {"eval_strategy": "steps", "eval_steps": 2}, "eval_fraction": 0.25}
    plain = jobs.run("plain", **wanted)
    with device() as small:
        small.training_only = False
        small.rows = 3
        line = jobs.run("job", **wanted)
    assert any(
        "Memory ran out in the evaluation at step 0 with 4 rows" in note.text for note in line.of(Note)
    )
    same_within(line, plain, 1e-5)


def test_a_single_row_that_had_fitted_goes_on_in_a_fresh_process_once(jobs: Jobs) -> None:
    training = {"batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 6}
    untouched = jobs.run("untouched", training=training, lora=LoraSpec(r=4, dropout=0.2))
    with device() as small:
        small.once_in = {11, 12}  # in the third step
        left = jobs.run("job", training=training, lora=LoraSpec(r=4, dropout=0.2))
    assert left.last == Left("fresh_process", 2)
    assert [(saved.step, saved.reason) for saved in left.of(Saved)] == [(2, "fresh_process")]
    again = jobs.run("job", attempt=2, training=training, lora=LoraSpec(r=4, dropout=0.2))
    assert curve(left, again) == curve(untouched)
    assert again.last.weights_hash == untouched.last.weights_hash


def test_where_many_rows_had_fitted_a_fresh_process_takes_as_many_again(jobs: Jobs) -> None:
    wanted: dict[str, Any] = {"training": {"max_steps": 6}, "lora": LoraSpec(r=4, dropout=0.2)}
    untouched = jobs.run("untouched", **wanted)
    with device() as small:
        small.once_in = {5, 6, 7, 8}  # in the third step: four rows, four again, two, and one
        left = jobs.run("job", **wanted)
    assert left.last == Left("fresh_process", 2)
    (note,) = [note.text for note in left.of(Note) if "new process" in note.text]
    assert "with a single row, though 4 had fitted at once before" in note
    assert "with 4 rows at once again" in note
    told = [(said.step, said.parameters) for said in left.of(ParametersSet)]
    assert [given.batch_size for _, given in told] == [2, 1, 4]
    again = jobs.run("job", attempt=2, applied=told, parameters=Parameters(batch_size=4), **wanted)
    assert again.of(Ready)[0].batch_size == 4
    # So not even the masks are others.
    assert curve(left, again) == curve(untouched)
    assert again.last.weights_hash == untouched.last.weights_hash


def test_a_fresh_process_takes_no_more_rows_than_the_user_asked_for(jobs: Jobs) -> None:
    asked = SetParameters(Parameters(batch_size=2, gradient_accumulation_steps=2))
    with device() as small:
        small.once_in = {
            15,
            16,
            17,
        }  # in the sixth step, of two micro-batches since the fourth: two, two again, one
        left = jobs.run("job", {3: [asked]}, training={"max_steps": 8})
    assert left.last == Left("fresh_process", 5)
    assert [said.parameters.batch_size for said in left.of(ParametersSet)] == [2, 1, 2]


@contextlib.contextmanager
def torn_optimizer(at: int) -> Iterator[None]:
    """Let memory run out in the optimizer's step of that number, when a weight has moved already."""
    count = 0

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == at:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].add_(1.0)
            raise cuda_error()

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def test_memory_that_runs_out_in_the_optimizer_costs_the_steps_since_the_last_checkpoint(jobs: Jobs) -> None:
    wanted: dict[str, Any] = {"training": {"save_steps": 2}, "lora": LoraSpec(r=4, dropout=0.2)}
    untouched = jobs.run("untouched", **wanted)
    with torn_optimizer(at=6):
        left = jobs.run("job", **wanted)
    assert left.last == Left("fresh_process", 5)
    assert [saved.step for saved in left.of(Saved)] == [2, 4]
    (note,) = [note.text for note in left.of(Note) if "new process" in note.text]
    assert "in the middle of the optimizer's step 6" in note
    assert "goes back to its last checkpoint" in note
    again = jobs.run("job", attempt=2, **wanted)
    assert again.of(Ready)[0].start_step == 4
    assert curve(left, again) == curve(untouched)
    assert again.last.weights_hash == untouched.last.weights_hash
    # Once; if the same step does it again, there is a sentence.
    with torn_optimizer(at=6):
        jobs.run("other", **wanted)
    with torn_optimizer(at=2), pytest.raises(TrainerError) as caught:
        jobs.run("other", attempt=2, **wanted)
    assert "for the optimizer's state at step 6" in caught.value.sentence


def test_an_optimizer_whose_state_does_not_fit_ends_the_job_with_a_sentence(jobs: Jobs) -> None:
    with torn_optimizer(at=1), pytest.raises(TrainerError) as caught:
        jobs.run("job")
    assert caught.value.reason is FailureReason.DEVICE_MEMORY
    assert "for the optimizer's state at step 1" in caught.value.sentence
    assert "adamw_8bit" in caught.value.sentence


def test_with_dropout_the_note_tells_the_difference_that_there_is(jobs: Jobs) -> None:
    wanted: dict[str, Any] = {"training": {"max_steps": 5}, "lora": LoraSpec(r=4, dropout=0.3)}
    untouched = jobs.run("untouched", **wanted)
    with device() as small:
        small.once_in = {9, 10}  # in the fifth step, twice in a row
        healed = jobs.run("job", **wanted)
    (note,) = [note.text for note in healed.of(Note) if "Memory ran out" in note.text]
    difference = abs(healed.points[5]["train_loss"] - untouched.points[5]["train_loss"])
    assert difference > 1e-4
    said = re.search(r"With dropout, .* differs by (\S+) between the two cuts, without it by (\S+);", note)
    assert said is not None, note
    assert float(said[1]) == pytest.approx(difference, rel=0.06)
    assert float(said[2]) < 1e-5


def test_a_single_row_that_does_not_fit_ends_the_job_with_a_sentence(jobs: Jobs) -> None:
    with device() as small, pytest.raises(TrainerError) as caught:
        small.rows = 0
        jobs.run("job")
    assert caught.value.reason is FailureReason.DEVICE_MEMORY
    assert "a single row of at most 64 tokens" in caught.value.sentence
    with device(cpu_error) as small, pytest.raises(TrainerError) as caught:
        small.rows = 0
        jobs.run("other")
    assert caught.value.reason is FailureReason.HOST_MEMORY


def test_another_error_is_not_healed(jobs: Jobs) -> None:
    def broken() -> Exception:
        return RuntimeError("CUDA error: device-side assert triggered")

    with device(broken) as small, pytest.raises(RuntimeError, match="device-side assert"):
        small.rows = 0
        jobs.run("job")


KINDS: dict[str, tuple[float, dict[str, Any]]] = {
    "full": (1e-5, {}),
    "LoRA": (1e-5, {"lora": LoraSpec(r=4)}),
    "dropout": (0.3, {"lora": LoraSpec(r=4, dropout=0.2)}),
    "nf4": (0.02, {"lora": LoraSpec(r=4), "quantization": Quantization(bits=4)}),
    "preference": (1e-4, {"method": Method.DPO, "lora": LoraSpec(r=4)}),
    "stream": (1e-5, {"lora": LoraSpec(r=4), "streaming": True}),
    "workers": (1e-5, {"lora": LoraSpec(r=4), "training": {"dataloader_num_workers": 2}}),
}
"""By how much a loss may differ where a step is cut otherwise, and the job; masks and 4 bits make the most of it."""


def run_out_at_random(jobs: Jobs, pairs: Path, kind: str, seeds: range) -> None:
    """Let memory run out at random places: in the first step, or twice in a row in a later one; and once more."""
    tolerance, changes = KINDS[kind]
    training = {"gradient_accumulation_steps": 2, "max_steps": 6, **changes.get("training", {})}
    wanted: dict[str, Any] = {**changes, "training": training}
    if kind == "preference":
        wanted["rows"] = pairs
    plain = jobs.run("plain", **wanted)
    for seed in seeds:
        rng = random.Random(f"{kind} {seed}")
        again = rng.randrange(14, 18)  # in another step
        with device(rng.choice([cuda_error, cpu_error]), rng.random() < 0.5) as small:
            at = rng.choice([rng.randrange(1, 5), rng.randrange(5, 16)])
            small.once_in = {at, at + again} if at < 5 else {at, at + 1, at + again}
            line = jobs.run(f"job-{seed}", **wanted)
        assert small.refusals >= 2, seed
        assert line.of(ParametersSet), seed
        same_within(line, plain, tolerance)


# Starting workers takes the time of all the others; that they change no step is tried elsewhere (test_batches.py).
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind == "workers" else []) for kind in KINDS]
)
def test_memory_that_runs_out_at_random_places(kind: str, jobs: Jobs, pair_file: Path) -> None:
    run_out_at_random(jobs, pair_file, kind, range(1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_runs_out_at_many_random_places(kind: str, jobs: Jobs, pair_file: Path) -> None:
    run_out_at_random(jobs, pair_file, kind, range(1, 20))


def test_a_heal_that_does_not_divide_the_step_is_replayed_as_it_was(jobs: Jobs) -> None:
    wanted: dict[str, Any] = {"training": {"batch_size": 3, "save_steps": 3}, "lora": LoraSpec(r=4)}
    with device() as small:
        small.once_in = {9, 10}  # in the fifth step: three rows, then two and one
        untouched = jobs.run("untouched", **wanted)
    (healed,) = untouched.of(ParametersSet)
    with device() as small:
        small.once_in = {9, 10}
        jobs.run("lost", {5: [Cancel()]}, **wanted)
    again = jobs.run("lost", attempt=2, applied=[(healed.step, healed.parameters)], **wanted)
    assert again.of(Ready)[0].start_step == 3
    assert again.last.values["tokens_seen"] == untouched.last.values["tokens_seen"]
    assert again.last.weights_hash == untouched.last.weights_hash
    assert not [note for note in again.of(Note) if "An optimizer step now takes" in note.text]


def test_a_step_without_a_number_is_not_kept_when_memory_ends_the_process(jobs: Jobs) -> None:
    training = {
        "batch_size": 1,
        "max_steps": 12,
        "logging_steps": 50,
        "save_steps": 50,
        "learning_rate": 1e30,
        "max_grad_norm": 0,
    }
    with device() as small, pytest.raises(TrainerError) as caught:
        small.once_in = {11, 12}  # in the sixth step; the second had no number
        jobs.run("job", training=training)
    assert caught.value.reason is FailureReason.NON_FINITE_LOSS
    assert jobs.line.of(Saved) == []


def test_a_held_out_row_that_had_fitted_goes_on_in_a_fresh_process(jobs: Jobs) -> None:
    wanted: dict[str, Any] = {
        "training": {"eval_strategy": "steps", "eval_steps": 2, "batch_size": 1, "max_steps": 6},
        "eval_fraction": 0.1,
    }
    untouched = jobs.run("untouched", **wanted)
    with device() as small:
        small.training_only = False
        rows = untouched.of(Ready)[0].eval_rows
        before = 2 * rows + 4 * 2 + 2 * rows  # evaluations at 0 and 2, and four steps, of two layers each
        small.once_in = {before + 1, before + 2}
        left = jobs.run("job", **wanted)
    assert left.last == Left("fresh_process", 4)
    again = jobs.run("job", attempt=2, **wanted)
    assert curve(left, again) == curve(untouched)
    assert again.last.weights_hash == untouched.last.weights_hash
