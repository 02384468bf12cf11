"""Whatever is done to hub, agent, trainer and network: the hub's copy is what was said, each thing once and in order."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounts import own_mounts
from tests.support.programs import ROOT, clean_env


def link(folder: Path, *words: str, limit: float) -> dict[str, dict[str, int]]:
    """Run the suite and return what it counted."""
    told = folder / "told.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.link", "--json", str(told), *words],
        cwd=ROOT,
        env=clean_env(),
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    counted: dict[str, dict[str, int]] = json.loads(told.read_text())
    counts = counted["counts"]
    assert counts["records"] > 500, "next to nothing happened"
    assert (counts["lost"], counts["doubled"], counts["out of order"], counts["buried"]) == (0, 0, 0, 0)
    return counted


def test_every_harm_once_and_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    counted = link(tmp_path, "--rounds", "1", "--harms", "13", "--short", "--seed", "4", limit=240)
    # The full disk needs a mount table of its own.
    assert len(counted["faults"]) == (13 if own_mounts() else 12)


@pytest.mark.slow
def test_half_an_hour_of_harm(tmp_path: Path) -> None:
    link(tmp_path, "--minutes", "30", "--seed", "11", limit=3600)
