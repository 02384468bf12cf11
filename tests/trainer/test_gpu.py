"""What only a CUDA device shows: memory that really ends, and runs that are equal there."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.jobspec import LoraSpec
from protocol.worker import Left, Note, ParametersSet, Pause
from tests.trainer.conftest import Jobs, build_model, curve, text_rows

pytestmark = pytest.mark.gpu

LONG = {"max_steps": 6, "batch_size": 16, "max_length": 256, "packing": True}


@pytest.fixture
def wide(jobs: Jobs, tiny_tokenizer: Any, tmp_path: Path, jsonl: Callable[..., Path]) -> Jobs:
    """A model whose micro-batch takes hundreds of MB."""
    model = build_model(
        tmp_path / "wide", len(tiny_tokenizer), hidden_size=512, intermediate_size=2048, num_hidden_layers=4
    )
    tiny_tokenizer.save_pretrained(model)
    return Jobs(tmp_path, model, jsonl(text_rows(4000)))


@contextmanager
def others_hold_all_but(size: int) -> Iterator[None]:
    """Another program's memory, as it looks from here: only ``size`` bytes more can be had."""
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - size, dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del held
        torch.cuda.empty_cache()


def peak_of(run: Callable[[], Any]) -> tuple[Any, int]:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return run(), torch.cuda.max_memory_reserved() - before


def test_a_step_that_does_not_fit_the_device_is_healed(wide: Jobs) -> None:
    wanted: dict[str, Any] = {"lora": LoraSpec(r=4), "training": LONG}
    plain, peak = peak_of(lambda: wide.run("plain", **wanted))
    with others_hold_all_but(int(peak * 0.7)):
        healed = wide.run("healed", **wanted)
    assert healed.of(ParametersSet), [note.text for note in healed.of(Note)]
    assert healed.of(ParametersSet)[-1].parameters.batch_size < 16
    assert healed.points.keys() == plain.points.keys()
    for step, values in plain.points.items():
        assert healed.points[step]["train_loss"] == pytest.approx(values["train_loss"], abs=1e-5)


@pytest.mark.parametrize("lora", [None, LoraSpec(r=4, dropout=0.2)], ids=["full", "lora"])
def test_a_deterministic_job_is_resumed_bit_for_bit(lora: LoraSpec | None, jobs: Jobs) -> None:
    wanted: dict[str, Any] = {"lora": lora, "training": {"deterministic": True, "bf16": True}}
    plain = jobs.run("plain", **wanted)
    again = jobs.run("again", **wanted)
    assert curve(again) == curve(plain) and again.last.weights_hash == plain.last.weights_hash
    paused = jobs.run("job", {3: [Pause()]}, **wanted)
    assert paused.last == Left("paused", 4)
    resumed = jobs.run("job", attempt=2, **wanted)
    assert curve(paused, resumed) == curve(plain)
    assert resumed.last.weights_hash == plain.last.weights_hash


def test_a_pause_gives_the_device_back(wide: Jobs) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    wide.run("job", {2: [Pause()]}, training=LONG)
    assert torch.cuda.memory_reserved() - before < 64 << 20
