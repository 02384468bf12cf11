"""Marks of everything that a run is made of: equal marks, equal run. They lie in each checkpoint's manifest."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch
import xxhash

from agent.trainer import templates
from agent.trainer.model import Loaded, Precision
from protocol.jobspec import JobSpec
from protocol.version import AGENT_VERSION
from protocol.worker import Workspace

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "bitsandbytes")
BESIDE = frozenset({
    "check", "checking", "checkpoint", "contents", "demo", "disk", "entry", "errors", "estimate", "fake",
    "fingerprints", "forecast", "formula", "inbox", "inputs", "keeper", "line", "memory", "meter", "output", "overflow",
    "planes", "probe", "reading", "reasons", "replay", "reporter", "restore", "samples", "settings", "sizes", "snapshot",
    "tensorfile",
})  # fmt: skip
"""Modules of the trainer that do not decide what a step computes."""
_BLOCK = 1 << 16
_BLOCKS = 32


def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in BESIDE:
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


CODE = _code()
"""Of the sources as they were when this process began."""


def tokenizer_mark(tokenizer: Any) -> str:
    """Return the mark of vocabulary, merges and special tokens; take it before the tokenizer is used.

    Its use may leave truncation and padding in what is hashed here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    digest = xxhash.xxh3_128(known.encode("utf-8", "surrogatepass"))
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    digest.update(repr((type(tokenizer).__name__, sorted(special.items()))).encode())
    return digest.hexdigest()


def weights_mark(source: str, model: Any) -> str:
    """Return the mark of the base model: of a folder by its configuration and samples of every weight file.

    To read all of a large model would take longer than to load it; training moves every part of it.
    """
    folder = Path(source)
    if not folder.is_dir():
        commit = getattr(getattr(model, "config", None), "_commit_hash", None)
        return f"{source}@{commit or ''}"
    digest = xxhash.xxh3_128()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        if path.is_file():
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            _sample(path, digest)
    return digest.hexdigest()


def _sample(path: Path, digest: Any) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        for block in range(_BLOCKS):
            start = block * size // _BLOCKS
            file.seek(start)
            digest.update(file.read(min(_BLOCK, (block + 1) * size // _BLOCKS - start)))


def marks(
    spec: JobSpec,
    workspace: Workspace,
    prepared: Any,
    tokenizer: Any,
    mark_of_tokenizer: str,
    loaded: Loaded,
    precision: Precision,
) -> dict[str, str]:
    """Return what is written into each checkpoint's manifest and compared before it is gone on from."""
    plain = msgspec.structs.replace(spec, job_id="job", name="", samples=[], branch=None)
    template = "" if prepared.facts.get("chat_template") == "not used" else templates.template_of(tokenizer)
    return {
        "spec": msgspec.json.encode(plain).decode(),
        "rows": prepared.digests[0],
        "eval_rows": " ".join(prepared.digests[1:]),
        "template": xxhash.xxh3_128_hexdigest(template.encode("utf-8", "surrogatepass")),
        "tokenizer": mark_of_tokenizer,
        "weights": weights_mark(workspace.model, loaded.model),
        "precision": ", ".join(f"{name} {value}" for name, value in sorted(precision.facts.items())),
    }


def versions() -> dict[str, str]:
    """Return the versions of what computes, and what it computes on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        **{name: version(name) for name in PACKAGES},
        "agent": AGENT_VERSION,
        "code": CODE,
        "python": platform.python_version(),
        "device": device,
        "threads": str(torch.get_num_threads()),
    }
