"""Tokens per second of a job under the agent's trainer, against a bare TRL script with the same arguments.

``python -m tests.bench.throughput`` prints the result as JSON. Both run in fresh processes, in turn, on the same
model, rows and threads; warm-up steps are left out on both sides, logging at every step is not.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from agent.runtime import boot
from agent.runtime.bytequeue import make_queue
from protocol.jobspec import DataSpec, JobSpec, ModelSpec, TrainingSpec
from protocol.worker import Committed, Failed, Limits, Metrics, Start, Workspace, encoder, event_decoder

RUNS, STEPS, WARM_UP = 5, 50, 10
BATCH, LENGTH, RATE, SEED = 4, 256, 1e-3, 42
TARGET = 0.98
MODEL = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
}


def measure(runs: int = RUNS) -> dict[str, Any]:
    """Return the ratio of the medians, both medians in tokens/s, and their spreads."""
    ours: list[float] = []
    bare: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _program("build", folder)
        for run in range(runs):
            # In turn, and each first every other time, so that a busy machine hits both alike.
            for side in (0, 1) if run % 2 else (1, 0):
                if side:
                    ours.append(_under_the_agent(folder, run))
                else:
                    bare.append(float(_program("bare", folder)))
    ratio = statistics.median(ours) / statistics.median(bare)
    return {
        "value": round(ratio, 4),
        "unit": "of bare TRL",
        "target": TARGET,
        "ok": ratio >= TARGET,
        "tokens_per_second": round(statistics.median(ours), 1),
        "bare_tokens_per_second": round(statistics.median(bare), 1),
        "spread": round((max(ours) - min(ours)) / statistics.median(ours), 4),
        "bare_spread": round((max(bare) - min(bare)) / statistics.median(bare), 4),
        "runs": runs,
        "threads": _threads(),
    }


def _threads() -> str:
    return os.environ.get("OMP_NUM_THREADS", "1")


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return kept | {"OMP_NUM_THREADS": _threads(), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def _program(what: str, folder: Path) -> str:
    """Run a part of this module in a fresh interpreter and return its last line."""
    command = [sys.executable, "-m", "tests.bench.throughput", what, str(folder)]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} failed:\n{done.stderr[-4000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def _under_the_agent(folder: Path, run: int) -> float:
    """Train in a trainer process, its events committed here, and return its tokens per second."""
    ctx = multiprocessing.get_context("spawn")
    orders, events = make_queue(ctx), make_queue(ctx)
    plan = boot.Plan(module="agent.trainer.entry", log=str(folder / f"{run}.log"), env=_environment())
    child = ctx.Process(target=boot.main, args=(plan, orders.reading_end(), events.writing_end()))
    child.start()
    orders.close_reader()
    events.close_writer()
    orders.put(encoder.encode(_start(folder, f"run-{run}")))
    points: list[Metrics] = []
    while True:
        try:
            numbered = event_decoder.decode(events.get())
        except EOFError:
            break
        if numbered.number:
            orders.put(encoder.encode(Committed(numbered.number)))
        if isinstance(numbered.event, Failed):
            raise RuntimeError(numbered.event.failure.sentence)
        if isinstance(numbered.event, Metrics):
            points.append(numbered.event)
    child.join()
    orders.close()
    events.close()
    first, last = points[WARM_UP - 1], points[-1]
    return (last.values["tokens_seen"] - first.values["tokens_seen"]) / (last.time - first.time)


def _start(folder: Path, name: str) -> Start:
    training = TrainingSpec(
        max_steps=STEPS, batch_size=BATCH, max_length=LENGTH, learning_rate=RATE, logging_steps=1, seed=SEED
    )
    return Start(
        spec=JobSpec(
            job_id=name, model=ModelSpec(name="model"), data=DataSpec(path="rows.jsonl"), training=training
        ),
        attempt=1,
        workspace=Workspace(
            checkpoints=str(folder / name / "checkpoints"),
            output=str(folder / name / "output"),
            cache=str(folder / name / "cache"),
            model=str(folder / "model"),
            data=str(folder / "rows.jsonl"),
        ),
        limits=Limits(hub=False),
    )


def _build(folder: Path) -> None:
    from tests.trainer.conftest import build_model, build_tokenizer, text_rows, write_jsonl

    tokenizer = build_tokenizer()
    build_model(folder / "model", len(tokenizer), **MODEL)
    tokenizer.save_pretrained(folder / "model")
    rows = [" ".join(row["text"] for row in text_rows(12, seed)) for seed in range(BATCH * STEPS)]
    write_jsonl(folder / "rows.jsonl", [{"text": text} for text in rows])


def _bare(folder: Path) -> float:
    """Train with TRL alone, as a script from its documentation would, and return its tokens per second."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []
            self.tokens: list[float] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "num_tokens" in logs and "loss" in logs:
                self.times.append(time.time())
                self.tokens.append(float(logs["num_tokens"]))

    clock = Clock()
    args = SFTConfig(
        output_dir=str(folder / "bare"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        max_length=LENGTH,
        logging_steps=1,
        optim="adamw_torch",
        seed=SEED,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [json.loads(text) for text in (folder / "rows.jsonl").read_text().splitlines()]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[clock],
    )
    trainer.train()
    first = WARM_UP - 1
    return (clock.tokens[-1] - clock.tokens[first]) / (clock.times[-1] - clock.times[first])


def main() -> None:
    if sys.argv[1:2] == ["build"]:
        _build(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["bare"]:
        print(_bare(Path(sys.argv[2])))
    else:
        print(json.dumps(measure(), indent=2))


if __name__ == "__main__":
    main()
