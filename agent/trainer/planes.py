"""Tensors compressed without loss: the bytes of the numbers grouped by plane, then zstd.

The sign and exponent of neighbouring weights are alike while their mantissas are noise. Side by side, the noise
hides the likeness; byte i of every number together, it does not.

A file is the frames of each tensor, one after the other; then an index as JSON, its length in 8 bytes, and MAGIC.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from agent.trainer.tensorfile import DTYPES, NAMES, Sink, raw

MAGIC = b"FTLPLN01"
LEVEL = 1
"""More than this costs several times the time for next to nothing: see `python -m tests.bench compress`."""
_CHUNK = 16 << 20
"""Bytes that are grouped and compressed at once."""


def write(sink: Sink, tensors: Mapping[str, torch.Tensor], level: int = LEVEL) -> None:
    """Write the tensors to ``sink``."""
    compressor = zstandard.ZstdCompressor(level=level)
    index: dict[str, Any] = {}
    for name, tensor in tensors.items():
        width = tensor.element_size()
        data = memoryview(raw(tensor)).cast("B")
        step = _CHUNK // width * width
        frames = []
        for start in range(0, len(data), step):
            frame = compressor.compress(group(data[start : start + step], width))
            sink.write(frame)
            frames.append(len(frame))
        index[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "frames": frames}
    text = json.dumps(index, separators=(",", ":")).encode()
    sink.write(text)
    sink.write(len(text).to_bytes(8, "little"))
    sink.write(MAGIC)


def read(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file that `write` has made. Raises ValueError for one that is no such file."""
    decompressor = zstandard.ZstdDecompressor()
    tensors: dict[str, torch.Tensor] = {}
    with path.open("rb") as file:
        for name, entry in _index(path, file).items():
            tensor = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
            width = tensor.element_size()
            into = raw(tensor)
            at = 0
            for length in entry["frames"]:
                part = ungroup(decompressor.decompress(file.read(length)), width)
                into[at : at + len(part)] = part
                at += len(part)
            if at != len(into):
                raise ValueError(f"{path} holds {at} bytes of {name} where {len(into)} belong")
            tensors[name] = tensor
    return tensors


def group(data: memoryview, width: int) -> bytes | memoryview:
    """Return the bytes with byte i of every number of ``width`` bytes together."""
    if width == 1:
        return data
    # By torch: it lets other threads run meanwhile.
    return memoryview(
        torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(-1, width).t().contiguous().numpy()
    ).cast("B")


def ungroup(data: bytes, width: int) -> Any:
    """Undo `group`."""
    planes = np.frombuffer(data, np.uint8)
    return planes if width == 1 else np.ascontiguousarray(planes.reshape(width, -1).T).reshape(-1)


def _index(path: Path, file: Any) -> dict[str, Any]:
    """Return the index; leaves ``file`` at its start."""
    tail = 8 + len(MAGIC)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - tail))
    end = file.read(tail)
    length = int.from_bytes(end[:8], "little")
    if end[8:] != MAGIC or length > size - tail:
        raise ValueError(f"{path} holds no grouped tensors")
    file.seek(size - tail - length)
    found: dict[str, Any] = json.loads(file.read(length))
    file.seek(0)
    return found
