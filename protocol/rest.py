"""The REST side: paths, bodies, headers and status words, as on the hosted platform.

The bodies are what the platform's routes take and answer; `hub` serves the same routes.
Headers of ours make appends idempotent: a server that knows them answers with its position.
"""

from typing import Any, Literal

import msgspec

from protocol.lifecycle import JobState

JOBS = "/api/training/local/jobs"
METRICS = "/api/training/local/metrics"
PREDICTIONS = "/api/training/local/predictions"
PREDICTIONS_OF = "/api/training/predictions/{job_id}"
AGENTS = "/api/training/agents"
POLL = "/api/training/agent/poll"
CLAIM = "/api/training/agent/claim/{job_id}"
RECORDS = "/api/training/agent/records"
"""Appends of the agent's own stream, which belongs to no job: with the API key."""
DATASET = "/api/training/local/{job_id}/dataset"
UPLOAD = "/api/training/dataset"
JOB = "/api/training/local/{job_id}"
"""Followed by /status, /metrics, /logs, /control, /update-params, /branch, /dataset."""

HEADER_AGENT = "X-Agent-ID"
HEADER_STREAM = "X-Stream"
"""`<epoch>/<lane>` of the records in an append."""
HEADER_RANGE = "X-Range"
"""`<lo>-<hi>`: their numbers. The answer carries the position that is durable as `ack`."""
HEADER_TOMB = "X-Tomb"
"""With an empty array: the records of the range are gone, and why. In place of a TOMB frame."""

PlatformStatus = Literal["queued", "pending", "running", "paused", "completed", "failed", "cancelled"]

STATUS: dict[JobState, PlatformStatus] = {
    JobState.QUEUED: "queued",
    JobState.PREPARING: "running",
    JobState.RUNNING: "running",
    JobState.PAUSING: "running",
    JobState.PAUSED: "paused",
    JobState.CANCELLING: "running",
    JobState.FINISHING: "running",
    JobState.COMPLETED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}
"""Our states in the platform's words. A job that no agent has taken is `pending` there."""

METRIC_NAMES = (
    "train_loss",
    "eval_loss",
    "train_perplexity",
    "perplexity",
    "learning_rate",
    "grad_norm",
    "samples_per_second",
    "tokens_per_second",
    "gpu_memory_allocated_gb",
    "gpu_memory_reserved_gb",
    "gpu_utilization_percent",
    "progress",
    "eta_seconds",
    "elapsed_seconds",
    "tokens_seen",
    "best_eval_loss",
    "best_step",
    "best_epoch",
    "epochs_without_improvement",
)
"""Values of a point; `perplexity` is that of the evaluation."""

TRENDS = ("improving", "degrading", "stable", "insufficient_data")


class SubmitJob(msgspec.Struct, kw_only=True):
    """`POST /api/training/local/jobs`: unknown keys are passed over, as the platform does."""

    job_id: str | None = None
    config: dict[str, Any] | None = None
    dataset_path: str = ""
    status: str = "pending"
    model_name: str = ""
    name: str = ""


class Control(msgspec.Struct, kw_only=True):
    """`POST .../control`."""

    action: Literal["pause", "resume", "cancel", "stop", "retry"]
    checkpoint_path: str = ""
    accept_changes: bool = False
    """With `resume` and `retry`: go on from the checkpoint although data or settings have changed since."""


class Branch(msgspec.Struct, kw_only=True):
    """`POST .../branch`: a new job that begins with a checkpoint of this one."""

    checkpoint: str = ""
    """Its name, "best", or empty for the newest good one."""
    config_adjustments: dict[str, Any] = {}
    """Laid over this job's config: an object over an object key by key, anything else in place."""
    config: dict[str, Any] | None = None
    """The whole config of the new job, in place of adjustments."""
    job_id: str | None = None
    name: str = ""


class Execute(msgspec.Struct, kw_only=True):
    """`POST /api/training/execute` on the agent's own port."""

    config: dict[str, Any]
    dataset_path: str = ""
    execution_id: str = ""
    name: str = ""
    user_id: str = ""
    access_token: str = ""
    job_token: str = ""
    dataset_content: str | None = None
