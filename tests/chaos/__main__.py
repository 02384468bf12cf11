"""`python -m tests.chaos [--kills N] [--stock] [--seed S] [--minutes M] [--json FILE]`: harms runs and prints what became of them.

Each run is harmed once. It has resumed by itself if it came to its end with nobody's help, and is the same if its
final weights are those of a run that was never touched. With --stock the same is done to a script as TRL's
documentation shows it, on the same job, at moments chosen by the same numbers.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process with threads cannot be forked
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.mounts import own_mounts

if TYPE_CHECKING:
    from tests.chaos.harm import Kind

DISK_MB = 48
APART = "--in-a-namespace"


def main(argv: list[str]) -> int:
    """Harm as many runs as are asked for; return 1 if one of ours did not end as an untouched one."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--stock", action="store_true", help="do the same to a stock script")
    parser.add_argument("--seed", default="1", metavar="S")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(
        "--minutes", type=float, default=1e6, metavar="M", help="harm no more runs after so long"
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="kinds whose name holds these words")
    parser.add_argument(APART, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.in_a_namespace and (prefix := own_mounts()):
        os.execvp(prefix[0], [*prefix, sys.executable, "-m", "tests.chaos", *argv, APART])  # noqa: S606  nothing is left to do here
    # In memory where there is room: what is killed is processes, not the power, and a disk's own waiting takes minutes.
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 1 << 30
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=memory if roomy else None))
    disk = _small_disk(folder) if args.in_a_namespace else None
    try:
        told = _all(folder, disk, args)
    finally:
        if disk is not None:
            subprocess.run(["umount", str(disk)], check=True)
    failed = [row for row in told if row["side"] == "ours" and not row["same"]]
    print(table(told, args.stock))
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


def _all(folder: Path, disk: Path | None, args: argparse.Namespace) -> list[dict[str, object]]:
    from tests.chaos.harm import KINDS
    from tests.chaos.jobs import JOBS, Ground, Ours, Stock
    from tests.chaos.runs import Arena

    kinds = [kind for kind in KINDS if args.only in kind.name and (disk is not None or kind.act != "fill")]
    arena = Arena(folder, Ground.build(folder), disk)
    sides = {"ours": Ours(), "stopped": Ours(background=False)} | ({"stock": Stock()} if args.stock else {})
    paces = {(name, job): arena.measure(side, job) for name, side in sides.items() for job in JOBS}
    for job in JOBS:
        assert paces["ours", job].weights == paces["stopped", job].weights
    for (name, job), pace in paces.items():
        print(
            f"untouched {name} {job}: first step after {pace.load:.2f} s, a step {1000 * pace.step:.0f} ms, "
            f"a save {1000 * pace.save:.0f} ms, the end {pace.end:.2f} s",
            file=sys.stderr,
        )
    told: list[dict[str, object]] = []
    end = time.monotonic() + 60 * args.minutes
    for number, kind in enumerate(_picked(kinds, args.kills, args.seed)):
        if time.monotonic() > end:
            print(f"time is up after {number} of {args.kills}", file=sys.stderr)
            break
        job = JOBS[number % len(JOBS)]
        for name in ("ours", "stock") if args.stock else ("ours",):
            began = time.monotonic()
            chosen = "stopped" if name == "ours" and not kind.background else name
            outcome = arena.run(sides[chosen], job, kind, paces[chosen, job], f"{args.seed}-{number}")
            told.append(
                {
                    "side": name,
                    "kind": kind.name,
                    "job": job,
                    "resumed": outcome.resumed,
                    "same": outcome.same,
                    "harmed": outcome.harmed,
                    "attempts": outcome.attempts,
                    "why": outcome.why,
                }
            )
            if args.json is not None:
                args.json.write_text(json.dumps(told, indent=1) + "\n")
            words = "same" if outcome.same else "OTHER" if outcome.resumed else "LOST"
            passed = time.monotonic() - began
            print(
                f"{number + 1} {name} {job}, {kind.name}: {words} {outcome.why[:600]} ({passed:.1f} s)",
                file=sys.stderr,
            )
    return told


def _picked(kinds: "list[Kind]", count: int, seed: str) -> "list[Kind]":
    """Return the kinds by their shares, mixed, each at least once where there is room."""
    rest = [kind for kind in kinds for _ in range(kind.share - 1)]
    rng = random.Random(seed)
    chosen = kinds[:count]
    while len(chosen) < count:
        chosen += rng.sample(rest, len(rest)) + kinds
    return rng.sample(chosen[:count], count)


def table(told: list[dict[str, object]], stock: bool) -> str:
    """Return the outcome in Markdown."""
    sides = ("ours", "stock") if stock else ("ours",)
    head = ["what happened to the run", "runs"]
    head += [f"{side}: {what}" for side in sides for what in ("resumed by itself", "same final weights")]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    runs = Counter(row["kind"] for row in told if row["side"] == "ours")
    from tests.chaos.harm import KINDS

    for kind in [*(kind.name for kind in KINDS if kind.name in runs), "all"]:
        cells = [str(kind), str(runs[kind] if kind in runs else sum(runs.values()))]
        for side in sides:
            mine = [row for row in told if row["side"] == side and kind in (row["kind"], "all")]
            cells += [str(sum(bool(row[what]) for row in mine)) for what in ("resumed", "same")]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _small_disk(folder: Path) -> Path:
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk)],
        check=True,
        capture_output=True,
    )
    return disk


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
