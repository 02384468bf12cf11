"""Tensors on disk without pickles: safetensors, hashed while they are written; nested values as JSON beside them."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file

from agent.trainer.checkpoint import FileRecord

PLAIN, PLANES = ".safetensors", ".planes.zst"
_PIECE = 8 << 20
"""Bytes between two looks at whether the write is still wanted; each is written and hashed without the GIL."""
NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""The dtypes of safetensors, by its names."""
DTYPES = {name: dtype for dtype, name in NAMES.items()}


class Sink:
    """A file that is hashed while it is written, and is on the disk when it is closed.

    ``pulse`` is called between the pieces, and may raise to give the write up.
    """

    def __init__(self, path: Path, pulse: Callable[[], None] = lambda: None) -> None:
        self._file = path.open("xb")
        self._pulse = pulse
        self._digest = xxhash.xxh3_128()
        self.size = 0

    def __enter__(self) -> "Sink":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _PIECE):
            self._pulse()
            piece = view[start : start + _PIECE]
            self._file.write(piece)
            self._digest.update(piece)
        self.size += len(view)

    def finish(self) -> FileRecord:
        """Force what was written to the disk, and return what it must be."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileRecord(self.size, self._digest.hexdigest())


def raw(tensor: torch.Tensor) -> Any:
    """Return the tensor's bytes; those of a contiguous one in host memory are not copied."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else b""


def write_plain(sink: Sink, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file."""
    # The wide ones first: then each lies where its type may lie.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little"))
    sink.write(text)
    for name in ordered:
        sink.write(raw(tensors[name]))


def read(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    """Return the tensors of ``stem`` in a checkpoint, compressed or not. Raises FileNotFoundError."""
    if (folder / f"{stem}{PLANES}").exists():
        # Not at the top: it is built on this module.
        from agent.trainer import planes

        return planes.read(folder / f"{stem}{PLANES}")
    return load_file(folder / f"{stem}{PLAIN}")


def there(folder: Path, stem: str) -> bool:
    """Tell whether a checkpoint has the tensors of ``stem``."""
    return any((folder / f"{stem}{ending}").exists() for ending in (PLAIN, PLANES))


def split(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return ``tree`` as plain JSON; its tensors and arrays go to ``tensors`` by name, each storage once.

    The tensors are those of the tree, not copies. `join` makes the same tree again, types and all.
    """
    seen: dict[tuple[Any, ...], str] = {}

    def put(tensor: torch.Tensor, at: str) -> str:
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and key in seen:  # one map for all states of an 8-bit optimizer
            return seen[key]
        name = at.removeprefix("/")
        while name in tensors:  # 0 and "0" are two keys
            name += "'"
        seen[key] = name
        tensors[name] = tensor.detach()
        return name

    def plain(value: Any, at: str) -> Any:
        match value:
            case torch.Tensor():
                return {"$tensor": put(value, at)}
            case np.ndarray():
                return {"$array": put(torch.from_numpy(value.copy()), at)}
            case np.generic():
                return plain(value.item(), at)
            case None | bool() | str():
                return value
            case int():
                return int(value)
            case float():
                return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
            case dict():
                if all(isinstance(key, str) and not key.startswith("$") for key in value):
                    return {key: plain(item, f"{at}/{key}") for key, item in value.items()}
                return {"$dict": [[plain(k, f"{at}/key"), plain(v, f"{at}/{k}")] for k, v in value.items()]}
            case tuple():
                return {"$tuple": [plain(item, f"{at}/{n}") for n, item in enumerate(value)]}
            case list():
                return [plain(item, f"{at}/{n}") for n, item in enumerate(value)]
            case _:
                raise TypeError(f"{at} is a {type(value).__name__}, which a checkpoint has no place for")

    return plain(tree, "")


def join(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return what `split` was given."""
    match tree:
        case {"$tensor": name}:
            return tensors[name]
        case {"$array": name}:
            return tensors[name].numpy()
        case {"$float": text}:
            return float(text)
        case {"$dict": pairs}:
            return {join(key, tensors): join(value, tensors) for key, value in pairs}
        case {"$tuple": items}:
            return tuple(join(item, tensors) for item in items)
        case dict():
            return {key: join(value, tensors) for key, value in tree.items()}
        case list():
            return [join(item, tensors) for item in tree]
        case _:
            return tree
