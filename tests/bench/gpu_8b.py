"""`python -m tests.bench.gpu_8b [--tiny] [--steps N] [--json FILE]`: an 8B-shaped Llama, LoRA r16, on one GPU.

Random weights serve for speed. Every row is packed to 4096 tokens, none of them padding; gradients are clipped; rows
come through the real data loader. Our trainer (also with `deterministic`, whose cost shows) and TRL in each
configuration that is installed here run in processes of their own, one after another, on the same model and rows. Without a CUDA device it says so and ends with code 3;
--tiny measures a toy of the same shape anywhere, which shows that the script works and nothing else.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.programs import clean_env

MARK = 12_473
"""Tokens/s of NeMo Automodel, one H100, Llama 3 8B, LoRA, sequence 4096, without clipping, on mock data (its
docs/performance-summary.mdx)."""
NO_DEVICE = 3
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
TINY = {
    **SHAPE,
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VOCABULARY, LENGTH, BATCH, ACCUMULATION, RANK, RATE, SEED = 128_256, 4096, 2, 4, 16, 1e-4, 42
WARM_UP = 3
"""Steps that are not counted."""


def main(argv: list[str] | None = None) -> int:
    """Measure every configuration and print the table; return 1 if ours is not at least the fastest."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu_8b", description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        told = _side(args.side, args.home, args.steps, args.tiny)
        print(json.dumps(told))
        return 0
    import torch

    if not (args.tiny or torch.cuda.is_available()):
        print(
            "There is no CUDA device here, so the speed of an 8B model cannot be measured; --tiny tries the script."
        )
        return NO_DEVICE
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-8b-") as folder:
        home = Path(folder)
        _build(home, args.steps, args.tiny)
        for side in _sides(args.tiny):
            results[side] = _measured(side, home, args.steps, args.tiny)
            print(f"{side}: {results[side]}", file=sys.stderr, flush=True)
            if args.json is not None:
                args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(_table(results))
    speeds = {side: float(result.get("tokens_per_second", 0)) for side, result in results.items()}
    ours = max(speed for side, speed in speeds.items() if side.startswith("ours"))
    theirs = max(speed for side, speed in speeds.items() if not side.startswith("ours"))
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    print(
        f"{on}: ours {ours:,.0f} tokens/s, the fastest TRL {theirs:,.0f}; {MARK:,} are published for one H100."
    )
    return 0 if ours and theirs and (ours >= theirs or args.tiny) else 1


def _sides(tiny: bool) -> list[str]:
    """Return the configurations: side, attention, checkpointing, and what else is on."""
    attentions = ["sdpa"]
    if not tiny:
        attentions += [
            f"flash_attention_{version}"
            for version, module in ((2, "flash_attn"), (3, "flash_attn_interface"))
            if importlib.util.find_spec(module)
        ]
    extras = [""] + [f"+{name}" for name in ("liger_kernel", "kernels") if importlib.util.find_spec(name)]
    found = [f"ours {how}" for how in ("plain", "checkpointing", "plain+deterministic")]
    for attention in attentions:
        for checkpointing in ("plain", "checkpointing"):
            found += [f"trl {attention} {checkpointing}{extra}" for extra in extras]
    return found


def _measured(side: str, home: Path, steps: int, tiny: bool) -> dict[str, Any]:
    """Run one configuration in a process of its own; what cannot run is a result too."""
    command = [sys.executable, "-m", "tests.bench.gpu_8b", "--side", side, "--home", str(home)]
    done = subprocess.run(
        [*command, "--steps", str(steps), *(["--tiny"] if tiny else [])],
        env=clean_env(
            PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
            **{name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in os.environ},
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _build(home: Path, steps: int, tiny: bool) -> None:
    """Write the model, its tokenizer and more than enough rows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.trainer.conftest import build_tokenizer, text_rows, write_jsonl

    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(home / "model")
    config = LlamaConfig(
        **(TINY if tiny else SHAPE),
        vocab_size=1024 if tiny else VOCABULARY,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        dtype="bfloat16",
    )
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(home / "model")
    del model
    words = [row["text"] for row in text_rows(64)]
    each = len(tokenizer(" ".join(words))["input_ids"])
    count = 2 + (steps + 1) * BATCH * ACCUMULATION * _length(tiny) // each
    write_jsonl(
        home / "rows.jsonl", [{"text": " ".join(r["text"] for r in text_rows(64, n))} for n in range(count)]
    )


def _length(tiny: bool) -> int:
    return 128 if tiny else LENGTH


def _side(side: str, home: Path, steps: int, tiny: bool) -> dict[str, Any]:
    import torch

    who, *words = side.split(" ")
    points = _ours(home, steps, tiny, words[0]) if who == "ours" else _trl(home, steps, tiny, *words)
    began, ended = points[WARM_UP], points[steps]
    return {
        "tokens_per_second": round((ended[1] - began[1]) / (ended[0] - began[0])),
        "first_loss": points[1][2],
        "last_loss": ended[2],
        "least_grad_norm": min(norm for _, _, _, norm in points.values()),
        "peak_gb": torch.cuda.max_memory_allocated() / (1 << 30) if torch.cuda.is_available() else 0.0,
    }


Points = dict[int, tuple[float, float, float, float]]
"""Of each step: the moment, tokens so far, loss, and the gradient's norm before it was clipped."""


def _ours(home: Path, steps: int, tiny: bool, how: str) -> Points:
    from agent.trainer import run
    from protocol.jobspec import JobSpec, LoraSpec, ModelSpec, TrainingSpec
    from protocol.worker import Limits, Start, Workspace
    from tests.trainer.conftest import RecordingLine

    training = TrainingSpec(
        max_steps=steps,
        batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=RATE,
        seed=SEED,
        max_length=_length(tiny),
        packing=True,
        bf16=True,
        gradient_checkpointing=how == "checkpointing",
        deterministic=how.endswith("+deterministic"),
        logging_steps=1,
        save_steps=100_000,
    )
    spec = JobSpec(
        job_id="bench",
        model=ModelSpec(name="model", dtype="bfloat16"),
        lora=LoraSpec(r=RANK, alpha=2 * RANK),
        training=training,
    )
    place = Path(tempfile.mkdtemp(dir=home))
    workspace = Workspace(
        checkpoints=str(place / "checkpoints"),
        output=str(place / "out"),
        cache=str(place / "cache"),
        model=str(home / "model"),
        data=str(home / "rows.jsonl"),
    )
    line = RecordingLine({})
    run.train(Start(spec=spec, attempt=1, workspace=workspace, limits=Limits(hub=False)), line)
    from protocol.worker import Metrics

    return {
        event.step: (
            event.time,
            event.values["tokens_seen"],
            event.values["train_loss"],
            event.values["grad_norm"],
        )
        for event in line.of(Metrics)
        if event.step
    }


def _trl(home: Path, steps: int, tiny: bool, attention: str, how: str) -> Points:
    import time

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    points: Points = {}

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                points[state.global_step] = (
                    time.time(),
                    float(logs["num_tokens"]),
                    logs["loss"],
                    logs["grad_norm"],
                )

    checkpointing, _, extra = how.partition("+")
    args = SFTConfig(
        output_dir=str(home / "trl"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=RATE,
        seed=SEED,
        max_length=_length(tiny),
        packing=True,
        packing_strategy="bfd_split",
        bf16=True,
        activation_checkpointing=checkpointing == "checkpointing",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        **(
            {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}}
            if extra == "liger_kernel"
            else {}
        ),
    )
    model = AutoModelForCausalLM.from_pretrained(
        home / "model",
        dtype=torch.bfloat16,
        attn_implementation=attention,
        **({"use_kernels": True} if extra == "kernels" else {}),
    )
    rows = [json.loads(text) for text in (home / "rows.jsonl").read_text().splitlines()]
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        callbacks=[Clock()],
        processing_class=AutoTokenizer.from_pretrained(home / "model"),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    return points


def _table(results: dict[str, dict[str, Any]]) -> str:
    rows = [
        "| configuration | tokens/s | first loss | last loss | least gradient norm | peak GB |",
        "|---|---|---|---|---|---|",
    ]
    for side, told in results.items():
        if "failed" in told:
            rows.append(f"| {side} | could not run: {told['failed']} | | | | |")
        else:
            rows.append(
                f"| {side} | {told['tokens_per_second']:,} | {told['first_loss']:.4f} | {told['last_loss']:.4f} | "
                f"{told['least_grad_norm']:.3g} | {told['peak_gb']:.1f} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
