"""A short probe before a job: a step or two on the first layers of its model, measured at two depths.

What a further layer costs is the difference, and the whole model's figures follow from it. The same code as in
training loads, quantises, adapts and computes; only the depth is another, and where the weights are not on this
machine they are random.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from agent.trainer import memory, methods
from agent.trainer.checkpoint import Checkpoints
from agent.trainer.inbox import Inbox
from agent.trainer.meter import Meter, forget_most, measured, most_resident, resident
from agent.trainer.model import Precision, load_model
from agent.trainer.progress import Progress, Schedule
from agent.trainer.saving import Job
from agent.trainer.sizes import held_bytes
from protocol.jobspec import JobSpec
from protocol.worker import AnyEvent, AnyOrder, Limits, Parameters, Ready, Workspace

LONG = 20.0
"""Seconds of a micro-batch beyond which no second step is made."""
DEPTHS = (2, 4)
"""Layers. Not 1: what the C library loses between freed blocks grows evenly only from the second layer on."""
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class Probed:
    """What one step needs beyond the weights and the optimizer's state. Bytes and seconds."""

    saved: float
    """Most bytes up to where the top layer's backward pass is done: activations, the head."""
    saved_again: float
    """The same in a further micro-batch of a step, with the gradients of the earlier ones."""
    spread: float
    """Most bytes from where the bottom layer's backward pass begins: gradients."""
    update: float
    """Most bytes in clipping and in the optimizer's step, gradients included, its new state not."""
    evaluate: float
    """Most bytes of a held-out batch; 0 where nothing is held out."""
    weights: float
    trained: float
    optimizer: float
    step_seconds: float
    """Of one micro-batch."""
    update_seconds: float
    evaluate_seconds: float
    tokens: float
    """Of the micro-batch, with its padding."""
    resident: float
    """On a CPU: the most resident bytes, weights and all, above those before the model was loaded."""

    lost: float
    """Of that, what is neither in use at the peak nor new code: holes between blocks, which the C library keeps."""

    layered: float = 0.0
    """What all layers together keep for the backward pass, where that was extended from fewer; else 0."""

    @property
    def peak(self) -> float:
        """The most bytes of weights, optimizer's state and a step."""
        return self.weights + self.optimizer + max(self.saved, self.saved_again, self.spread, self.update)

    def extended(self, other: "Probed", depths: tuple[int, int], layers: int) -> "Probed":
        """Return the figures of so many layers; these are of the first of two depths, ``other``'s of the second."""
        grown = {}
        for field in fields(self):
            first, second = getattr(self, field.name), getattr(other, field.name)
            slope = (second - first) / (depths[1] - depths[0])
            grown[field.name] = max(0.0, first + (layers - depths[0]) * slope)
        kept = layers * (other.saved - self.saved) / (depths[1] - depths[0])
        return Probed(**{**grown, "tokens": self.tokens, "layered": max(0.0, kept)})


class _Nobody:
    """A line that nobody listens to."""

    parent_gone = False

    def say(self, event: AnyEvent) -> None:
        pass

    def orders(self) -> list[AnyOrder]:
        return []


def probe(
    spec: JobSpec,
    workspace: Workspace,
    limits: Limits,
    *,
    precision: Precision,
    tokenizer: Any,
    rows: Any,
    assistant_only: bool,
    evaluates: bool,
    config: Any,
) -> Probed:
    """Return what a step on ``rows``, as one micro-batch, takes of the whole model. Raises what training would."""
    memory.keep_freed()  # as training does, or less would be seen to be lost between blocks
    layers = layers_of(config)
    depths = DEPTHS if layers > DEPTHS[-1] else (layers,)
    found = []
    for depth in depths:
        with _cut(spec, workspace, limits, precision, depth) as place:
            found.append(
                _measure(spec, place, limits, precision, tokenizer, rows, assistant_only, evaluates, depth)
            )
    return found[0].extended(found[1], DEPTHS, layers) if len(found) > 1 else found[0]


def layers_of(config: Any) -> int:
    """Return how many layers the model has."""
    return int(config.get_text_config().num_hidden_layers)


@contextlib.contextmanager
def _cut(
    spec: JobSpec, workspace: Workspace, limits: Limits, precision: Precision, depth: int
) -> Iterator[Workspace]:
    """Yield a workspace whose model is the job's with ``depth`` layers."""
    folder = Path(workspace.cache) / f"probe-{spec.job_id}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    source = Path(workspace.model)
    try:
        if source.is_dir() and any(found for pattern in WEIGHTS for found in source.glob(pattern)):
            for path in source.iterdir():
                if path.name != "config.json":
                    (folder / path.name).symlink_to(path.resolve())
            config = json.loads((source / "config.json").read_text(encoding="utf-8"))
            _shorten(config, depth)
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        else:
            remote = spec.model.trust_remote_code and limits.remote_code
            whole = AutoConfig.from_pretrained(
                workspace.model, revision=spec.model.revision, trust_remote_code=remote
            )
            told = whole.to_dict()
            _shorten(told, depth)
            short = type(whole).from_dict(told)
            with contextlib.suppress(AttributeError):
                short.name_or_path = str(folder)
            model = AutoModelForCausalLM.from_config(short, dtype=precision.weights, trust_remote_code=remote)
            model.save_pretrained(folder)
            del model
        yield msgspec.structs.replace(
            workspace, model=str(folder), tokenizer=workspace.tokenizer or workspace.model
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shorten(config: dict[str, Any], depth: int) -> None:
    """Take layers away from a configuration, and what it says of each."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        layers = part.get("num_hidden_layers")
        if not isinstance(layers, int):
            continue
        for name, value in part.items():
            if isinstance(value, list) and len(value) == layers and name.startswith(("layer", "mlp_layer")):
                part[name] = value[:depth]
        part["num_hidden_layers"] = depth


def _measure(
    spec: JobSpec,
    workspace: Workspace,
    limits: Limits,
    precision: Precision,
    tokenizer: Any,
    rows: Any,
    assistant_only: bool,
    evaluates: bool,
    depth: int,
) -> Probed:
    """Measure at one depth: first as training does it, by the clock and by what is resident; then each allocation."""
    before = resident()
    forget_most()
    loaded = load_model(spec, workspace, limits, precision, tokenizer)
    args = methods.arguments(spec, precision, workspace.cache, assistant_only=assistant_only)
    trainer: Any = methods.build(spec, loaded, args, tokenizer, rows, None, _job(spec, workspace, limits))
    if spec.training.gradient_checkpointing:
        trainer.model.activation_checkpointing_enable()
    trainer.model.train()
    work = _Work(trainer, spec, depth)
    work.steps()
    most = most_resident() - before
    sizes = _traced(work, spec, evaluates)
    weights = held_bytes(trainer.model) + (
        held_bytes(loaded.reference) if loaded.reference is not None else 0
    )
    probed = Probed(
        **sizes,
        weights=weights,
        step_seconds=work.seconds,
        update_seconds=work.update_seconds,
        tokens=work.tokens,
        resident=most,
        lost=0.0,
    )
    del work, trainer, loaded
    memory.release()
    fresh = resident() - before  # code and tables that a first step brings in, and that stay
    return replace(probed, lost=max(0.0, most - fresh - probed.peak), resident=most - fresh)


def _traced(work: "_Work", spec: JobSpec, evaluates: bool) -> dict[str, float]:
    """Return what one more step allocates, part by part."""
    model, device = work.model, work.device
    with measured(device) as first:
        work.run(first)
    again = 0.0
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    if spec.training.gradient_accumulation_steps > 1:
        with measured(device) as second:
            work.run(second)
        again = second.peak() + gradients
    work.forget()
    with measured(device) as update:
        work.update()
    state = update.live()
    model.zero_grad()
    held_out, seconds = work.evaluate() if evaluates else (0, 0.0)
    return {
        "saved": first.peak(upto="top"),
        "saved_again": again,
        "spread": first.peak(since="bottom"),
        "update": max(0, update.peak() - state) + gradients,
        "evaluate": held_out,
        "trained": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        "optimizer": state,
        "evaluate_seconds": seconds,
    }


class _Work:
    """One micro-batch through the model and back, and the optimizer's step."""

    def __init__(self, trainer: Any, spec: JobSpec, depth: int) -> None:
        self._trainer = trainer
        self._spec = spec
        self.device = trainer.args.device
        self.model = trainer.accelerator.prepare_model(
            trainer.model
        )  # 16-bit arithmetic is put round it there
        rows = trainer._remove_unused_columns(trainer.train_dataset, "training")
        longest = sorted(range(len(rows)), key=lambda at: -_length(rows[at]))
        count = min(len(rows), trainer.args.train_batch_size)
        self._batch = trainer.data_collator([rows[at] for at in longest[:count]])
        held = trainer.args.eval_batch_size
        self._held_out = trainer.data_collator([rows[longest[at % len(longest)]] for at in range(held)])
        self.tokens = float(max(t.numel() for t in self._batch.values() if isinstance(t, torch.Tensor)))
        self.seconds = self.update_seconds = 0.0
        self._optimizer = trainer.create_optimizer()
        self._top, self._bottom = _ends(trainer.model, depth)

    def steps(self) -> None:
        """Make two optimizer steps, or one that lasts long."""
        micro = 2 if self._spec.training.gradient_accumulation_steps > 1 else 1
        for _ in range(2):
            for _ in range(micro):
                self.run(None)
            self.update()
            self.model.zero_grad()
            if self.seconds > LONG:
                break

    def forget(self) -> None:
        """Begin with a new optimizer."""
        self._trainer.optimizer = self._optimizer = None
        memory.release()
        self._optimizer = self._trainer.create_optimizer()

    def run(self, meter: Meter | None) -> None:
        """Compute loss and gradients, marking where the layers' backward passes begin and end."""
        trainer, began = self._trainer, time.perf_counter()
        inputs = trainer._prepare_inputs(dict(self._batch))
        hooks = self._hooks(meter) if meter is not None else []
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(self.model, inputs)
        del inputs
        trainer.accelerator.backward(loss)
        loss.item()
        for hook in hooks:
            hook.remove()
        self.seconds = time.perf_counter() - began

    def _hooks(self, meter: Meter) -> list[Any]:
        seen: set[str] = set()

        def mark(name: str) -> Any:
            def at(gradient: torch.Tensor) -> None:
                meter.mark(name)

            return at

        def watch(name: str, value: Any) -> None:
            # A checkpointed layer is run a second time on the way back.
            tensor = value[0] if isinstance(value, tuple) and value else value
            if name not in seen and isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(mark(name))
            seen.add(name)

        if self._top is None or self._bottom is None:
            return []
        return [
            self._top.register_forward_pre_hook(lambda _, given: watch("top", given)),
            self._bottom.register_forward_hook(lambda _, given, made: watch("bottom", made)),
        ]

    def update(self) -> None:
        """Clip the gradients, and step."""
        began = time.perf_counter()
        if self._spec.training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._spec.training.max_grad_norm)
        self._optimizer.step()
        self.update_seconds = time.perf_counter() - began

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def evaluate(self) -> tuple[int, float]:
        """Return the most bytes of a held-out batch, and its seconds."""
        trainer = self._trainer
        self.model.eval()
        with measured(trainer.args.device) as meter:
            began = time.perf_counter()
            inputs = trainer._prepare_inputs(dict(self._held_out))
            with trainer.compute_loss_context_manager():
                trainer.compute_loss(self.model, inputs).item()
            seconds = time.perf_counter() - began
        return meter.peak(), seconds


def _ends(model: Any, depth: int) -> tuple[Any, Any]:
    """Return the top and the bottom layer; None where they cannot be told."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    stacks = [
        module
        for module in base.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    ]
    if not stacks:
        return None, None
    layers = max(stacks, key=lambda one: sum(p.numel() for p in one.parameters()))
    return layers[-1], layers[0]


def _length(row: dict[str, Any]) -> int:
    return max((len(value) for value in row.values() if isinstance(value, list)), default=0)


def _job(spec: JobSpec, workspace: Workspace, limits: Limits) -> Job:
    nothing = Ready(0, 0.0, 0, 0, 0, "", 0, 0, 0, 0)
    return Job(
        job_id=spec.job_id,
        attempt=0,
        inbox=Inbox(_Nobody()),
        checkpoints=Checkpoints(Path(workspace.checkpoints), spec.job_id),
        schedule=Schedule.of(spec.training, limits),
        progress=Progress(),
        parameters=Parameters(),
        limits=limits,
        ready=nothing,
    )
