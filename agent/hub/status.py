"""Statuses in the platform's words, both ways."""

from typing import Any

import msgspec

from agent.hub.errors import Refusal
from agent.hub.model import Job
from agent.hub.points import count, iso
from agent.hub.store import Db
from agent.hub.tables import save_job
from protocol.lifecycle import TERMINAL, TRANSITIONS, JobState
from protocol.rest import STATUS

SETTABLE = ("running", "completed", "failed", "cancelled", "paused")


def _reachable(job: Job) -> set[str]:
    """Return the platform's statuses that a job can come to next, by the one table of states.

    One word covers several states there. The way through the queue is passed over, since nobody sets that status.
    """
    if job.state in TERMINAL:
        return set()
    here = {state for state in JobState if STATUS[state] == STATUS[job.state]}
    onward = {after for (before, _), after in TRANSITIONS.items() if before in here}
    if JobState.QUEUED in onward:
        onward |= {after for (before, _), after in TRANSITIONS.items() if before is JobState.QUEUED}
    return {STATUS[state] for state in onward}


def set_status(db: Db, job: Job, status: Any, error: Any, now: float) -> Job:
    """Move a job to a status of the platform. The same one again changes nothing; an illegal move is a 409."""
    if status not in SETTABLE:
        raise Refusal(400, f"Invalid status. Must be one of: {', '.join(SETTABLE)}")
    if error is not None and not isinstance(error, str):
        raise Refusal(400, "error: expected a string.")
    if status != job.status:
        if status not in _reachable(job):
            if job.state in TERMINAL:
                raise Refusal(
                    409, f"The job is {job.status}; that is its end, and it cannot become {status}."
                )
            raise Refusal(409, f"The job is {job.status}; it cannot become {status} from there.")
        job.taken = True
        job.state = JobState(status)
        if status == "running" and job.started_at is None:
            job.started_at = now
        if job.state in TERMINAL:
            job.completed_at = now
    if status == "failed" and error:
        job.error = error[:65_536]
    job.updated_at = now
    save_job(db, job)
    return job


def started(job: Job, now: float) -> None:
    """A point came by REST for a job that nobody said was running."""
    job.taken = True
    if job.state in (JobState.QUEUED, JobState.PREPARING):
        job.state = JobState.RUNNING
        job.started_at = job.started_at or now


def progress(job: Job) -> int:
    """Return whole percents."""
    if job.state is JobState.COMPLETED:
        return 100
    if job.total_steps:
        return max(0, min(100, int(100 * job.step / job.total_steps)))
    return max(0, min(100, int(job.figures.get("progress") or 0)))


def view(job: Job, now: float, offline_since: float | None = None) -> dict[str, Any]:
    """Return `GET /api/training/local/{id}/status`: the platform's fields and ours."""
    figures = job.figures
    running = job.status == "running"
    eta = figures.get("eta_seconds")
    ended = job.completed_at if job.completed_at is not None else now
    elapsed = ended - job.started_at if job.started_at is not None else None
    config = msgspec.json.decode(job.config)
    warning = None
    if offline_since is not None and job.live:
        warning = f"The agent {job.agent_id} has been offline since {iso(offline_since)}."
    return {
        "job_id": job.id,
        "status": job.status,
        "model_name": job.model_name,
        "model_display_name": job.model_name,
        "job_name": job.name or job.model_name or job.id,
        "dataset_name": job.dataset.name if job.dataset else job.dataset_path.rsplit("/", 1)[-1],
        "dataset_path": job.dataset_path,
        "gpu_total_memory_gb": _gpu_memory(config) or figures.get("gpu_memory_reserved_gb"),
        "current_step": job.step,
        "current_epoch": job.epoch,
        "total_steps": job.total_steps,
        "total_epochs": job.total_epochs,
        "total_samples": job.total_samples,
        "train_samples": job.train_samples,
        "val_samples": job.val_samples,
        "batch_size": job.batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "max_learning_rate": job.max_learning_rate,
        "progress": progress(job),
        "loss": figures.get("train_loss"),
        "eval_loss": figures.get("eval_loss"),
        "best_eval_loss": figures.get("best_eval_loss"),
        "best_epoch": figures.get("best_epoch"),
        "best_step": count(figures.get("best_step")),
        "best_checkpoint_path": job.best_checkpoint_path or None,
        "loss_trend": job.trend or None,
        "epochs_without_improvement": count(figures.get("epochs_without_improvement")),
        "final_loss": job.results.get("final_loss"),
        "final_eval_loss": job.results.get("final_eval_loss"),
        "train_perplexity": figures.get("train_perplexity"),
        "eval_perplexity": figures.get("perplexity"),
        "learning_rate": figures.get("learning_rate"),
        "grad_norm": figures.get("grad_norm"),
        "gpu_memory_allocated_gb": figures.get("gpu_memory_allocated_gb"),
        "gpu_memory_reserved_gb": figures.get("gpu_memory_reserved_gb"),
        "gpu_utilization_percent": figures.get("gpu_utilization_percent"),
        "samples_per_second": figures.get("samples_per_second"),
        "tokens_per_second": figures.get("tokens_per_second"),
        "started_at": iso(job.started_at),
        "completed_at": iso(job.completed_at),
        "created_at": iso(job.created_at),
        "updated_at": iso(job.updated_at),
        "elapsed_seconds": round(elapsed, 3) if elapsed is not None else None,
        "remaining_seconds": eta if running else 0 if not job.live else None,
        "error": job.error or None,
        "warning": warning,
        "resumed_from_job_id": job.branched_from or None,
        "resume_from_checkpoint": job.resumed_from or None,
        # Ours.
        "state": job.state.value,
        "attempt": job.attempt,
        "agent_id": job.agent_id,
        "want": job.want.value,
        "desired_version": job.version,
        "observed_version": job.observed,
        "by": job.by,
        "detail": job.detail,
        "phase": job.phase,
        "method": job.method,
        "device": job.device,
        "facts": job.facts,
        "figures": figures,
        "failure": job.failure,
        "estimate": job.estimate,
        "resume_check": job.resume_check,
        "parameters": job.parameters,
        "applied_parameters": job.applied,
        "model_path": job.model_path or None,
        "merged_path": job.merged_path or None,
        "weights_hash": job.weights_hash or None,
        "results": job.results,
        "samples": job.samples,
        "notes": [{"time": iso(note.time), "level": note.level, "text": note.text} for note in job.notes],
        "total_log_lines": job.log_lines,
    }


def brief(job: Job) -> dict[str, Any]:
    """Return a row of `GET /api/training/local/jobs`."""
    return {
        "id": job.id,
        "model_name": job.model_name,
        "job_name": job.name or job.model_name,
        "dataset_path": job.dataset_path,
        "status": job.status,
        "state": job.state.value,
        "agent_id": job.agent_id,
        "progress": progress(job),
        "current_step": job.step,
        "current_epoch": job.epoch,
        "total_steps": job.total_steps,
        "total_epochs": job.total_epochs,
        "loss": job.figures.get("train_loss"),
        "eval_loss": job.figures.get("eval_loss"),
        "best_eval_loss": job.figures.get("best_eval_loss"),
        "started_at": iso(job.started_at),
        "completed_at": iso(job.completed_at),
        "created_at": iso(job.created_at),
        "error_message": job.error or None,
    }


def _gpu_memory(config: Any) -> Any:
    for path in (
        ("hardware", "gpu", "memory_gb"),
        ("system", "gpu", "memory_gb"),
        ("training", "gpu_memory_gb"),
    ):
        value = config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None
