"""What compressing a checkpoint saves, and what it costs: by what is compressed, grouping and level.

The states are real ones, of a small model after some steps of training; the normal weights are noise, as random
as weights can be. All is read back and compared. Time is that of the processor, which others do not lengthen.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.figures import Figure, at_most, shown

STEPS, LEVELS, RUNS = 60, (1, 3, 9), 3
LARGEST = {
    "weights_bf16_normal": 0.70,
    "weights_bf16_trained": 0.75,
    "weights_fp32_trained": 0.89,
    "adam_fp32_trained": 0.87,
}
"""Share of the size that may be left at the level that checkpoints are written with: what README promises."""
WHOLE, LARGEST_WHOLE = ("weights_fp32_trained", "adam_fp32_trained"), 0.86
MB = 1_000_000
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def compress(folder: Path, steps: int = STEPS, megabytes: int = 64) -> dict[str, Figure]:
    """Return ratio and speed for each kind of tensors."""
    found: dict[str, Figure] = {}
    for kind, tensors in _kinds(folder, steps, megabytes).items():
        for level in LEVELS:
            found[f"compress_{kind}_level{level}"] = _measure(tensors, level, LARGEST[kind])
    # What the setting promises is of a whole checkpoint; in float32 it saves least.
    parts = [found[f"compress_{kind}_level{LEVELS[0]}"] for kind in WHOLE]
    size = sum(part.detail["size_mb"] for part in parts)
    left = sum(part.value * part.detail["size_mb"] for part in parts) / size
    found["compress_checkpoint_fp32"] = at_most(left, "of the size", LARGEST_WHOLE, size_mb=size)
    return found


def _kinds(folder: Path, steps: int, megabytes: int) -> dict[str, dict[str, Any]]:
    # Not at the top: it imports torch, which most benchmarks have no use for.
    import torch

    from agent.trainer import contents, tensorfile
    from tests.trainer.conftest import Jobs, build_model, build_tokenizer, text_rows, write_jsonl

    tokenizer = build_tokenizer()
    model = build_model(folder / "model", len(tokenizer), **MODEL)
    tokenizer.save_pretrained(model)
    jobs = Jobs(folder, model, write_jsonl(folder / "rows.jsonl", text_rows(512)))
    jobs.run("job", training={"batch_size": 8, "max_steps": steps, "learning_rate": 1e-3})
    last = jobs.checkpoints() / f"step-{steps}"
    trained = tensorfile.read(last, contents.MODEL)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(megabytes * MB // 2, generator=generator).mul_(0.02).bfloat16()
    return {
        "weights_bf16_normal": {"weights": normal},
        "weights_bf16_trained": {name: one.bfloat16() for name, one in trained.items()},
        "weights_fp32_trained": trained,
        "adam_fp32_trained": tensorfile.read(last, contents.OPTIMIZER),
    }


def _measure(tensors: dict[str, Any], level: int, largest: float) -> Figure:
    import torch
    import zstandard

    from agent.trainer import planes
    from agent.trainer.tensorfile import Sink, raw

    size = sum(one.numel() * one.element_size() for one in tensors.values())
    writes: list[float] = []
    reads: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for run in range(RUNS):
            path = Path(name) / f"{run}.zst"
            began = time.thread_time()
            with Sink(path) as sink:
                planes.write(sink, tensors, level)
                written = sink.finish().size
            writes.append(time.thread_time() - began)
            began = time.thread_time()
            back = planes.read(path)
            reads.append(time.thread_time() - began)
    if not all(torch.equal(back[key], one) for key, one in tensors.items()):
        raise RuntimeError("what was read is not what was written")
    compressor = zstandard.ZstdCompressor(level=level)
    ungrouped = sum(len(compressor.compress(raw(one))) for one in tensors.values())
    detail = {
        "ungrouped": ungrouped / size,
        "write_mb_per_s": round(size / MB / statistics.median(writes)),
        "read_mb_per_s": round(size / MB / statistics.median(reads)),
        "size_mb": size / MB,
    }
    if level == planes.LEVEL:
        return at_most(written / size, "of the size", largest, **detail)
    return shown(written / size, "of the size", **detail)
