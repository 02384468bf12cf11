"""The benchmark suite runs. What it measures is nobody's business here."""

import json
from functools import partial
from pathlib import Path

import pytest

from tests.bench import compression, link, saving
from tests.bench.__main__ import main
from tests.bench.figures import at_least, at_most, percentile
from tests.bench.suite import BENCHMARKS


def test_a_benchmark_from_the_command_line_to_its_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BENCHMARKS, "ingest", partial(link.ingest, points=200, rounds=1))
    main(["ingest", "--json", str(tmp_path / "figures.json")])  # so few points reach no target
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"ingest", "ingest_ratio"}
    assert {"value", "unit", "target", "ok"} <= set(figures["ingest"])
    assert figures["ingest"]["points"] == 200 and figures["ingest"]["value"] > 0
    assert capsys.readouterr().out.splitlines()[2].startswith("| ingest ")


def test_one_that_breaks_does_not_take_the_others_along(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(folder: Path) -> dict[str, object]:
        raise RuntimeError("no such thing")

    monkeypatch.setitem(BENCHMARKS, "start", broken)
    monkeypatch.setitem(BENCHMARKS, "idle", lambda folder: {"idle_cpu": at_most(0.1, "%", 0.5)})
    assert main(["start", "idle"]) == 1
    said = capsys.readouterr()
    assert "idle_cpu" in said.out and "could not be measured: start" in said.err


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}


def test_saves_are_measured_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "MODEL", SMALL)
    figure = saving.save(tmp_path, runs=1, saves=2)["save"].public()
    assert figure["saves"] == 2
    assert 0 < figure["stall_ms"] <= figure["worst_ms"] and figure["synchronous_ms"] > 0


def test_compression_is_measured_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "MODEL", SMALL)
    monkeypatch.setattr(compression, "LEVELS", (1,))
    figures = compression.compress(tmp_path, steps=2, megabytes=1)
    assert len(figures) == 5 and figures["compress_checkpoint_fp32"].target == 0.86
    noise = figures["compress_weights_bf16_normal_level1"].public()
    assert 0.6 < noise["value"] < 0.75 < noise["ungrouped"] < 0.85


def test_figures_and_their_targets() -> None:
    assert at_most(0.5, "s", 0.5).ok and not at_most(0.51, "s", 0.5).ok
    assert at_least(0.98, "", 0.98).ok and not at_least(0.97, "", 0.98).ok
    assert percentile(range(1, 101), 0.5) == 50
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([7], 0.99) == 7
