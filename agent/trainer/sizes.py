"""What a job's model weighs, from its configuration alone: the model is built on the meta device, without weights."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from agent.trainer.model import Precision
from protocol.jobspec import JobSpec, LoraSpec, Method, Quantization

BLOCK = 64
"""Numbers that share one scale in bitsandbytes' 4-bit weights; with double quantisation the scales themselves are
held in 8 bits, 256 to a scale."""
OPTIMIZERS = {
    "sgd": 0.0,
    "adafactor": 0.05,
    "lion": 1.0,
    "adagrad": 1.0,
    "rmsprop": 1.0,
}
"""Words of state for each trained number, in the precision of that number; every other optimizer keeps two."""


@dataclass(frozen=True)
class Sizes:
    """Counts, and bytes."""

    parameters: int
    """Of the base model and the adapter, what is shared once."""
    trainable: int
    weights: int
    """Of everything that the model holds, the adapter included."""
    trained: int
    """Of the trained weights; their gradients are as large."""
    optimizer: int
    optimizer_on_host: bool
    reference: int
    """Of the frozen second model that full DPO compares with."""
    largest: int
    """Of the largest trained tensor."""

    @property
    def checkpoint(self) -> int:
        return self.trained + self.optimizer


def planned(spec: JobSpec, precision: Precision, config: Any, *, remote_code: bool = False) -> Sizes:
    """Return the sizes of a job whose model is not loaded."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=remote_code)
    wide = precision.weights.itemsize
    base = bytes_held = 0
    head = model.get_output_embeddings()
    linears = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    for parameter in model.parameters():
        count = parameter.numel()
        base += count
        quantized = spec.model.quantization if id(parameter) in linears else None
        bytes_held += _quantized(count, parameter.shape[0], quantized) if quantized else count * wide
    bytes_held += sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if spec.lora is None:
        largest = max(parameter.numel() for parameter in model.parameters()) * wide
        return _sizes(spec, base, base, bytes_held, base * wide, largest, base * wide)
    added, magnitudes, copied, biases = _adapter(spec.lora, model, head)
    trainable = added + magnitudes + copied + biases
    # Beside quantised weights TRL holds what is trained in bfloat16, but for DoRA's magnitudes.
    short, long = (2, 4) if spec.model.quantization is not None else (wide, wide)
    trained = (trainable - magnitudes) * short + magnitudes * long
    held = bytes_held + (added + copied) * short + magnitudes * long
    return _sizes(spec, base + added + magnitudes + copied, trainable, held, trained, 0, 0)


def loaded(spec: JobSpec, model: Any) -> Sizes:
    """Return the sizes of a model that is there, counted tensor by tensor."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    size = sum(map(_bytes, trained))
    held = held_bytes(model)
    whole = (
        model.num_parameters()
        if hasattr(model, "num_parameters")
        else sum(parameter.numel() for parameter in model.parameters())
    )
    reference = 0 if spec.lora is not None else held
    count = sum(parameter.numel() for parameter in trained)
    return _sizes(spec, int(whole), count, held, size, max(map(_bytes, trained), default=0), reference)


def held_bytes(model: Any) -> int:
    """Return the bytes of all that a model holds: what is shared once, and what 4-bit weights need beside them."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        weight = getattr(module, "weight", None)
        scales = getattr(weight, "SCB", None)  # of 8-bit weights
        if isinstance(scales, torch.Tensor):
            tensors.append(scales)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            parts = (state.absmax, getattr(getattr(state, "state2", None), "absmax", None))
            tensors += [part for part in parts if isinstance(part, torch.Tensor)]
    return sum({tensor.data_ptr(): _bytes(tensor) for tensor in tensors}.values())


def optimizer_bytes(name: str, trained: int, trainable: int) -> tuple[int, bool]:
    """Return the bytes of an optimizer's state, and whether they lie in the host's memory."""
    kind = name.removeprefix("paged_")
    words = next((words for start, words in OPTIMIZERS.items() if kind.startswith(start)), 2.0)
    if kind.endswith("8bit"):
        return int(words * trainable * (1 + 4 / 256)), name.startswith("paged_")
    if kind.endswith("4bit"):
        return int(words * trainable * 0.53), name.startswith("paged_")
    return int(words * trained), name.startswith("paged_")


def _sizes(
    spec: JobSpec, parameters: int, trainable: int, held: int, trained: int, largest: int, reference: int
) -> Sizes:
    optimizer, on_host = optimizer_bytes(spec.training.optim, trained, trainable)
    return Sizes(
        parameters=parameters,
        trainable=trainable,
        weights=held,
        trained=trained,
        optimizer=optimizer,
        optimizer_on_host=on_host,
        reference=reference if spec.method is Method.DPO else 0,
        largest=largest,
    )


def _bytes(tensor: torch.Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def _quantized(count: int, rows: int, how: Quantization) -> int:
    """Return the bytes of a weight in bitsandbytes' form."""
    if how.bits == 8:
        return count + rows * 4  # a scale for each row of outputs
    scales = -(-count // BLOCK)
    held = scales + -(-scales // 256) * 4 if how.double_quant else scales * 4
    return -(-count // 2) + held


def _adapter(lora: LoraSpec, model: Any, head: Any) -> tuple[int, int, int, int]:
    """Return how many numbers an adapter adds, how many as magnitudes, how many it copies whole, and its biases."""
    added = magnitudes = copied = biases = 0
    for name, module in model.named_modules():
        if any(name == kept or name.endswith(f".{kept}") for kept in lora.modules_to_save):
            copied += sum(parameter.numel() for parameter in module.parameters())
            continue
        if lora.target_modules == "all-linear":
            chosen = isinstance(module, torch.nn.Linear) and module is not head
        else:
            chosen = any(name == one or name.endswith(f".{one}") for one in lora.target_modules)
        bias = getattr(module, "bias", None)
        if isinstance(bias, torch.nn.Parameter) and (
            lora.bias == "all" or (lora.bias == "lora_only" and chosen)
        ):
            biases += bias.numel()
        weight = getattr(module, "weight", None)
        if not chosen or weight is None or weight.dim() != 2:
            continue
        outputs, inputs = weight.shape
        if isinstance(module, torch.nn.Embedding):
            outputs, inputs = inputs, outputs
        added += lora.r * (outputs + inputs)
        magnitudes += outputs if lora.use_dora else 0
    return added, magnitudes, copied, biases
