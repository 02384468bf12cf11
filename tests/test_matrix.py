"""Every kind of job is paused and resumed as if never touched: a few here, all of them in the long form."""

import pytest

from protocol.worker import Metrics
from tests import matrix
from tests.matrix import Bench, Cell, cells
from tests.trainer.conftest import RecordingLine

FEW = (
    "sft DoRA, int8",
    "sft rsLoRA, fp4",
    "cpt LoRA, nf4, double",
    "dpo full, float32",
    "dpo LoRA, nf4",
)
ALL = {cell.name: cell for cell in cells()}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=name, marks=() if name in FEW else pytest.mark.slow)
        for name, cell in ALL.items()
    ],
)
def test_a_pause_changes_nothing(cell: Cell, bench: Bench) -> None:
    assert bench.difference(cell) == 0.0


def test_the_few_are_cells() -> None:
    assert set(FEW) <= ALL.keys()
    assert len(ALL) >= 30


def test_a_difference_is_found_and_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without its random state the second attempt draws other masks of dropout.
    monkeypatch.setattr("agent.trainer.control.ControlledMixin._load_rng_state", lambda *_: None)
    cell = ALL["sft LoRA, float32"]
    assert 0 < bench.difference(cell) < 10


def test_the_table_has_a_line_for_each_kind_and_leaves_gaps() -> None:
    lines = matrix.table({("sft full", "float32"): "equal", ("sft LoRA", "nf4"): "1e-05"}).splitlines()
    assert lines[0] == "| paused and resumed | float32 | nf4 | nf4, double | fp4 | int8 |"
    assert lines[2:] == ["| sft full | equal |  |  |  |  |", "| sft LoRA |  | 1e-05 |  |  |  |"]


def test_a_value_that_is_missing_is_no_small_difference() -> None:
    def line(values: dict[str, float]) -> RecordingLine:
        made = RecordingLine({})
        made.say(Metrics(1, 0.1, 0.0, values))
        return made

    one = line({"train_loss": 1.0, "elapsed_seconds": 5.0})
    assert matrix._of_points(one, one, line({"train_loss": 1.5, "elapsed_seconds": 9.0})) == 0.5
    assert matrix._of_points(one, one, line({"train_loss": 1.0})) == 0.0
    assert matrix._of_points(one, one, line({"grad_norm": 1.0})) == float("inf")
