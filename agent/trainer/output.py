"""The final model on disk: staged beside, renamed when whole, with the fingerprint of its weights."""

import shutil
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft import PeftModel
from safetensors import safe_open

from agent.trainer.checkpoint import Checkpoints
from agent.trainer.disk import (
    NoRoom,
    check_writable,
    has_room,
    is_disk_full,
    need_room,
    refusals_told,
    replace_folder,
    sync_folder,
)
from agent.trainer.model import load_base, old_name_allowed
from protocol.jobspec import JobSpec
from protocol.worker import Limits, Workspace

MERGED = "merged"
WHAT = "the final model"


class Output:
    """The folder of the final model while it is being written."""

    def __init__(self, workspace: Workspace, store: Checkpoints | None = None) -> None:
        """Make room at the cost of older checkpoints in ``store``, where there is too little."""
        self._store = store
        self.final = Path(workspace.output)
        self.staging = self.final.with_name(f".staging-{self.final.name}")

    def __enter__(self) -> "Output":
        shutil.rmtree(self.staging, ignore_errors=True)
        with refusals_told(self.final.parent, WHAT):
            self.staging.mkdir(parents=True)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Clear up; turns a full disk into its own error."""
        full = error is not None and not isinstance(error, NoRoom) and is_disk_full(error, self.final.parent)
        shutil.rmtree(self.staging, ignore_errors=True)
        if full:
            raise NoRoom(self.final.parent, WHAT) from error

    def check(self) -> None:
        """Find out before training whether the model can be written where it belongs."""
        check_writable(self.final.parent, WHAT)

    def write(self, model: Any, tokenizer: Any, *, use_cache: bool) -> str:
        """Write weights and tokenizer; return the hash of the weights."""
        size = _size(model)
        self._need_room(WHAT, size)
        # Trainer switches the cache off in the configuration; whoever uses the model wants it as it was.
        model.config.use_cache = use_cache
        with refusals_told(self.final.parent, WHAT, size):
            model.save_pretrained(self.staging)
            tokenizer.save_pretrained(self.staging)
        return weights_hash(self.staging)

    def _need_room(self, what: str, size: int) -> None:
        place, store = self.final.parent, self._store
        if store is not None and store.folder.stat().st_dev == place.stat().st_dev:
            store.make_room(lambda: has_room(place, size))
        need_room(place, what, size)

    def merge(self, spec: JobSpec, workspace: Workspace, limits: Limits, tokenizer: Any) -> None:
        """Write the base model in bfloat16 with the adapter merged in.

        The base is loaded anew: merging into 4-bit weights would quantise the result again.
        """
        base = load_base(spec, workspace, limits, torch.bfloat16)
        self._need_room("the merged model", _size(base))
        with old_name_allowed():
            merged = PeftModel.from_pretrained(base, self.staging, autocast_adapter_dtype=False)
        merged = merged.merge_and_unload(safe_merge=True)
        merged.save_pretrained(self.staging / MERGED)
        tokenizer.save_pretrained(self.staging / MERGED)

    def publish(self) -> None:
        """Let the model appear under its name, in place of an older one."""
        with refusals_told(self.final.parent, WHAT):
            for path in [*self.staging.rglob("*"), self.staging]:
                sync_folder(path)
            replace_folder(self.staging, self.final)


def _size(model: Any) -> int:
    """Return the bytes that are written of a model: of one with an adapter, the adapter's."""
    chosen = [p for p in model.parameters() if p.requires_grad or not isinstance(model, PeftModel)]
    return sum(p.numel() * p.element_size() for p in chosen)


def weights_hash(folder: Path) -> str:
    """Return xxh3-128 over every tensor's name and bytes, in the order of names."""
    places: dict[str, Path] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    digest = xxhash.xxh3_128()
    for name in sorted(places):
        with safe_open(places[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        digest.update(name.encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
