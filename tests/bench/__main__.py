"""`python -m tests.bench [NAME...] [--json FILE]`: measures, prints a table, and writes JSON for scripts."""

import argparse
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from tests.bench.suite import BENCHMARKS

COLUMNS = ("name", "value", "unit", "target", "ok", "detail")


def main(argv: list[str] | None = None) -> int:
    """Measure what is asked for, everything by default; return 1 if a target was missed or something failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}; all by default"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    results: dict[str, dict[str, Any]] = {}
    failed: list[str] = []
    for name in args.names or BENCHMARKS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as folder:
            try:
                found = BENCHMARKS[name](Path(folder))
            except Exception:  # noqa: BLE001  # an edge: the others are measured all the same
                traceback.print_exc()
                failed.append(name)
                continue
        results |= {key: figure.public() for key, figure in found.items()}
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        if args.json is not None:
            # After each, so that what was measured is not lost with what comes after it.
            args.json.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    if failed:
        print(f"could not be measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or any(result["ok"] is False for result in results.values()) else 0


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a table that is also Markdown."""
    rows = [COLUMNS, tuple("-" * len(name) for name in COLUMNS)]
    for name, result in results.items():
        target = "" if result["target"] is None else f"{result['target']:g}"
        ok = {True: "yes", False: "NO", None: ""}[result["ok"]]
        more = {key: value for key, value in result.items() if key not in COLUMNS}
        detail = ", ".join(f"{key} {value}" for key, value in more.items())
        rows.append((name, f"{result['value']:g}", result["unit"], target, ok, detail))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
