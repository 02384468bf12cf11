"""`python -m tests.link [--minutes M | --rounds N] [--harms K] [--seed S] [--json FILE]`: harms the link and counts.

Each round runs jobs while faults happen between and to hub, agent and trainer; then everything has to be there, once.
The agent's home is a small disk where a mount namespace can be had; without one no disk fills up.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.link.rounds import Rounds, report
from tests.link.stand import Stand
from tests.support.mounts import own_mounts

DISK_MB = 96
APART = "--in-a-namespace"


def main(argv: list[str]) -> int:
    """Do the rounds; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.link", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=0.0, metavar="M", help="begin no round after so long"
    )
    parser.add_argument("--rounds", type=int, default=0, metavar="N")
    parser.add_argument("--harms", type=int, default=6, metavar="K", help="faults of a round")
    parser.add_argument("--seed", default="1", metavar="S")
    parser.add_argument("--short", action="store_true", help="faults that take seconds rather than minutes")
    parser.add_argument("--only", default="", metavar="WORD", help="kinds whose name holds this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument(APART, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.in_a_namespace and (prefix := own_mounts()):
        os.execvp(prefix[0], [*prefix, sys.executable, "-m", "tests.link", *argv, APART])  # noqa: S606  nothing is left to do here
    folder = Path(tempfile.mkdtemp(prefix="link-"))
    if args.in_a_namespace:
        home = folder / "home"
        home.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(home)]
        subprocess.run(mount, check=True, capture_output=True)
    began = time.monotonic()
    stand = Stand(folder, disk=args.in_a_namespace)
    rounds = Rounds(stand, args.seed, long=not args.short, only=args.only)
    print(f"seed {args.seed}, in {folder}", file=sys.stderr)
    try:
        while rounds.done < args.rounds or time.monotonic() - began < 60 * args.minutes:
            try:
                names = rounds.round(args.harms)
            except AssertionError as error:
                rounds.tally.wrong.append(f"round {rounds.done}: {error}")
                break
            print(f"round {rounds.done}: {', '.join(names)}; {dict(rounds.tally.counts)}", file=sys.stderr)
            if rounds.tally.wrong:
                break
    finally:
        stand.stop()
        if args.in_a_namespace:
            # What is worth a look has to outlive the disk.
            shutil.copytree(folder / "home", folder / "kept", ignore=shutil.ignore_patterns("ballast"))
            subprocess.run(["umount", str(folder / "home")], check=True)
    print(report(rounds, time.monotonic() - began))
    if args.json is not None:
        told = {"faults": rounds.harm.done, "counts": rounds.tally.counts, "wrong": rounds.tally.wrong}
        args.json.write_text(json.dumps({"rounds": rounds.done, **told}, indent=1) + "\n")
    if rounds.tally.wrong:
        print(f"seed {args.seed}; look at {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
