"""What is compressed comes back bit for bit."""

from pathlib import Path

import pytest
import torch
import zstandard

from agent.trainer import planes
from agent.trainer.checkpoint import FileRecord
from agent.trainer.tensorfile import NAMES, Sink


def write(path: Path, tensors: dict[str, torch.Tensor]) -> FileRecord:
    with Sink(path) as sink:
        planes.write(sink, tensors)
        return sink.finish()


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_every_type_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (6, 16), dtype=torch.uint8)
    tensor = (noise % 2).bool() if dtype is torch.bool else noise.view(dtype)
    write(tmp_path / "some.zst", {"a": tensor})
    back = planes.read(tmp_path / "some.zst")["a"]
    assert back.dtype is dtype and back.shape == tensor.shape
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


def test_every_shape_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "_CHUNK", 64)
    tensors = {
        "number": torch.tensor(1.5),
        "none": torch.empty(0, 3),
        "turned": torch.randn(5, 7).t(),
        "long": torch.randn(1001),
        "odd": torch.randn(33, dtype=torch.float64),
    }
    record = write(tmp_path / "some.zst", tensors)
    assert record.size == (tmp_path / "some.zst").stat().st_size
    back = planes.read(tmp_path / "some.zst")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor) and back[name].shape == tensor.shape


def test_grouping_finds_what_zstd_alone_does_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = (torch.randn(1 << 18) * 0.02).bfloat16()
    record = write(tmp_path / "some.zst", {"weights": weights})
    alone = len(zstandard.ZstdCompressor(level=planes.LEVEL).compress(weights.view(torch.uint8).numpy()))
    assert record.size < 0.75 * weights.numel() * 2
    assert record.size < 0.9 * alone


@pytest.mark.parametrize("cut", [0, 5, 100])
def test_a_file_that_is_not_whole_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "some.zst"
    write(path, {"a": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="holds no grouped tensors"):
        planes.read(path)
