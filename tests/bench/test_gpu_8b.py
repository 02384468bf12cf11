"""The benchmark for a GPU can be started anywhere, and says so where there is none."""

import json
from pathlib import Path

import pytest
import torch

from tests.bench import gpu_8b


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so_and_ends_with_its_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_8b.main([]) == gpu_8b.NO_DEVICE
    assert "There is no CUDA device here" in capsys.readouterr().out


@pytest.mark.slow
def test_a_toy_of_the_same_shape_runs_on_both_sides(tmp_path: Path) -> None:
    assert gpu_8b.main(["--tiny", "--steps", "5", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) >= 4
    for side, told in figures.items():
        assert "failed" not in told, (side, told)
        assert told["tokens_per_second"] > 0 and told["least_grad_norm"] > 0
    first = [told["first_loss"] for told in figures.values()]
    assert max(first) - min(first) < 0.05
