"""What the next step of a training depends on, taken out of a trainer and put back. No pickles."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from agent.trainer import tensorfile
from agent.trainer.errors import TrainerError
from agent.trainer.snapshot import Content
from protocol.failures import FailureReason

MODEL, ADAPTER = "model", "adapter_model"
"""Names that transformers and PEFT look for."""
OPTIMIZER, RANDOM, SCHEDULE = "training/optimizer", "training/random", "training/scheduler"
"""In a folder of their own: whoever loads the weights takes every safetensors file beside them for weights."""
_JSON = ".json"


def weights(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Return what is trained, as the libraries would save it: by file, then by name. Nothing is copied."""
    if isinstance(model, PeftModel):
        return {
            f"{_subfolder(adapter)}{ADAPTER}": get_peft_model_state_dict(model, adapter_name=adapter)
            for adapter in model.peft_config
        }
    # Under the names that the model has now: under those it was loaded by (`save_pretrained` turns them back),
    # a mixture of experts would not find its own weights again.
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return {MODEL: remove_tied_weights_from_state_dict(state, model)}


def put_weights(model: Any, folder: Path) -> None:
    """Put the weights of a checkpoint into ``model``, each in the precision that it has there."""
    if isinstance(model, PeftModel):
        # Not by `load_adapter`: it turns 16-bit adapters into float32, and a resumed QLoRA run goes another way.
        for adapter in model.peft_config:
            found = tensorfile.read(folder, f"{_subfolder(adapter)}{ADAPTER}")
            result = set_peft_model_state_dict(model, found, adapter_name=adapter)
            _refuse(folder, result.unexpected_keys)
        return
    found = tensorfile.read(folder, MODEL)
    result = model.load_state_dict(found, strict=False)
    here = model.state_dict()
    filled = {_place(here[name]) for name in found if name in here}
    lacking = [name for name in result.missing_keys if _place(here[name]) not in filled]
    _refuse(folder, [*lacking, *result.unexpected_keys])


def static_files(model: Any, tokenizer: Any) -> dict[str, bytes]:
    """Return what makes a folder with the weights one that `from_pretrained` loads; training changes none of it."""
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as name:
        folder = Path(name)
        if isinstance(model, PeftModel):
            for adapter, config in model.peft_config.items():
                inference, config.inference_mode = config.inference_mode, True
                try:
                    config.save_pretrained(str(folder / _subfolder(adapter)))
                finally:
                    config.inference_mode = inference
        else:
            model.save_pretrained(folder, state_dict={})
            for path in folder.glob("*.safetensors"):
                path.unlink()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }


def put_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Put an optimizer's state back, in the precision that it had."""
    optimizer.load_state_dict(state)
    # torch turns it into that of the weights, which Adafactor's under bfloat16 weights is not.
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    for number, kept in state["state"].items():
        here = optimizer.state[ordered[number]]
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and here[name].dtype is not value.dtype:
                here[name] = value.to(here[name].device)


def random_states() -> dict[str, Any]:
    """Return every random state that training draws from."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def put_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and len(states.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def add(content: Content, stem: str, tree: Any) -> None:
    """Put a nested value into ``content``, as JSON and a file of its tensors."""
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(tensorfile.split(tree, tensors))
    content.files[f"{stem}{_JSON}"] = text.encode()
    if tensors:
        content.tensors[stem] = tensors


def has(folder: Path, stem: str) -> bool:
    """Tell whether `add` has put a value of that name into the checkpoint."""
    return (folder / f"{stem}{_JSON}").is_file()


def take(folder: Path, stem: str) -> Any:
    """Return the value that `add` was given."""
    tree = json.loads((folder / f"{stem}{_JSON}").read_text(encoding="utf-8"))
    tensors = tensorfile.read(folder, stem) if tensorfile.there(folder, stem) else {}
    # Copies: what is read is the file itself, mapped into memory, and training must outlive the file.
    return tensorfile.join(tree, {name: tensor.clone() for name, tensor in tensors.items()})


def _subfolder(adapter: str) -> str:
    return "" if adapter == "default" else f"{adapter}/"


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _refuse(folder: Path, names: list[str]) -> None:
    if names:
        raise TrainerError(
            FailureReason.CHECKPOINT,
            f"The weights in the checkpoint {folder} are not those of this model: {names[0]} "
            f"{f'and {len(names) - 1} others do' if names[1:] else 'does'} not match. Start the job again, or resume it from another checkpoint.",
        )
