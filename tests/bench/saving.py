"""How long a periodic checkpoint stops training: written in the background, against written at once.

Both by the real trainer, on the same model, run by run in turn. All that it stands still for counts: what is
gathered, the wait of the optimizer for the copy, and the wait for an earlier write. What both take of the rest of
the machine shows in the time of a whole run.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench.figures import Figure, at_most, spread

RUNS, SAVES, EVERY = 3, 6, 8
TARGET = 0.1
MB = 1_000_000
MODEL = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
"""14 million parameters: 57 MB of weights, and twice that of Adam's state."""


def save(folder: Path, runs: int = RUNS, saves: int = SAVES) -> dict[str, Figure]:
    """Return the share of a synchronous save's stall that one in the background has, in the median."""
    # Not at the top: it imports torch, which most benchmarks have no use for.
    from tests.trainer.conftest import build_model, build_tokenizer, text_rows, write_jsonl

    tokenizer = build_tokenizer()
    model = build_model(folder / "model", len(tokenizer), **MODEL)
    tokenizer.save_pretrained(model)
    rows = write_jsonl(folder / "rows.jsonl", text_rows(64))
    stalls: dict[bool, list[float]] = {True: [], False: []}
    written: list[float] = []
    whole: dict[bool, list[float]] = {True: [], False: []}
    sizes: list[int] = []
    for run in range(runs):
        # In turn, and each first every other time, so that a busy machine hits both alike.
        for background in (True, False) if run % 2 else (False, True):
            began = time.monotonic()
            said = _run(folder, model, rows, f"{run}-{background}", background, saves)
            whole[background].append(time.monotonic() - began)
            stalls[background] += [saved.stall for saved in said]
            sizes += [saved.size for saved in said]
            if background:
                written += [saved.seconds for saved in said]
        quick, slow = stalls[True][-saves:], stalls[False][-saves:]
        print(
            f"  in the background {statistics.median(quick) * 1000:.0f} ms, at once "
            f"{statistics.median(slow) * 1000:.0f} ms",
            file=sys.stderr,
            flush=True,
        )
    quick, slow = stalls[True], stalls[False]
    return {
        "save": at_most(
            statistics.median(quick) / statistics.median(slow),
            "of a synchronous save's stall",
            TARGET,
            stall_ms=1000 * statistics.median(quick),
            worst_ms=1000 * max(quick),
            synchronous_ms=1000 * statistics.median(slow),
            spread=spread(quick),
            synchronous_spread=spread(slow),
            written_in_s=statistics.median(written),
            run_s=statistics.median(whole[True]),
            synchronous_run_s=statistics.median(whole[False]),
            state_mb=round(statistics.median(sizes) / MB),
            saves=len(quick),
        )
    }


def _run(folder: Path, model: Path, rows: Path, name: str, background: bool, saves: int) -> list[Any]:
    """Train, and return what was said of the saves that training went on after."""
    from protocol.worker import Saved
    from tests.trainer.conftest import Jobs

    jobs = Jobs(folder / "jobs", model, rows)
    training = {
        "batch_size": 2,
        "max_steps": saves * EVERY + 1,
        "save_steps": EVERY,
        "save_total_limit": 2,
        "learning_rate": 1e-4,
    }
    line = jobs.run(name, training=training, background_saves=background)
    return [saved for saved in line.of(Saved) if saved.reason == "schedule"]
