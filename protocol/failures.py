"""The closed list of why a job ends badly, each with its advice."""

from enum import StrEnum

import msgspec


class FailureReason(StrEnum):
    """Why a job failed. A backend may rely on the words; they are only ever added to."""

    DEVICE_MEMORY = "device_memory"
    HOST_MEMORY = "host_memory"
    DISK_FULL = "disk_full"
    NON_FINITE_LOSS = "non_finite_loss"
    DATA = "data"
    MODEL = "model"
    TEMPLATE = "template"
    SPEC = "spec"
    PERMISSION = "permission"
    CHECKPOINT = "checkpoint"
    DRIVER = "driver"
    SIGNAL = "signal"
    LOST = "lost"
    STALLED = "stalled"
    INTERNAL = "internal"


ADVICE: dict[FailureReason, str] = {
    FailureReason.DEVICE_MEMORY: "Lower the micro-batch or the sequence length, use 4-bit quantisation, or turn gradient checkpointing on.",
    FailureReason.HOST_MEMORY: "Close other programs, lower dataloader_num_workers, or stream the data set.",
    FailureReason.DISK_FULL: "Free space on the disk that holds CHECKPOINTS_DIR and MODELS_DIR, then resume the job.",
    FailureReason.NON_FINITE_LOSS: "Lower the learning rate or max_grad_norm, and look at the rows of that step.",
    FailureReason.DATA: "Mend the data set where the message says, then retry the job.",
    FailureReason.MODEL: "Check the model's name or folder, and that its weights are safetensors.",
    FailureReason.TEMPLATE: "Give the tokenizer a chat template, or choose a data format that needs none.",
    FailureReason.SPEC: "Correct the setting that the message names and submit the job again.",
    FailureReason.PERMISSION: "Allow it where the message says (the agent's settings, or the rights of that folder and of its disk), then retry the job.",
    FailureReason.CHECKPOINT: "Resume from an older checkpoint, or start the job again.",
    FailureReason.DRIVER: "Look at the driver's log; a reset of the device or of the machine is often needed.",
    FailureReason.SIGNAL: "Something outside the agent ended the trainer; see the machine's own log.",
    FailureReason.LOST: "The trainer ended without a word three times; see the end of its log.",
    FailureReason.STALLED: "No step ended in many times the usual while; see the end of its log.",
    FailureReason.INTERNAL: "This is a defect of the agent. Please report it with the job's log.",
}


class Evidence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was seen when a job failed; every field may be empty."""

    traceback: str = ""
    log_tail: list[str] = []
    exit_code: int | None = None
    step: int | None = None
    rows: list[int] = []
    device_memory_gb: float | None = None
    """The trainer's peak, in GB of 2**30 bytes."""
    host_memory_gb: float | None = None
    """The trainer's peak of resident memory."""
    device_free_gb: float | None = None
    """What was free at the time."""
    host_free_gb: float | None = None
    exits: list[str] = []
    """How each trainer that was lost ended, the last one last."""
    xid: int | None = None
    """The newest critical error (XID) that the driver reported of the job's device."""


class Failure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a job failed: ``sentence`` says what, where and what to do."""

    reason: FailureReason
    sentence: str
    advice: str = ""
    evidence: Evidence | None = None


def failure(
    reason: FailureReason, sentence: str, evidence: Evidence | None = None, advice: str = ""
) -> Failure:
    """Return a failure with ``advice``, or with that which belongs to its reason where there is none."""
    return Failure(reason=reason, sentence=sentence, advice=advice or ADVICE[reason], evidence=evidence)
