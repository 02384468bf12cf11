"""The job that benchmarks train: a small Llama on generated text, the same for the agent and for a bare script."""

import os
from pathlib import Path
from typing import Any

BATCH, LENGTH, RATE, SEED = 4, 128, 1e-3, 42
MODEL = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
}
ROWS = "rows.jsonl"


def threads() -> str:
    """Return how many threads every process of a benchmark may compute with."""
    return os.environ.get("OMP_NUM_THREADS", "1")


def build(home: Path, steps: int) -> None:
    """Write the model and the rows of so many steps where an agent with this home looks for them."""
    # Not at the top: it imports torch, which most benchmarks have no use for.
    from tests.trainer.conftest import build_model, build_tokenizer, text_rows, write_jsonl

    tokenizer = build_tokenizer()
    build_model(home / "models" / "model", len(tokenizer), **MODEL)
    tokenizer.save_pretrained(home / "models" / "model")
    rows = [" ".join(row["text"] for row in text_rows(12, seed)) for seed in range(BATCH * steps)]
    write_jsonl(home / "datasets" / ROWS, [{"text": text} for text in rows])


def config(steps: int, logging_steps: int, *, lora: bool = False) -> dict[str, Any]:
    """Return the job as it is submitted."""
    return {
        "model": {"name": "model"},
        "training": {
            "method": "sft",
            "max_steps": steps,
            "batch_size": BATCH,
            "max_length": LENGTH,
            "learning_rate": RATE,
            "logging_steps": logging_steps,
            "seed": SEED,
            "bf16": False,
            "save_steps": 100_000,
        },
        **({"lora": {"r": 8, "alpha": 16}} if lora else {}),
    }
