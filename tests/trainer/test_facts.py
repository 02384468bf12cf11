"""What the installed stack does by itself, on which our trainer rests: an upgrade that changes one of these fails.

Nothing of ours runs here, and none of this is a wish: each test states how Transformers, TRL, PEFT and accelerate
behave, good or bad. Where one fails after an upgrade, look at what of ours leans on it before changing the test.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.distributed import DistributedConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, pack_dataset

from tests.trainer.stock import (
    PAUSE,
    STEPS,
    Stock,
    in_ranks,
    pairs,
    resumed_elsewhere,
    rows,
    weights_of,
)

pytestmark = [
    # PEFT 0.21 asks a model by a name that transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.backends.mkldnn"),
]


@pytest.fixture
def stock(tmp_path: Path, tiny_model: Path, tiny_tokenizer: Any) -> Stock:
    return Stock(tmp_path, tiny_model, tiny_tokenizer)


# 1. Stock resume is exact on a CPU


@pytest.mark.parametrize(
    "changes",
    [
        {
            "gradient_accumulation_steps": 2,
            "eval_data": rows(8, 5),
            "eval_strategy": "steps",
            "eval_steps": 3,
        },
        {"lora": False, "packing": True, "packing_strategy": "bfd_split"},
        {"lora": False, "bf16": True, "activation_checkpointing": True, "neftune_noise_alpha": 5.0},
        {"streaming": True},
        {"config": DPOConfig, "kind": DPOTrainer, "data": pairs(), "max_length": 64},
        {"packing": True, "packing_strategy": "wrapped"},
        {"padding_free": True, "max_length": None},
        {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 2},
    ],
    ids=[
        "lora, dropout, accumulation, evaluation",
        "full, packed",
        "full, bf16, recomputed, noise",
        "lora, streaming, shuffled",
        "lora, preference",
        "lora, wrapped",
        "lora, padding-free",
        "lora, grouped by length, two workers",
    ],
)
def test_fact_1_stock_resume_is_exact_on_a_cpu(stock: Stock, changes: dict[str, Any]) -> None:
    whole, first, again = stock.paused_and_resumed("job", **changes)
    assert max(first.losses) == PAUSE and min(again.losses) == PAUSE + 1
    assert first.losses | again.losses == whole.losses
    assert again.weights == whole.weights


def test_fact_1_stock_resume_is_exact_in_another_process(stock: Stock) -> None:
    whole = stock.run("whole")
    first = stock.run("job", pause_at=PAUSE)
    losses, weights = resumed_elsewhere(stock, "job")
    assert first.losses | losses == whole.losses
    assert weights == whole.weights


# 2. ... but not for QLoRA


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


class Kept(SFTTrainer):  # type: ignore[misc]
    """Loads the adapter in the precision in which it was saved."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert isinstance(self.model, PeftModel)
        self.model.load_adapter(
            resume_from_checkpoint,
            self.model.active_adapters[0],
            is_trainable=True,
            autocast_adapter_dtype=False,
        )


def test_fact_2_stock_resume_of_4_bit_lora_changes_its_precision_and_its_way(stock: Stock) -> None:
    whole, first, again = stock.paused_and_resumed("job", bits=nf4(), bf16=True)
    assert whole.dtypes == first.dtypes == {torch.bfloat16}
    assert again.dtypes == {torch.float32}
    assert again.weights != whole.weights
    assert first.losses | again.losses != whole.losses

    kept = stock.run(
        "job", resume=str(stock.folder / "job" / f"checkpoint-{PAUSE}"), bits=nf4(), bf16=True, kind=Kept
    )
    assert kept.dtypes == {torch.bfloat16}
    assert first.losses | kept.losses == whole.losses
    assert kept.weights == whole.weights


# 4. auto_find_batch_size starts over with trained weights


class OnceOutOfMemory(SFTTrainer):  # type: ignore[misc]
    """Has one step that does not fit."""

    seen: list[tuple[int, int, str]]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.seen = getattr(self, "seen", [])
        self.seen.append((self.state.global_step, len(inputs["input_ids"]), weights_of(self.model)))
        if len(self.seen) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().training_step(model, inputs, num_items_in_batch)


def test_fact_4_auto_find_batch_size_starts_over_with_the_trained_weights(stock: Stock) -> None:
    ended = stock.run("job", auto_find_batch_size=True, kind=OnceOutOfMemory)
    seen = ended.trainer.seen
    (fifth, size, weights), (restarted, smaller, after) = seen[4], seen[5]
    assert (fifth, size) == (4, 4)
    assert (restarted, smaller) == (0, 3)
    assert after == weights != seen[0][2]
    assert ended.trainer.args.gradient_accumulation_steps == 1  # so the batch has become smaller
    assert len(seen) == 5 + STEPS


# 5. Micro-batch and accumulation can be exchanged


CUT = {"lora": False, "max_steps": 6, "learning_rate": 1e-3}
NEAR = 1e-6
"""Of losses of 5.7 in float32: two of their last digits are 9.5e-7."""


def cut(size: int) -> dict[str, Any]:
    return {**CUT, "per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}


def test_fact_5_the_same_batch_cut_otherwise_gives_the_same_losses(stock: Stock) -> None:
    curves = {size: stock.run(f"job-{size}", **cut(size)).losses for size in (8, 4, 2, 1)}
    for size in (4, 2, 1):
        assert curves[size] == pytest.approx(curves[8], abs=NEAR), size
    stock.run("job", pause_at=PAUSE, **cut(4))
    again = stock.run("job", resume=True, **cut(2))
    assert min(again.losses) == PAUSE + 1
    untouched = {step: loss for step, loss in curves[4].items() if step > PAUSE}
    assert again.losses == pytest.approx(untouched, abs=NEAR)


# 9. Packing


@pytest.mark.parametrize(
    "attention",
    # The last one is compiled first.
    ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow)],
)
def test_fact_9_packed_documents_are_apart_only_without_a_cache(stock: Stock, attention: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        stock.model, dtype=torch.float32, attn_implementation=attention
    ).eval()
    one, two = (torch.tensor(row).unsqueeze(0) for row in rows(2, seed=3)["input_ids"])
    packed = torch.cat([one, two], dim=1)
    places = torch.cat([torch.arange(one.shape[1]), torch.arange(two.shape[1])]).unsqueeze(0)
    with torch.no_grad():
        alone = model(input_ids=two, use_cache=False).logits[0]
        apart = model(input_ids=packed, position_ids=places, use_cache=False).logits[0, one.shape[1] :]
        mixed = model(input_ids=packed, position_ids=places).logits[0, one.shape[1] :]
    assert model.config.use_cache
    assert (apart - alone).abs().max() < 1e-5
    assert (mixed - alone).abs().max() > 1e-2


def test_fact_9_the_default_packing_drops_what_overflows() -> None:
    long = Dataset.from_dict({"input_ids": [list(range(300))] * 3})
    kept = {
        strategy: sum(map(len, pack_dataset(long, 128, strategy=strategy)["input_ids"]))
        for strategy in ("bfd", "bfd_split")
    }
    assert SFTConfig.packing_strategy == "bfd"
    assert kept == {"bfd": 384, "bfd_split": 900}


# 10. fsdp=True on a CPU is DDP


def test_fact_10_fsdp_on_a_cpu_is_ddp(stock: Stock) -> None:
    def body() -> list[str]:
        trainer = stock.trainer("job", lora=False, max_steps=1, fsdp=True, ddp_backend="gloo")
        trainer.train()
        kinds = {type(p).__name__ for p in trainer.model_wrapped.parameters()}
        return [str(trainer.accelerator.distributed_type), type(trainer.model_wrapped).__name__, *kinds]

    assert (
        in_ranks(stock.folder, body)
        == [["DistributedType.MULTI_CPU", "DistributedDataParallel", "Parameter"]] * 2
    )


def sharded(stock: Stock, lora: bool) -> list[Any]:
    """Return the kinds of parameters, and what an untouched run and a resumed one came to, or the resume's error."""
    changes = {"lora": lora, "distributed": DistributedConfig(fsdp_size=2), "ddp_backend": "gloo"}
    whole = stock.run("whole", **changes)
    kinds = sorted(
        {type(p).__name__ for name, p in whole.trainer.model.named_parameters() if "lora_" not in name}
    )
    first = stock.run("job", pause_at=PAUSE, **changes)
    try:
        again = stock.run("job", resume=True, **changes)
    except RuntimeError as error:
        return [kinds, type(error).__name__, str(error)]
    return [
        kinds,
        [*whole.losses.values(), whole.weights],
        [*(first.losses | again.losses).values(), again.weights],
    ]


def test_fact_10_a_distributed_config_shards_and_resumes_lora_exactly(stock: Stock) -> None:
    for kinds, whole, resumed in in_ranks(stock.folder, lambda: sharded(stock, lora=True)):
        assert kinds == ["DTensor"]
        assert resumed == whole


def test_fact_10_a_distributed_config_cannot_resume_full_training(stock: Stock) -> None:
    for kinds, error, words in in_ranks(stock.folder, lambda: sharded(stock, lora=False)):
        assert kinds == ["DTensor"]
        assert error == "RuntimeError" and "DTensor" in words
