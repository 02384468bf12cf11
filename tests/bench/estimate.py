"""How far estimates are from the truth: each job is looked at by `check` in one process, and trained in another.

Two estimates are held to the same bounds: that of `check`, which measures a step, and that of every job's start, by
formula. On a CPU the truth is the most memory that was ever resident in the trainer; with CUDA it is the most that
torch held of the device. Errors are relative to the whole figure, which on a CPU holds Python and its libraries;
what they are of the part above those is told beside. Disk and time are told without a bound.
"""

import json
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from protocol.jobspec import (
    DataSpec,
    JobSpec,
    LoraSpec,
    Method,
    ModelSpec,
    Quantization,
    TrainingSpec,
)
from protocol.worker import Check, Limits, Start, Workspace
from tests.bench.figures import Figure, at_least, at_most, shown
from tests.bench.job import threads
from tests.support.programs import clean_env

GB = 1 << 30
AT_ONCE = 2
STEPS = 3
MODELS = {
    "5M": (4096, 256, 704, 5, 4, 4, True),
    "30M": (8192, 512, 1408, 8, 8, 4, True),
    "100M": (32000, 768, 2048, 12, 12, 4, True),
    "200M": (32000, 1024, 2816, 13, 16, 8, False),
}
"""Vocabulary, width, inner width, layers, heads, heads of keys, tied embeddings."""
NF4 = Quantization(bits=4, compute_dtype="float32")
DOUBLE = Quantization(bits=4, double_quant=True, compute_dtype="float32")
INT8 = Quantization(bits=8)
LORA = LoraSpec()


def _job(model: str, batch: int, length: int, *, quantization: Any = None, **more: Any) -> dict[str, Any]:
    training = {"batch_size": batch, "max_length": length, **more.pop("training", {})}
    return {"base": model, "quantization": quantization, "training": training, **more}


JOBS: dict[str, dict[str, Any]] = {
    "5M full": _job("5M", 4, 128),
    "5M full, 1024 long, evaluated": _job(
        "5M", 1, 1024, eval_fraction=0.1, training={"eval_strategy": "epoch"}
    ),
    "5M LoRA, packed": _job("5M", 4, 256, lora=LORA, training={"packing": True}),
    "5M full DPO": _job("5M", 2, 128, method=Method.DPO),
    "30M full, 2 accumulated": _job("30M", 2, 128, training={"gradient_accumulation_steps": 2}),
    "30M full, checkpointing": _job("30M", 4, 256, training={"gradient_checkpointing": True}),
    "30M full, saved beside": _job("30M", 1, 128, training={"save_steps": 1}),
    "30M LoRA, batch 8": _job("30M", 8, 128, lora=LORA),
    "30M DoRA": _job("30M", 2, 256, lora=LoraSpec(r=8, use_dora=True)),
    "30M nf4, double": _job("30M", 2, 256, quantization=DOUBLE, lora=LORA),
    "30M int8": _job("30M", 2, 128, quantization=INT8, lora=LORA),
    "30M LoRA DPO": _job("30M", 1, 256, method=Method.DPO, lora=LORA),
    "100M full, sgd": _job("100M", 1, 128, training={"optim": "sgd"}),
    "100M LoRA, 512 long": _job("100M", 1, 512, lora=LORA),
    "200M full": _job("200M", 1, 128),
    "200M nf4": _job("200M", 1, 256, quantization=NF4, lora=LORA),
    # Chosen by somebody who looked for what the formula gets wrong.
    "100M full, batch 4": _job("100M", 4, 128),
    "30M LoRA, 1024 long": _job("30M", 2, 1024, lora=LORA),
    "30M DoRA int8, checkpointing": _job(
        "30M",
        4,
        256,
        quantization=INT8,
        lora=LoraSpec(r=8, use_dora=True),
        training={"gradient_checkpointing": True},
    ),
    "100M nf4 DPO": _job("100M", 2, 256, quantization=NF4, lora=LORA, method=Method.DPO),
    "30M full bf16, packed": _job("30M", 2, 512, training={"packing": True, "bf16": True}),
}
"""What is measured. All with AdamW, but for one."""


def estimate(folder: Path, names: list[str] | None = None) -> dict[str, Figure]:
    """Return the errors of the estimate over all jobs, and print each."""
    chosen = names or list(JOBS)
    build(folder, {JOBS[name]["base"] for name in chosen})
    with ThreadPoolExecutor(AT_ONCE) as pool:
        # All estimates before any truth.
        told = dict(
            zip(chosen, pool.map(lambda name: child("check", check_of(folder, name)), chosen), strict=True)
        )
        true = dict(
            zip(chosen, pool.map(lambda name: child("run", start_of(folder, name)), chosen), strict=True)
        )
    probed: dict[str, Error] = {}
    formula: dict[str, Error] = {}
    disk: list[float] = []
    seconds: list[float] = []
    for name in chosen:
        probed[name] = error(told[name]["estimate"], true[name])
        formula[name] = error(true[name]["early"], true[name])
        disk.append(told[name]["estimate"]["disk_gb"] * GB / true[name]["disk"] - 1)
        seconds.append(told[name]["estimate"]["step_seconds"] / true[name]["step_seconds"] - 1)
        print(
            f"  {name:32} {true[name][_key(true[name])] / GB:6.2f} GB:"
            f" checked {probed[name].whole:+6.1%} (above the imports {probed[name].above:+6.1%}),"
            f" by formula {formula[name].whole:+6.1%} ({formula[name].above:+6.1%});"
            f" disk {disk[-1]:+6.1%}, time of a step {seconds[-1]:+6.1%}",
            file=sys.stderr,
            flush=True,
        )
    return {
        **gates("estimate", probed),
        **gates("estimate_at_start", formula),
        "estimate_disk": _median(disk),
        "estimate_step_time": _median(seconds),
    }


class Error(NamedTuple):
    """How much an estimate was too high, as a share; below 0: too low."""

    whole: float
    """Of the whole process."""
    above: float
    """Of what it holds above its bare imports."""


def gates(name: str, errors: dict[str, Error]) -> dict[str, Figure]:
    """Return the errors of one kind of estimate, each with its bound."""
    sizes = [abs(one.whole) for one in errors.values()]
    above = [abs(one.above) for one in errors.values()]
    return {
        f"{name}_median": at_most(
            100 * statistics.median(sizes),
            "% off",
            10,
            jobs=len(sizes),
            above_imports=100 * statistics.median(above),
        ),
        f"{name}_worst": at_most(
            100 * max(sizes),
            "% off",
            25,
            job=max(errors, key=lambda one: abs(errors[one].whole)),
            above_imports=100 * max(above),
        ),
        f"{name}_too_low": at_least(
            100 * min(one.whole for one in errors.values()),
            "% (below 0: too low)",
            -10,
            job=min(errors, key=lambda one: errors[one].whole),
            above_imports=100 * min(one.above for one in errors.values()),
        ),
    }


def _median(errors: list[float]) -> Figure:
    return shown(
        100 * statistics.median(map(abs, errors)),
        "% off",
        highest=100 * max(errors),
        lowest=100 * min(errors),
    )


def error(estimate: dict[str, Any], true: dict[str, Any]) -> Error:
    """Return how far an estimate of memory is from the truth."""
    guess, truth = estimate["device_gb" if "device" in true else "host_gb"] * GB, true[_key(true)]
    imports = 0.0 if "device" in true else true["imported"]
    return Error(guess / truth - 1, (guess - imports) / (truth - imports) - 1)


def _key(true: dict[str, Any]) -> str:
    return "device" if "device" in true else "host"


def child(what: str, order: Check | Start) -> dict[str, Any]:
    """Run one job in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.estimate_child", what],
        input=json.dumps(msgspec.to_builtins(order)),
        env=clean_env(OMP_NUM_THREADS=threads()),
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"  {what} {order.spec.job_id}", file=sys.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(f"{what} of {order.spec.job_id} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_of(folder: Path, name: str) -> Check:
    start = start_of(folder, name)
    return Check(start.spec, start.workspace, start.limits)


def start_of(folder: Path, name: str) -> Start:
    """Return the job of that name."""
    job = dict(JOBS[name])
    base, method = job["base"], job.get("method", Method.SFT)
    spec = JobSpec(
        job_id=f"job-{list(JOBS).index(name)}",
        method=method,
        model=ModelSpec(name=base, quantization=job["quantization"]),
        data=DataSpec(path="rows", eval_fraction=job.get("eval_fraction", 0.0)),
        lora=job.get("lora"),
        training=TrainingSpec(max_steps=STEPS, learning_rate=1e-4, **job["training"]),
    )
    place = folder / spec.job_id
    rows = folder / ("pairs.jsonl" if method is Method.DPO else "rows.jsonl")
    workspace = Workspace(
        checkpoints=str(place / "checkpoints"),
        output=str(place / "model"),
        cache=str(place / "cache"),
        model=str(folder / "models" / base),
        data=str(rows),
    )
    return Start(spec=spec, attempt=1, workspace=workspace, limits=Limits(hub=False))


def build(folder: Path, models: set[str]) -> None:
    """Write models and rows; every row is longer than any job's max_length."""
    # Not at the top: it imports torch, which most benchmarks have no use for.
    from tests.trainer.conftest import build_model, build_tokenizer, sentence, write_jsonl

    tokenizer = build_tokenizer()
    for name in models:
        vocabulary, width, inner, layers, heads, kv_heads, tied = MODELS[name]
        place = build_model(
            folder / "models" / name,
            vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=tied,
        )
        tokenizer.save_pretrained(place)
    rng = random.Random(0)
    write_jsonl(folder / "rows.jsonl", [{"text": sentence(rng, 1100)} for _ in range(64)])
    pairs = [
        {name: sentence(rng, words) for name, words in (("prompt", 20), ("chosen", 400), ("rejected", 400))}
        for _ in range(32)
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
