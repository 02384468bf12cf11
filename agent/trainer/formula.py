"""What a step takes, by calculation: no model is run. For the start of every job, and for advice in figures."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from agent.trainer.model import Precision
from agent.trainer.sizes import Sizes, planned
from protocol.jobspec import JobSpec, LoraSpec, Method, Quantization

GB = 1 << 30
TILE_TOKENS, TILE_WORDS = 4096, 32768
"""Largest piece of the logits that TRL's fused head holds at once."""
TILES_BACK, TILES_FORTH = 7.0, 3.0
"""Copies in float32 that the head makes of it without Triton, with gradients and without (measured)."""
HOLES = 1.8
"""Resident bytes for each byte of activations on a CPU: blocks that are freed leave holes (glibc, measured)."""
CHURN = 4.0
"""What is lost besides where each layer is computed again on the way back, in layers (glibc, measured)."""


@dataclass(frozen=True)
class Rows:
    """What is known of the data."""

    count: int
    """Sequences to train on; 0: not known."""
    held_out: int
    longest: int
    """Tokens, after cutting."""
    mean: float
    """Tokens of a sequence."""
    steps: int
    """Optimizer steps of the whole job."""


@dataclass(frozen=True)
class Situation:
    """A job and where it runs."""

    spec: JobSpec
    config: Any
    precision: Precision
    rows: Rows
    on_cuda: bool
    sizes: Sizes


@dataclass(frozen=True)
class Step:
    """Most bytes beyond weights and optimizer's state, in each part of a step."""

    saved: float
    """At the end of the forward pass and in the head: activations."""
    head: float
    """Of that, the head's own."""
    spread: float
    """At the end of the backward pass: gradients."""
    update: float
    """In the optimizer's step."""
    evaluate: float
    lost: float = 0.0
    """Freed, but not given back to the system."""

    @property
    def peak(self) -> float:
        return max(self.saved, self.spread, self.update, self.evaluate) + self.lost


def step(at: Situation) -> Step:
    """Return what a step takes."""
    spec, training, sizes = at.spec, at.spec.training, at.sizes
    sides = 2 if spec.method is Method.DPO else 1
    length = min(training.max_length, at.rows.longest)
    tokens = training.batch_size * length * sides
    text = at.config.get_text_config()
    wide = 2 if at.precision.bf16 or at.precision.fp16 else at.precision.weights.itemsize
    layer = tokens * _per_token(at, text, wide, length)
    layers = int(text.num_hidden_layers)
    through = tokens * int(text.hidden_size) * wide
    kept = layers * through + layer if training.gradient_checkpointing else layers * layer
    back = _head(at, text, tokens, wide, TILES_BACK) + (through + _trained_head(at, text))
    forth = _head(at, text, tokens * _share_held_out(spec), wide, TILES_FORTH)
    gradients = float(sizes.trained)
    held = gradients if training.gradient_accumulation_steps > 1 else 0.0
    in_layer = layer / max(1, layers) + 2 * through
    lost = (HOLES - 1) * kept
    if training.gradient_checkpointing:  # no more than where every layer's activations are kept
        lost = min(lost + CHURN * layer, (HOLES - 1) * layers * layer)
    return Step(
        saved=kept + back + held,
        head=back,
        spread=gradients + in_layer,
        update=gradients + 2.0 * sizes.largest,
        evaluate=forth + 4 * through * _share_held_out(spec) if at.rows.held_out else 0.0,
        lost=0.0 if at.on_cuda else lost,
    )


def advice(at: Situation, *, scale: float = 1.0) -> list[str]:
    """Return what to change and what each change saves, the most first.

    ``scale``: a measured peak of a step over the calculated one, where one was measured.
    """
    now = _needs(at, scale)
    told: list[tuple[float, str]] = []
    for spec, sentence in _changes(at):
        sizes = at.sizes
        if spec.lora is not at.spec.lora or spec.model is not at.spec.model:
            sizes = planned(spec, at.precision, at.config)
        saved = now - _needs(replace(at, spec=spec, sizes=sizes), scale)
        if saved > 0.01 * now:
            told.append((saved, f"{sentence} saves about {_gb(saved)}."))
    return [sentence for _, sentence in sorted(told, key=lambda one: -one[0])]


def _needs(at: Situation, scale: float) -> float:
    sizes = at.sizes
    optimizer = 0 if sizes.optimizer_on_host and at.on_cuda else sizes.optimizer
    return sizes.weights + sizes.reference + optimizer + step(at).peak * scale


def _changes(at: Situation) -> Iterator[tuple[JobSpec, str]]:
    """Yield other forms of the job, each with the beginning of a sentence."""
    spec, training = at.spec, at.spec.training
    length = min(training.max_length, at.rows.longest)
    if training.batch_size > 1:
        half = training.batch_size // 2
        times = training.gradient_accumulation_steps * training.batch_size // half
        yield (
            _with(spec, batch_size=half, gradient_accumulation_steps=times),
            f"training.batch_size {half} with gradient_accumulation_steps {times}, which trains the same,",
        )
    if length > 128:
        half = length // 2
        yield _with(spec, max_length=half), f"training.max_length {half}"
    if not training.gradient_checkpointing:
        yield (
            _with(spec, gradient_checkpointing=True),
            "training.gradient_checkpointing, at about a third more time a step,",
        )
    if spec.lora is None:
        adapter = msgspec.structs.replace(spec, lora=LoraSpec())
        yield adapter, "A LoRA adapter of rank 16 (a lora section) in place of training all weights"
    elif spec.model.quantization is None or spec.model.quantization.bits == 8:
        held = Quantization(bits=4, double_quant=True)
        model = msgspec.structs.replace(spec.model, quantization=held)
        yield (
            msgspec.structs.replace(spec, model=model),
            "Holding the base model in 4 bits (model.quantization)",
        )
    if spec.lora is None and not training.optim.endswith("8bit") and at.on_cuda:
        yield _with(spec, optim="adamw_8bit"), "training.optim adamw_8bit"


def _with(spec: JobSpec, **changes: Any) -> JobSpec:
    return msgspec.structs.replace(spec, training=msgspec.structs.replace(spec.training, **changes))


def _per_token(at: Situation, text: Any, wide: int, length: int) -> float:
    """Return the bytes that one layer keeps of each token for its backward pass."""
    hidden = int(text.hidden_size)
    heads = int(getattr(text, "num_attention_heads", 1) or 1)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head_size = int(getattr(text, "head_dim", None) or hidden // heads)
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    inner = int(max(inner) if isinstance(inner, list | tuple) else inner)
    lora, queries, keys = at.spec.lora, heads * head_size, kv_heads * head_size
    # Queries, keys, values and what attention gives.
    attention = 2 * queries + 2 * keys
    # Around each norm: the stream, the normed, and the weighted, if the norm is trained.
    norms = (6 if lora is None else 4) * hidden
    extra = 0.0
    if lora is not None:
        given, made = 4 * hidden + queries + inner, 2 * (hidden + inner + keys) + queries
        extra += 7 * lora.r * wide
        extra += given * (wide + 1) if lora.dropout else 0
        extra += 2 * made * wide if lora.use_dora else 0
        held = at.spec.model.quantization
        extra += given * 2 if held is not None and held.bits == 8 else 0
    if wide == 2:
        extra += 2 * hidden * 4  # norms compute in float32
        # Beside float32 weights the 16-bit forms of what goes into each product are kept as well.
        extra += 30 * hidden if at.precision.weights.itemsize == 4 else 0
    if (getattr(at.config, "_attn_implementation", None) or "sdpa") == "eager":
        extra += heads * length * (2 * wide + 4)
    elif at.spec.training.packing and not at.on_cuda:
        extra += at.spec.training.batch_size * length * 4  # the mask that keeps documents apart
    return (norms + attention + 4 * inner) * wide + extra


def _head(at: Situation, text: Any, tokens: float, wide: int, tiles: float) -> float:
    """Return the bytes of the head over the vocabulary: a tile of the logits at a time."""
    rows = min(tokens, TILE_TOKENS)
    copies = 0.0 if at.on_cuda else 4 * tiles * min(int(text.vocab_size), TILE_WORDS)
    return rows * (TILE_WORDS * wide + copies)  # its buffer is as wide for a small vocabulary


def _trained_head(at: Situation, text: Any) -> float:
    """Return the bytes of the head's gradient, which is summed in float32."""
    return float(int(text.vocab_size) * int(text.hidden_size) * 4) if at.spec.lora is None else 0.0


def _share_held_out(spec: JobSpec) -> float:
    training = spec.training
    return (training.eval_batch_size or training.batch_size) / training.batch_size


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / (1 << 20):.0f} MB"
