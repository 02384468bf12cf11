"""Why a trainer failed or ended, with what was seen at the time and advice in this job's own figures."""

from collections.abc import Mapping
from typing import Any

import msgspec

from agent.core import xid
from agent.core.control import parsed
from agent.core.job import Job
from protocol.failures import ADVICE, Evidence, Failure, FailureReason, failure
from protocol.jobspec import BadSpec, JobSpec
from protocol.trainingconfig import job_spec

GB = 1 << 30
MB = 1 << 20
SIGKILL = 9
UNKNOWN_NEED = 256 * MB
"""Free disk that is waited for where neither the trainer nor an older checkpoint says how much is needed."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent saw of the machine when a trainer failed or ended. Sizes in bytes."""

    log_tail: list[str] = []
    traceback: str = ""
    """Of every thread of a trainer that stood still."""
    host_free: int | None = None
    host_total: int | None = None
    trainer: int | None = None
    """What the trainer and its children held when they were last looked at."""
    device_free: int | None = None
    oom_killed: bool = False
    """The kernel ended a process for lack of memory in these moments."""
    xids: list[int] = []
    """Critical errors of the job's device in these moments, the newest last."""
    disk_free: int = 0
    stalled: str = ""
    """Why the agent ended the trainer itself: it stood still."""


def verdict(
    job: Job, sentence: str, signal: int | None, forced: bool, seen: Seen
) -> tuple[FailureReason, str]:
    """Return what a trainer that ended without a word died of, and a sentence that says so."""
    if seen.stalled:
        return FailureReason.STALLED, seen.stalled
    causes = [number for number in seen.xids if number not in xid.CONSEQUENCES]
    if causes:
        return FailureReason.DRIVER, f"{_of_xid(causes[-1])} {sentence}"
    if signal is None or forced:
        return FailureReason.LOST, sentence
    if signal == SIGKILL and seen.oom_killed:
        return FailureReason.HOST_MEMORY, (
            f"The machine was out of memory and its kernel ended the trainer{_holding(seen)}."
        )
    return FailureReason.SIGNAL, sentence


def is_final(reason: FailureReason, seen: Seen) -> bool:
    """Tell whether another attempt is pointless: the device needs somebody's hands first."""
    return reason is FailureReason.DRIVER and not all(xid.explain(number).passing for number in seen.xids)


def enriched(job: Job, told: Failure, seen: Seen) -> Failure:
    """Return a failure with what was seen, and with this job's figures where its advice is the general one."""
    reason, sentence = told.reason, told.sentence
    causes = [number for number in seen.xids if number not in xid.CONSEQUENCES]
    if causes and reason in (FailureReason.INTERNAL, FailureReason.DRIVER, FailureReason.LOST):
        reason = FailureReason.DRIVER
        if "XID" not in sentence:
            sentence = f"{_of_xid(causes[-1])} {sentence}"
    evidence = _evidence(told.evidence or Evidence(), job, seen)
    general = not told.advice or told.advice == ADVICE[told.reason]
    advice = _advice(job, reason, evidence, seen) if general or reason is not told.reason else told.advice
    return failure(reason, sentence, evidence, advice)


def room_needed(job: Job, need: int, free: int) -> int:
    """Return how many bytes must be free before a job that left for a full disk goes on by itself."""
    need = need or job.saved_bytes or UNKNOWN_NEED
    tried = job.full_step == job.saved_step
    # There is as much already, since what was half written is deleted; and it did not suffice the last time.
    return free + need if tried and need <= free else need


def no_room(room: int, free: int, where: str) -> str:
    """Return the sentence for a job that waits for room on a disk."""
    said = f"The disk is full: {free / MB:.0f} MB are free under {where} and {room / MB:.0f} MB are needed."
    return f"{said} {waits(room)}"


def waits(room: int) -> str:
    """Return the sentence on who ends a wait for room."""
    return f"The job goes on by itself when {room / MB:.0f} MB are free; resume it to try at once."


def _of_xid(number: int) -> str:
    return f"The driver reported XID {number} of the job's device: {xid.explain(number).meaning}."


def _holding(seen: Seen) -> str:
    parts = []
    if seen.trainer is not None:
        parts.append(f"which held {seen.trainer / GB:.1f} GB")
    if seen.host_free is not None and seen.host_total is not None:
        parts.append(
            f"{seen.host_free / GB:.1f} of {seen.host_total / GB:.1f} GB were free just before or after"
        )
    return f" ({'; '.join(parts)})" if parts else ""


def _evidence(given: Evidence, job: Job, seen: Seen) -> Evidence:
    def gb(size: int | None) -> float | None:
        return None if size is None else round(size / GB, 3)

    def first(*values: float | None) -> float | None:
        return next((value for value in values if value is not None), None)

    return msgspec.structs.replace(
        given,
        traceback=given.traceback or seen.traceback,
        log_tail=given.log_tail or seen.log_tail,
        step=job.step if given.step is None else given.step,
        host_memory_gb=first(given.host_memory_gb, gb(seen.trainer)),
        device_memory_gb=first(given.device_memory_gb, job.values.get("gpu_memory_reserved_gb")),
        host_free_gb=first(given.host_free_gb, gb(seen.host_free)),
        device_free_gb=first(given.device_free_gb, gb(seen.device_free)),
        exits=given.exits or job.exits,
        xid=seen.xids[-1] if given.xid is None and seen.xids else given.xid,
    )


def _spec(job: Job) -> JobSpec | None:
    try:
        return job_spec(job.job_id, parsed(job.config), job.dataset_path, job.name)
    except BadSpec:  # refused by a newer or older agent than the one that took it
        return None


def _advice(job: Job, reason: FailureReason, evidence: Evidence, seen: Seen) -> str:
    """Return advice whose figures come from this job; "" where there is nothing to add to the general one."""
    spec = _spec(job)
    match reason:
        case FailureReason.DEVICE_MEMORY if job.estimate is not None and job.estimate.advice:
            return " ".join(job.estimate.advice)
        case FailureReason.DEVICE_MEMORY if spec is not None:
            return _less_device_memory(job, spec)
        case FailureReason.HOST_MEMORY:
            return _less_host_memory(job, spec, evidence)
        case FailureReason.NON_FINITE_LOSS if spec is not None:
            return _calmer(job, spec, evidence)
        case FailureReason.DRIVER if seen.xids:
            return xid.explain(seen.xids[-1]).advice
        case FailureReason.SIGNAL | FailureReason.LOST if evidence.log_tail or evidence.exits:
            times = len(evidence.exits)
            count = f"{times} trainers ended so. " if times > 1 else ""
            return f"{count}{ADVICE[reason]} The last checkpoint, at step {job.saved_step}, is good: retry goes on from it."
        case _:
            return ""


def _less_device_memory(job: Job, spec: JobSpec) -> str:
    training, parts = spec.training, job.estimate.parts if job.estimate is not None else {}
    said = []
    batch = job.batch_size or training.batch_size
    if batch > 1:
        said.append(
            f"training.batch_size is {batch}: 1 needs {_share(parts, 'activations', 1 - 1 / batch)}less"
        )
    if training.max_length > 64:
        half = training.max_length // 2
        said.append(
            f"training.max_length is {training.max_length}: {half} needs {_share(parts, 'activations', 0.5)}less"
        )
    if not training.gradient_checkpointing:
        said.append(
            "training.gradient_checkpointing is off: turning it on keeps one layer's activations at a time"
        )
    if spec.model.quantization is None and spec.lora is not None:
        said.append(f"the weights are not quantised: 4 bits (nf4) need {_share(parts, 'weights', 0.7)}less")
    if spec.lora is None:
        said.append("all weights are trained: a LoRA adapter has no optimizer state for them")
    return f"In this job {'; '.join(said)}." if said else ""


def _share(parts: dict[str, float], name: str, share: float) -> str:
    return f"about {parts[name] * share:.1f} GB " if parts.get(name) else ""


def _less_host_memory(job: Job, spec: JobSpec | None, evidence: Evidence) -> str:
    said = []
    if evidence.host_memory_gb is not None:
        free = "" if evidence.host_free_gb is None else f", and {evidence.host_free_gb:.1f} GB were free"
        said.append(f"The trainer held {evidence.host_memory_gb:.1f} GB{free}.")
    if spec is not None and spec.training.dataloader_num_workers:
        workers = spec.training.dataloader_num_workers
        said.append(
            f"training.dataloader_num_workers is {workers}: each is a copy of the loader; 0 has none."
        )
    if spec is not None and not spec.data.streaming and job.train_rows:
        said.append(f"All {job.train_rows} rows are kept in tables: data.streaming keeps none.")
    if job.device == "cpu" and job.estimate is not None:
        said += job.estimate.advice[:3]
    said.append("Close other programs, or give the machine or the container more memory.")
    return " ".join(said)


def _calmer(job: Job, spec: JobSpec, evidence: Evidence) -> str:
    now = job.values.get("learning_rate")
    rate = now or job.parameters.learning_rate or spec.training.learning_rate
    said = [f"The learning rate was {rate:.3g} at step {evidence.step}: try {rate / 2:.2g}."]
    norm = job.values.get("grad_norm")
    if norm is not None:
        said.append(
            f"The last gradient norm was {norm:.3g}, and it is clipped at {spec.training.max_grad_norm:g}."
        )
    if evidence.rows:
        rows = ", ".join(str(row) for row in evidence.rows[:8])
        said.append(f"Look at rows {rows}{', ...' if len(evidence.rows) > 8 else ''} of the data set.")
    if spec.training.fp16:
        said.append("float16 overflows at 65504: bfloat16 does not.")
    if spec.training.on_bad_loss == "fail":
        said.append(
            'With training.on_bad_loss "rewind" the job goes back to its last checkpoint and skips them.'
        )
    return " ".join(said)


def without_effect(config: Mapping[str, Any]) -> str:
    """Return a sentence on what a good ``config`` asks for and this agent does not do, "" where it does all."""
    training = config.get("training") or {}
    asked = {
        "predictions": config.get("predictions"),
        "tensorboard": config.get("tensorboard"),
        "training.distributed": training.get("distributed"),
        "training.checkpoint_resume": training.get("checkpoint_resume") or config.get("checkpoint_resume"),
    }
    names = [path for path, part in asked.items() if isinstance(part, Mapping) and _is_on(part)]
    if training.get("use_streaming") and not training.get("max_steps"):
        names.append(
            "training.use_streaming (training.max_steps must say when to end, so the rows are a table)"
        )
    return f"Asked for in the job's config, and not done by this agent: {', '.join(names)}." if names else ""


def _is_on(part: Mapping[str, Any]) -> bool:
    gpus = part.get("num_gpus")
    return bool(part.get("enabled")) or (isinstance(gpus, int) and gpus > 1)
