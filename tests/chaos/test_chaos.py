"""Whatever is done to a run, it goes on by itself and ends as one that was never touched."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounts import own_mounts
from tests.support.programs import ROOT, clean_env


def chaos(folder: Path, *words: str, limit: float) -> list[dict[str, object]]:
    """Run the suite and return the outcomes."""
    told = folder / "told.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--json", str(told), *words],
        cwd=ROOT,
        env=clean_env(),
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert told.exists(), done.stderr[-4000:]
    outcomes: list[dict[str, object]] = json.loads(told.read_text())
    lost = [outcome for outcome in outcomes if not (outcome["resumed"] and outcome["same"])]
    assert not lost, json.dumps(lost, indent=1)
    assert done.returncode == 0
    return outcomes


def test_twenty_runs_are_harmed_and_none_is_lost(tmp_path: Path) -> None:
    outcomes = chaos(tmp_path, "--kills", "20", "--seed", "7", limit=900)
    assert len(outcomes) == 20
    missed = [outcome for outcome in outcomes if not outcome["harmed"]]
    assert not missed, "their moments never came"
    kinds = {outcome["kind"] for outcome in outcomes}
    # The full disk needs a mount table of its own.
    assert len(kinds) == (10 if own_mounts() else 9)
    shown = re.findall(r"^\| ([^|]+) \| \d+ \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {*shown} >= kinds, "the README's table lacks a way to harm a run"


@pytest.mark.slow
def test_two_hundred_runs_are_harmed_and_none_is_lost(tmp_path: Path) -> None:
    assert len(chaos(tmp_path, "--kills", "200", "--seed", "11", limit=7200)) == 200
