"""`python -m tests.matrix [--deterministic] [WORDS]`: pauses a job of every kind, resumes it, and prints what differs.

Each cell is three runs of a tiny model, on the GPU where there is one: one that is never touched, one that is paused, and its second
attempt; with dropout (where the method has any), accumulation, evaluations and early stopping, over the end of an
epoch. "equal" means every value of every point, and every bit of the final weights; else the largest difference
is given. Empty cells cannot be: weights of 4 or 8 bits are not trained themselves. With WORDS only the rows that hold them.
With --deterministic the jobs ask for it, which a GPU needs to be equal and a CPU does not.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

import argparse
import contextlib
import io
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from protocol.jobspec import LoraSpec, Method, Quantization
from protocol.worker import Left, Pause
from tests.trainer.conftest import (
    Jobs,
    RecordingLine,
    build_model,
    build_tokenizer,
    chat_rows,
    pair_rows,
    text_rows,
    write_jsonl,
)

PAUSED_AFTER = 6
STEPS = 11
TIMES = ("seconds", "per_second", "utilization_percent", "_gb")
"""Ends of the names whose values two runs never share."""

HELD: dict[str, Quantization | None] = {
    "float32": None,
    "nf4": Quantization(bits=4),
    "nf4, double": Quantization(bits=4, double_quant=True),
    "fp4": Quantization(bits=4, quant_type="fp4"),
    "int8": Quantization(bits=8),
}
ADAPTERS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
}
KINDS = [
    *((Method.SFT, adapter) for adapter in ADAPTERS),
    *((method, adapter) for method in (Method.CPT, Method.DPO) for adapter in ("full", "LoRA")),
]
OTHERS: dict[str, tuple[Method, dict[str, Any]]] = {
    "packed": (Method.SFT, {"training": {"packing": True, "batch_size": 1}}),
    "grouped by length": (Method.SFT, {"training": {"group_by_length": True}}),
    "activation checkpointing": (Method.SFT, {"training": {"gradient_checkpointing": True}}),
    "bfloat16": (Method.SFT, {"training": {"bf16": True}}),
    "streamed": (Method.SFT, {"streaming": True}),
    "streamed and packed": (Method.CPT, {"streaming": True, "training": {"packing": True, "batch_size": 1}}),
    "streamed pairs": (Method.DPO, {"streaming": True}),
    "pairs grouped by length": (Method.DPO, {"training": {"group_by_length": True}}),
}


@dataclass(frozen=True)
class Cell:
    """One kind of job."""

    row: str
    column: str
    method: Method
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.row}, {self.column}"


def cells() -> Iterator[Cell]:
    """Yield every kind that there is."""
    for method, adapter in KINDS:
        for column, held in HELD.items():
            options = ADAPTERS[adapter]
            if options is None and held is not None:
                continue  # weights of 4 or 8 bits cannot be trained themselves
            lora = None if options is None else LoraSpec(r=4, dropout=0.2, **options)
            changes = {"lora": lora, "quantization": held}
            yield Cell(f"{method} {adapter}", column, method, changes)
    for row, (method, changes) in OTHERS.items():
        yield Cell(
            f"{method} LoRA, {row}", "float32", method, {"lora": LoraSpec(r=4, dropout=0.2), **changes}
        )


class Bench:
    """A tiny model and a data set for each method."""

    def __init__(self, folder: Path, *, deterministic: bool = False) -> None:
        self._deterministic = deterministic
        tokenizer = build_tokenizer()
        model = folder / "base"
        build_model(model, len(tokenizer))
        tokenizer.save_pretrained(model)
        rows = {Method.SFT: chat_rows(48), Method.CPT: text_rows(48), Method.DPO: pair_rows(48)}
        self._data = {method: write_jsonl(folder / f"{method}.jsonl", some) for method, some in rows.items()}
        self._jobs = Jobs(folder, model, folder)

    def difference(self, cell: Cell) -> float:
        """Run a cell and return the largest difference that the pause has made; 0.0 if there is none."""
        jobs, changes = self._jobs, dict(cell.changes)
        training = {
            "max_steps": STEPS,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "early_stopping_patience": 3,
            "load_best_at_end": True,
            "deterministic": self._deterministic,
            **changes.pop("training", {}),
        }
        wanted = {
            "method": cell.method,
            "rows": self._data[cell.method],
            "eval_fraction": 0.25,
            "training": training,
            **changes,
        }
        name = cell.name.replace(" ", "-")
        untouched = jobs.run(f"{name}-untouched", **wanted)
        paused = jobs.run(name, {PAUSED_AFTER - 1: [Pause()]}, **wanted)
        if paused.last != Left("paused", PAUSED_AFTER):
            raise AssertionError(f"{cell.name}: it was to be paused, and said {paused.last}")
        resumed = jobs.run(name, attempt=2, **wanted)
        found = _of_points(untouched, paused, resumed)
        if resumed.last.weights_hash == untouched.last.weights_hash:
            return found
        return max(found, _of_weights(jobs.output(f"{name}-untouched"), jobs.output(name)))


def _of_points(untouched: RecordingLine, paused: RecordingLine, resumed: RecordingLine) -> float:
    """Return the largest difference of any value of the curve that is no time; infinity where one is missing."""

    def values(points: dict[int, dict[str, float]]) -> dict[tuple[int, str], float]:
        return {
            (step, name): value
            for step, point in points.items()
            for name, value in point.items()
            if not name.endswith(TIMES)
        }

    ours, theirs = values(paused.points | resumed.points), values(untouched.points)
    if ours.keys() != theirs.keys():
        return float("inf")
    return max(abs(value - theirs[key]) for key, value in ours.items())


def _of_weights(one: Path, other: Path) -> float:
    largest = 0.0
    for path in one.glob("*.safetensors"):
        ours, theirs = load_file(path), load_file(other / path.name)
        largest = max(largest, *(float((ours[name] - theirs[name]).abs().max()) for name in ours))
    return largest or float("inf")  # other bits of the same value, or a tensor too many


def table(found: dict[tuple[str, str], str]) -> str:
    """Return the matrix in Markdown."""
    rows = list(dict.fromkeys(row for row, _ in found))
    lines = [
        f"| paused and resumed | {' | '.join(HELD)} |",
        f"|---|{'---|' * len(HELD)}",
        *(f"| {row} | {' | '.join(found.get((row, column), '') for column in HELD)} |" for row in rows),
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the matrix; return 1 if any cell differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("words", nargs="*", metavar="WORDS")
    args = parser.parse_args(argv)
    words = " ".join(args.words)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    began = time.monotonic()
    found: dict[tuple[str, str], str] = {}
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        bench = Bench(Path(folder), deterministic=args.deterministic)
        for cell in cells():
            if words not in cell.row:
                continue
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    difference = bench.difference(cell)
            except Exception:  # noqa: BLE001  the other cells are worth as much
                traceback.print_exc()
                found[cell.row, cell.column] = "fails"
            else:
                found[cell.row, cell.column] = f"{difference:.1g}" if difference else "equal"
            print(f"{cell.name}: {found[cell.row, cell.column]}", file=sys.stderr)
    print(table(found))
    print(f"{len(found)} cells in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if set(found.values()) - {"equal"} else 0


if __name__ == "__main__":
    sys.exit(main())
