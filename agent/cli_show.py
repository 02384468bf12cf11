"""How the command line shows jobs and progress. Builds text; `cli.py` prints it."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from agent.core.ports import JobView, PointView
from agent.local import views
from protocol.lifecycle import JobState

if TYPE_CHECKING:
    from rich.progress import Progress

EXIT_PAUSED = 75
"""`run` was paused; the same command resumes it. (EX_TEMPFAIL of sysexits.)"""
COLUMNS = ("job_id", "state", "progress", "step", "loss", "model")


def line(value: Any) -> str:
    """Return one line of JSON; a value that is not finite is null."""
    return msgspec.json.encode(value).decode()


def pretty(value: Any) -> str:
    """Return JSON for people."""
    return json.dumps(json.loads(msgspec.json.encode(value)), indent=2)


def table(jobs: Sequence[Mapping[str, Any]]) -> str:
    """Return the list of jobs, the columns aligned."""
    if not jobs:
        return "No jobs."
    rows = [COLUMNS, *(_row(job) for job in jobs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(job: Mapping[str, Any]) -> tuple[str, ...]:
    total = job.get("total_steps")
    loss = job.get("loss")
    return (
        str(job.get("job_id") or job.get("id")),
        str(job.get("state") or job.get("status")),
        f"{job.get('progress') or 0:.0f} %",
        f"{job.get('current_step') or 0}/{total}" if total else "-",
        f"{loss:.4f}" if isinstance(loss, float | int) else "-",
        str(job.get("model_name") or "-"),
    )


_SHOWN = [
    "job_id",
    "name",
    "status",
    "state",
    "phase",
    "detail",
    "model_name",
    "dataset_path",
    "method",
    "device",
    "attempt",
    "queue_position",
    "progress",
    "current_step",
    "total_steps",
    "current_epoch",
    "loss",
    "eval_loss",
    "best_eval_loss",
    "learning_rate",
    "tokens_per_second",
    "remaining_seconds",
    "created_at",
    "started_at",
    "completed_at",
    "resumed_from_job_id",
    "resume_from_checkpoint",
    "model_path",
    "merged_path",
    "error",
]


def status(job: Mapping[str, Any]) -> str:
    """Return a job's state, a line for each thing that is known."""
    lines = [
        f"{name.replace('_', ' '):<22} {job[name]}" for name in _SHOWN if job.get(name) not in (None, "")
    ]
    if isinstance(job.get("estimate"), dict):
        lines.append(f"{'estimate':<22} {estimate(job['estimate'])}")
    if isinstance(job.get("resume_check"), dict):
        lines.append(f"{'resume check':<22} {job['resume_check']['text']}")
    failure = job.get("failure")
    if isinstance(failure, dict) and failure.get("advice"):
        lines.append(f"{'advice':<22} {failure['advice']}")
    lines += [
        f"{'note':<22} {note['text'] if isinstance(note, dict) else note}" for note in job.get("notes") or []
    ]
    return "\n".join(lines)


def estimate(said: Mapping[str, Any]) -> str:
    """Return on one line what a job was found to need."""
    parts = [f"{said['device_gb']:.1f} GB on {said['device']}"] if said.get("device_gb") is not None else []
    parts += [f"{said['host_gb']:.1f} GB memory", f"{said['disk_gb']:.1f} GB disk"]
    if said.get("total_seconds") is not None:
        parts.append(f"{said['total_seconds'] / 60:.0f} min")
    return ", ".join(parts) + ("" if said.get("fits", True) else ": does not fit")


def checkpoints(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the list of checkpoints, as an agent or a backend tells it."""
    if not found:
        return "No checkpoint yet."
    lines = []
    for one in found:
        name = one.get("name") or str(one.get("path", "")).replace("\\", "/").rpartition("/")[2]
        size = (one.get("size_bytes") or one.get("size") or 0) / (1 << 20)
        loss = one.get("eval_loss")
        marks = [mark for mark in ("best", "latest", "pinned") if one.get(f"is_{mark}")]
        held_out = f"held out {loss:.4f}" if isinstance(loss, float | int) else ""
        lines.append(
            f"{name:<12} epoch {one['epoch']:<7.2f} {size:8.1f} MB  {held_out:<16} {' '.join(marks)}".rstrip()
        )
    return "\n".join(lines)


def health(agent: Mapping[str, Any]) -> str:
    """Return how the agent, or each agent of a backend, is."""
    if "agents" in agent:
        rows = [
            f"{one.get('agent_id')}  {'online' if one.get('is_online') else 'offline'}  {one.get('hostname') or ''}"
            for one in agent["agents"]
        ]
        return "\n".join(rows) or "No agent has dialled this backend yet."
    link = f"{agent['link']}" + (f": {agent['link_detail']}" if agent.get("link_detail") else "")
    return "\n".join(
        [
            f"agent    {agent['agent_id']}  {agent['version']}",
            f"link     {link}",
            f"jobs     {agent['active_jobs']} active, {agent['queued_jobs']} queued",
            f"gpu      {agent['gpu_info'].get('name') or 'none'}",
            f"backlog  {agent['backlog']}",
        ]
    )


class Told:
    """Turns what `run` tells into lines of JSON: every metric and every state, each once."""

    def __init__(self) -> None:
        self._last: tuple[str, str, str, int] | None = None

    def lines(self, job: JobView, point: PointView | None) -> list[str]:
        """Return what is new."""
        found = []
        now = (str(job.state), job.phase, job.detail, job.attempt)
        if now != self._last:
            self._last = now
            found.append(
                line(
                    {
                        "type": "state",
                        "job_id": job.job_id,
                        "state": job.state,
                        "phase": job.phase,
                        "detail": job.detail,
                        "attempt": job.attempt,
                        "step": job.step,
                        "total_steps": job.total_steps,
                    }
                )
            )
        if point is not None:
            found.append(line({"type": "metric", "job_id": job.job_id, **views.point(point)}))
        return found


def result(job: JobView) -> dict[str, Any]:
    """Return the last line of `run --json`."""
    return {"type": "result", **views.status(job)}


def outcome(job: JobView) -> str:
    """Say in a sentence how a job of `run` ended, and where its model lies."""
    match job.state:
        case JobState.COMPLETED:
            loss = job.results.get("final_eval_loss", job.results.get("final_loss"))
            return (
                f"Done after {job.step} steps"
                + (f", loss {loss:.4f}" if loss is not None else "")
                + f": {job.model_path}"
            )
        case JobState.FAILED:
            failure = job.failure
            return f"{failure.sentence} {failure.advice}".strip() if failure else "The job failed."
        case JobState.PAUSED:
            return f"Paused at step {job.step}; the same command goes on from there."
        case _:
            return f"The job is {job.state}."


def bar(*, to_stderr: bool, quiet: bool = False) -> "Progress":
    """Return a progress bar with step, loss and time left."""
    # Rich takes longer to import than most commands run.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=to_stderr)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
        console=console,
        # Where nobody sees it move, `Tenths` speaks in its place.
        disable=quiet or not console.is_terminal,
    )


class Tenths:
    """A line for each state and each tenth of the way, for output that is no terminal."""

    def __init__(self) -> None:
        self._last: tuple[str, int] | None = None

    def line(self, state: str, step: int, total: int | None, figures: str) -> str | None:
        """Return the line, if there is something new to say."""
        now = (state, 10 * step // total if total else 0)
        if now == self._last:
            return None
        self._last = now
        return f"{state}  {step}/{total}  {figures}".rstrip() if total else state


def figures(values: Mapping[str, Any]) -> str:
    """Return loss and time left for the bar."""
    parts: list[str] = []
    for name, text in (("train_loss", "loss"), ("loss", "loss"), ("eval_loss", "held out")):
        value = values.get(name)
        if isinstance(value, float | int) and not any(part.startswith(text + " ") for part in parts):
            parts.append(f"{text} {value:.4f}")
    left = values.get("eta_seconds") or values.get("remaining_seconds")
    if isinstance(left, float | int) and left > 0:
        minutes, seconds = divmod(round(left), 60)
        parts.append(f"{minutes}:{seconds:02} left")
    return "  ".join(parts)
