"""Runs a simulation over many seeds and prints what happened; the command line of the simulations."""

import argparse
import time
from collections import Counter
from collections.abc import Callable


def many(one: Callable[[int], Counter[str]], argv: list[str], *, prog: str) -> int:
    """Run ``one`` for each seed; it raises AssertionError where something is wrong. Return 1 if one did."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}")
    parser.add_argument("--schedules", type=int, default=2000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="the first; the others follow it")
    parser.add_argument(
        "--most", type=int, default=10, metavar="N", help="stop after so many that went wrong"
    )
    args = parser.parse_args(argv)
    began, spent = time.monotonic(), time.process_time()
    counted: Counter[str] = Counter()
    wrong: list[int] = []
    done = 0
    for seed in range(args.seed, args.seed + args.schedules):
        try:
            counted += one(seed)
        except AssertionError as error:
            wrong.append(seed)
            print(f"seed {seed}: {str(error)[:500]}", flush=True)
        done += 1
        if done % 10_000 == 0:
            print(
                f"seeds {args.seed} to {seed}: {len(wrong)} wrong, {time.monotonic() - began:.0f} s",
                flush=True,
            )
        if len(wrong) >= args.most:
            break
    print(f"{done} schedules, seeds {args.seed} to {args.seed + done - 1}; {len(wrong)} wrong: {wrong}")
    print(", ".join(f"{name} {count}" for name, count in sorted(counted.items())))
    print(f"{time.monotonic() - began:.0f} s, of one core {time.process_time() - spent:.0f} s")
    return 1 if wrong else 0
