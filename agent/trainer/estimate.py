"""What a job will need of memory, disk and time, before its first step.

Two kinds: by formula, in milliseconds, at the start of every job; and by a short probe (`agent.trainer.probe`),
when the owner asks with `training-agent check`.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from agent.trainer import formula, memory, meter
from agent.trainer.disk import free_bytes
from agent.trainer.formula import GB, Rows, Situation, Step
from agent.trainer.model import Precision, choose_precision
from agent.trainer.sizes import Sizes, planned
from protocol.jobspec import JobSpec
from protocol.worker import Estimate, Limits, Workspace

if TYPE_CHECKING:
    from agent.trainer.probe import Probed

FRESH = 64 << 20
"""Bytes of code and tables that the first step brings into memory beyond the imports (measured)."""
FEWEST_HOLES = 0.6
"""Resident bytes that are lost for each byte that the layers keep, at least (glibc, measured)."""
NEAR = 0.7
"""Share of what is free beyond which advice is given before the start."""
WRITES = 300e6
"""Bytes a second that a disk is taken to write."""
_MARGIN, _SHARE = 512 << 20, 0.1
"""Host memory that a background save leaves free (`agent.trainer.snapshot`)."""


def estimate(
    spec: JobSpec,
    workspace: Workspace,
    limits: Limits,
    *,
    config: Any,
    precision: Precision,
    sizes: Sizes,
    rows: Rows,
    baseline: int,
    probed: "Probed | None" = None,
) -> Estimate:
    """Return what the job needs. ``baseline``: bytes of the process with its imports and without a model."""
    on_cuda = torch.cuda.is_available()
    at = Situation(spec, config, precision, rows, on_cuda, sizes)
    step = formula.step(at)
    scale = 1.0
    weights, optimizer = float(sizes.weights + sizes.reference), float(sizes.optimizer)
    mapped = _still_mapped(at, workspace)
    if probed is not None:
        measured = _measured(probed, at, mapped)
        scale = measured.peak / max(1.0, step.peak)
        step = measured
        weights, optimizer = max(probed.weights, weights), probed.optimizer
    else:
        step = replace(step, lost=step.lost + mapped)
        baseline += FRESH
    parts = _parts(step, weights, optimizer, at)
    host, device = _peaks(parts, at, workspace, baseline)
    free_host = meter.free_host() + meter.resident_now()
    buffer = _save_buffer(spec, limits, rows, sizes, free_host - host)
    if buffer:
        parts["background save"] = buffer
        host += buffer
    if spec.output.merge_adapter and spec.lora is not None:
        host = max(host, baseline + 2.0 * sizes.parameters + _on_disk(workspace, sizes, precision))
    free_device = memory.free_device()
    disk = _disk(spec, limits, rows, sizes)
    free_disk = free_bytes(Path(workspace.checkpoints))
    fits = host <= free_host and disk <= free_disk
    near = host > NEAR * free_host
    if device is not None and free_device is not None:
        fits = fits and device <= free_device
        near = near or device > NEAR * free_device
    told = formula.advice(at, scale=scale) if probed is not None or near else []
    seconds = _seconds(spec, limits, rows, sizes, probed) if probed is not None else (None, None)
    parts["program"] = float(baseline)
    return Estimate(
        device=_name(on_cuda),
        device_gb=None if device is None else device / GB,
        host_gb=host / GB,
        disk_gb=disk / GB,
        free_device_gb=None if free_device is None else free_device / GB,
        free_host_gb=free_host / GB,
        free_disk_gb=free_disk / GB,
        step_seconds=seconds[0],
        total_seconds=seconds[1],
        total_steps=rows.steps,
        parts={name: size / GB for name, size in parts.items() if size > 0},
        advice=told,
        fits=fits,
    )


def advice_for(spec: JobSpec, limits: Limits, config: Any, longest: int | None = None) -> list[str]:
    """Return what would save memory and how much, by formula: for a job that has run out of it.

    ``config`` is the model's; ``longest`` the tokens of its longest row, where they are known.
    """
    precision = choose_precision(spec, limits, _silent)
    length = min(longest or spec.training.max_length, spec.training.max_length)
    rows = Rows(0, int(spec.training.eval_strategy != "no"), length, float(length), 0)
    sizes = planned(spec, precision, config)
    return formula.advice(Situation(spec, config, precision, rows, torch.cuda.is_available(), sizes))


def _measured(probed: "Probed", at: Situation, mapped: float) -> Step:
    """Return a step as it was probed. ``mapped``: bytes of files that stay in memory beside what was made of them."""
    lost = probed.lost
    if probed.layered and not at.on_cuda and not at.spec.training.gradient_checkpointing:
        # What is lost in holes is told apart from noise by what layers keep: by a little more than half, up to all.
        least, most = FEWEST_HOLES * probed.layered, probed.layered
        if at.spec.lora is None:
            most += 0.1 * (probed.trained + probed.optimizer)
        lost = min(max(lost - mapped, least), most) + mapped
    elif not at.on_cuda and at.spec.training.gradient_checkpointing:
        # Of layers that are computed again a shallow probe tells too little or, extended, too much.
        least = formula.step(at).lost
        lost = min(max(lost - mapped, least), 1.25 * least) + mapped
    return Step(
        saved=max(probed.saved, probed.saved_again),
        head=0.0,
        spread=probed.spread,
        update=probed.update,
        evaluate=probed.evaluate,
        lost=lost,
    )


def _still_mapped(at: Situation, workspace: Workspace) -> float:
    """Return the bytes of quantised layers' own files on a CPU: the embeddings keep the file in memory."""
    if at.spec.model.quantization is None or at.on_cuda:
        return 0.0
    text, wide = at.config.get_text_config(), at.precision.weights.itemsize
    on_disk = _on_disk(workspace, at.sizes, at.precision)
    tables = 1 if getattr(at.config, "tie_word_embeddings", False) else 2
    base = float(at.sizes.parameters - at.sizes.trainable)
    if not 0.8 < on_disk / (base * wide) < 1.2:
        return 0.0  # held in another precision than in the file, which is let go of
    return float(max(0.0, on_disk - tables * int(text.vocab_size) * int(text.hidden_size) * wide))


def _parts(step: Step, weights: float, optimizer: float, at: Situation) -> dict[str, float]:
    """Return what the peak is made of, by the part of a step in which it comes."""
    gradients = float(at.sizes.trained)
    parts = {"weights": weights, "optimizer": optimizer}
    most = max(step.saved, step.spread, step.update, step.evaluate)
    if most == step.saved:
        held = gradients if at.spec.training.gradient_accumulation_steps > 1 else 0.0
        parts |= {"gradients": held, "activations": most - held - step.head, "head": step.head}
    elif most == step.evaluate:
        parts["evaluation"] = most
    else:
        parts |= {"gradients": gradients, "in the step": most - gradients}
    parts["allocator"] = step.lost
    return parts


def _peaks(
    parts: dict[str, float], at: Situation, workspace: Workspace, baseline: int
) -> tuple[float, float | None]:
    """Return the peaks of host and device."""
    on_disk = _on_disk(workspace, at.sizes, at.precision)
    # A file that is read into another form lies in memory beside what is made of it.
    same = at.spec.model.quantization is None and abs(on_disk - at.sizes.weights) < 0.2 * at.sizes.weights
    loading = at.sizes.weights + (0.0 if same else on_disk)
    if not at.on_cuda:
        return baseline + max(loading, sum(parts.values())), None
    paged = parts["optimizer"] if at.sizes.optimizer_on_host else 0.0
    return baseline + max(on_disk, paged), sum(parts.values()) - paged


def _on_disk(workspace: Workspace, sizes: Sizes, precision: Precision) -> float:
    files = list(Path(workspace.model).glob("*.safetensors")) if Path(workspace.model).is_dir() else []
    return float(sum(path.stat().st_size for path in files)) or 2.0 * sizes.parameters


def _save_buffer(spec: JobSpec, limits: Limits, rows: Rows, sizes: Sizes, left: float) -> float:
    """Return the host memory of background saves: a copy of what is saved, kept from the first one on."""
    if not limits.background_saves or not _saves(spec, limits, rows):
        return 0.0
    fits = left - sizes.checkpoint > max(_MARGIN, _SHARE * meter.total_host())
    return float(sizes.checkpoint) if fits else 0.0


def _saves(spec: JobSpec, limits: Limits, rows: Rows) -> int:
    """Return how many checkpoints are written with training still to go on."""
    every = spec.training.save_steps or limits.save_steps
    best = _evaluations(spec, rows) if spec.training.eval_strategy != "no" and rows.held_out else 0
    return max(0, (rows.steps - 1) // every) + max(0, best - 1)


def _evaluations(spec: JobSpec, rows: Rows) -> int:
    if not rows.held_out or not rows.steps:
        return 0
    if spec.training.eval_strategy == "steps":
        return 1 + math.ceil(rows.steps / spec.training.eval_steps)
    return 1 + (math.ceil(spec.training.epochs) if spec.training.eval_strategy == "epoch" else 1)


def _disk(spec: JobSpec, limits: Limits, rows: Rows, sizes: Sizes) -> float:
    """Return the bytes of all checkpoints at their most, and of the final model."""
    kept = spec.training.save_total_limit + 1  # and the one that is being written
    if spec.training.eval_strategy != "no" and rows.held_out:
        kept += 1  # the best
    if rows.steps:
        kept = min(kept, _saves(spec, limits, rows) + 1)
    merged = 2.0 * sizes.parameters if spec.output.merge_adapter and spec.lora is not None else 0.0
    # The final model is staged before it takes an older one's place.
    return kept * sizes.checkpoint + sizes.trained + merged


def total_seconds(
    spec: JobSpec, limits: Limits, rows: Rows, sizes: Sizes, step: float, evaluation: float
) -> float | None:
    """Return the seconds of the whole job, from those of an optimizer step and of an evaluation."""
    if not rows.steps:
        return None
    saving = (_saves(spec, limits, rows) + 1) * sizes.checkpoint / WRITES
    return rows.steps * step + _evaluations(spec, rows) * evaluation + saving


def _seconds(
    spec: JobSpec, limits: Limits, rows: Rows, sizes: Sizes, probed: "Probed"
) -> tuple[float, float | None]:
    """Return the seconds of an optimizer step, and of the whole job, as they were probed."""
    training = spec.training
    # The probe ran the longest rows; most batches are of the usual ones.
    usual = 1.0 if training.packing else min(1.0, 0.3 + 0.7 * rows.mean / max(1, rows.longest))
    step = training.gradient_accumulation_steps * probed.step_seconds * usual + probed.update_seconds
    batches = math.ceil(rows.held_out / (training.eval_batch_size or training.batch_size))
    return step, total_seconds(spec, limits, rows, sizes, step, batches * probed.evaluate_seconds * usual)


def _name(on_cuda: bool) -> str:
    return str(torch.cuda.get_device_name()) if on_cuda else "cpu"


def _silent(level: str, text: str) -> None:
    """Take a note that has been told already."""
