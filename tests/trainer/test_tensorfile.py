"""Safetensors as others read them, and nested values that come back as they were."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open

from agent.trainer.tensorfile import NAMES, Sink, join, raw, read, split, there, write_plain


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {
        f"of {name}": torch.randint(0, 2, (3, 16), dtype=torch.uint8).bool()
        if dtype is torch.bool
        else torch.randint(0, 256, (3, 16), dtype=torch.uint8).view(dtype)
        for dtype, name in NAMES.items()
    }
    tensors |= {"number": torch.tensor(2.5), "none": torch.empty(0, 4), "turned": torch.randn(4, 6).t()}
    with Sink(tmp_path / "some.safetensors") as sink:
        write_plain(sink, tensors)
        record = sink.finish()
    data = (tmp_path / "some.safetensors").read_bytes()
    assert (record.size, record.xxh3_128) == (len(data), xxhash.xxh3_128_hexdigest(data))
    with safe_open(tmp_path / "some.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert there(tmp_path, "some") and not there(tmp_path, "other")
    back = read(tmp_path, "some")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype is tensor.dtype and back[name].shape == tensor.shape
        assert bytes(raw(back[name])) == bytes(raw(tensor))


def test_a_write_can_be_given_up_between_its_pieces(tmp_path: Path) -> None:
    def enough() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Sink(tmp_path / "some", enough) as sink:
        sink.write(b"data")
    assert (tmp_path / "some").stat().st_size == 0


def again(tree: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(split(tree, tensors))
    return join(json.loads(text), {name: tensor.clone() for name, tensor in tensors.items()})


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype is other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) or (one != one and other != other)


@pytest.mark.parametrize(
    "tree",
    [
        {"a": [1, -2.5e-300, True, None, "text", (), (1, (2,))], "b": {}},
        {0: "int", "0": "text", (1, 2): torch.arange(3), "$tensor": "no tensor"},
        [math.inf, -math.inf, math.nan, 2**80, 0.1 + 0.2],
        (torch.tensor(3, dtype=torch.int64), {"x": torch.randn(2, 3).bfloat16()}),
        {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()},
        {0: torch.ones(1), "0": torch.zeros(1)},
    ],
)
def test_a_nested_value_comes_back(tree: Any) -> None:
    assert same(again(tree), tree)


def test_what_has_no_place_in_a_checkpoint_is_named() -> None:
    with pytest.raises(TypeError, match="groups/0/hook is a function"):
        split({"groups": [{"hook": same}]}, {})


def test_what_many_share_is_kept_once() -> None:
    shared = torch.arange(256.0)
    tensors: dict[str, torch.Tensor] = {}
    split({"a": {"map": shared}, "b": {"map": shared}, "c": shared[:5]}, tensors)
    assert list(tensors) == ["a/map", "c"]
