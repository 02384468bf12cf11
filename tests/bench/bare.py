"""`python -m tests.bench.bare HOME STEPS LOGGING_STEPS WARM_UP`: TRL alone, as a script from its documentation.

Prints the tokens per second between the point of step WARM_UP and the last one; with one step alone, the moment
when it was done.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests.bench.job import BATCH, LENGTH, RATE, ROWS, SEED


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes when each point of the curve was logged, and the tokens up to it."""

    def __init__(self) -> None:
        self.points: dict[int, tuple[float, float]] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "num_tokens" in logs and "loss" in logs:
            self.points[state.global_step] = (time.time(), float(logs["num_tokens"]))


def main(home: Path, steps: int, logging_steps: int, warm_up: int) -> None:
    clock = Clock()
    args = SFTConfig(
        output_dir=str(home / "bare"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        max_length=LENGTH,
        logging_steps=logging_steps,
        optim="adamw_torch",
        seed=SEED,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [json.loads(text) for text in (home / "datasets" / ROWS).read_text().splitlines()]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(home / "models" / "model", dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(home / "models" / "model"),
        callbacks=[clock],
    )
    trainer.train()
    if steps == 1:
        print(clock.points[1][0])
        return
    (began, before), (ended, after) = clock.points[warm_up], clock.points[steps]
    print((after - before) / (ended - began))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(word) for word in sys.argv[2:5]))
