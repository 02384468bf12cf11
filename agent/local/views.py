"""A job as the local API shows it: the platform's field names, and ours beside them."""

import re
from datetime import UTC, datetime
from typing import Any

import msgspec

from agent.core.ports import Health, JobView, PointView
from protocol.lifecycle import TERMINAL, JobState
from protocol.rest import METRIC_NAMES, STATUS
from protocol.worker import Verified

SERVICE = "FineTune Lab Training Agent"
_FRAME = re.compile(r'^\s*File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)$')


def iso(time: float | None) -> str | None:
    """Return Unix seconds as the platform writes times."""
    return None if time is None else datetime.fromtimestamp(time, UTC).isoformat()


def health(now: Health) -> dict[str, Any]:
    """Return what anybody may see: no name of the agent, nothing of its jobs."""
    return {
        "status": now.status,
        "service": SERVICE,
        "version": now.version,
        "gpu_available": now.gpu_available,
        "gpu_info": now.gpu_info,
        "active_jobs": now.active_jobs,
        "queued_jobs": now.queued_jobs,
        "link": now.link,
        "uptime_seconds": round(now.uptime_seconds, 1),
        "draining": now.draining,
    }


def progress(job: JobView) -> float:
    """Return how far the job is, in percent."""
    if job.state is JobState.COMPLETED:
        return 100.0
    return round(min(100.0, 100.0 * job.step / job.total_steps), 2) if job.total_steps else 0.0


def summary(job: JobView) -> dict[str, Any]:
    """Return a row of the list of jobs."""
    return {
        "job_id": job.job_id,
        "id": job.job_id,
        "name": job.name,
        "status": STATUS[job.state],
        "state": job.state,
        "model_name": job.model_name,
        "dataset_path": job.dataset_path,
        "method": job.method,
        "progress": progress(job),
        "current_step": job.step,
        "current_epoch": job.epoch,
        "total_steps": job.total_steps,
        "total_epochs": job.total_epochs,
        "loss": job.values.get("train_loss"),
        "eval_loss": job.values.get("eval_loss"),
        "best_eval_loss": job.values.get("best_eval_loss"),
        "queue_position": job.queue_position,
        "created_at": iso(job.created_at),
        "started_at": iso(job.started_at),
        "completed_at": iso(job.completed_at),
        "error_message": job.failure.sentence if job.failure else None,
    }


def status(job: JobView) -> dict[str, Any]:
    """Return everything that is known of a job."""
    values = {name: job.values.get(name) for name in METRIC_NAMES if name != "progress"}
    return {
        **values,
        **summary(job),
        "want": job.want,
        "by": job.by,
        "detail": job.detail,
        "phase": job.phase,
        "attempt": job.attempt,
        "job_name": job.name or job.model_name,
        "device": job.device,
        "total_samples": job.train_rows + job.eval_rows,
        "train_samples": job.train_rows,
        "val_samples": job.eval_rows,
        "batch_size": job.batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "eval_perplexity": job.values.get("perplexity"),
        "loss_trend": job.trend or None,
        "remaining_seconds": job.values.get("eta_seconds"),
        "resumed_from_job_id": job.branched_from or None,
        "resume_from_checkpoint": job.resumed_from or None,
        "estimate": msgspec.to_builtins(job.estimate),
        "resume_check": resume_check(job.resume_check),
        "model_path": job.model_path or None,
        "merged_path": job.merged_path or None,
        "weights_hash": job.weights_hash or None,
        "error": job.failure.sentence if job.failure else None,
        "failure": msgspec.to_builtins(job.failure),
        "facts": job.facts,
        "notes": job.notes,
        "results": job.results,
        "samples": job.samples,
        "is_terminal": job.state in TERMINAL,
    }


def resume_check(check: Verified | None) -> dict[str, Any] | None:
    """Return what the replay after a resume found, with one line that says it."""
    if check is None:
        return None
    found = "equal bit for bit" if check.equal else f"they differ by {check.difference:.3g}"
    said = f"steps {check.first} to {check.last} replayed: {found}."
    return {
        "first": check.first,
        "last": check.last,
        "equal": check.equal,
        "difference": check.difference,
        "detail": check.detail,
        "text": f"{said} {check.detail}".strip(),
    }


def point(one: PointView) -> dict[str, Any]:
    """Return a point of the curve, a row of the platform's metrics."""
    return {
        "step": one.step,
        "epoch": one.epoch,
        "timestamp": iso(one.time),
        "attempt": one.attempt,
        "loss_trend": one.trend or None,
        **one.values,
    }


def errors(job: JobView) -> dict[str, Any]:
    """Return why a job failed, in the shape that the platform's page takes."""
    failure = job.failure
    found = []
    if failure is not None:
        found.append(
            {
                "timestamp": iso(job.completed_at),
                "level": "ERROR",
                "phase": job.phase or "training",
                "message": failure.sentence,
                "dedupe_key": failure.reason,
                "count": 1,
            }
        )
    raw = failure.evidence.traceback if failure is not None and failure.evidence is not None else ""
    return {
        "job_id": job.job_id,
        "error_summary": failure.sentence if failure else None,
        "advice": failure.advice if failure else None,
        "errors": found,
        "traceback": _traceback(raw) if raw else None,
        "log_tail": failure.evidence.log_tail if failure and failure.evidence else [],
        "error_count": len(found),
        "unique_error_count": len(found),
    }


def _traceback(raw: str) -> dict[str, Any]:
    lines = raw.rstrip().splitlines()
    frames = []
    for number, line in enumerate(lines):
        match = _FRAME.match(line)
        if match:
            after = lines[number + 1].strip() if number + 1 < len(lines) else ""
            code = "" if _FRAME.match(after) else after
            frames.append({**match.groupdict(), "line": int(match["line"]), "code": code})
    kind, _, message = lines[-1].partition(": ")
    return {"raw": raw, "frames": frames, "exception_type": kind, "exception_message": message}
