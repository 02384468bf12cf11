"""States and numbers as a person reads them."""

import math
import time

from agent.hub.model import Agent, Job
from protocol.lifecycle import JobState, Want
from protocol.worker import Estimate

_STATES = {
    JobState.QUEUED: "Waiting for its turn",
    JobState.PREPARING: "Preparing",
    JobState.RUNNING: "Training",
    JobState.PAUSING: "Saving, then pausing",
    JobState.PAUSED: "Paused",
    JobState.CANCELLING: "Being cancelled",
    JobState.FINISHING: "Saving the model",
    JobState.COMPLETED: "Complete",
    JobState.FAILED: "Failed",
    JobState.CANCELLED: "Cancelled",
}
COLOURS = {
    "pending": "blue-grey",
    "queued": "blue-grey",
    "preparing": "indigo",
    "running": "primary",
    "pausing": "amber-8",
    "paused": "amber-8",
    "cancelling": "brown",
    "finishing": "teal",
    "completed": "positive",
    "failed": "negative",
    "cancelled": "brown",
}


def state(job: Job) -> str:
    """Say where a job stands."""
    if job.status == "pending":
        return "Waiting for an agent" if job.agent_id is None else "Given to its agent"
    text = _STATES[job.state]
    if job.state is JobState.PREPARING and job.phase:
        text += f": {job.phase}"
    if job.state is JobState.PAUSED and job.by not in ("", "user"):
        text += f" by {job.by}"
    if job.state is JobState.PAUSED and job.want is Want.RUN:
        text += ", asked to go on"
    elif job.state is JobState.RUNNING and job.want is not Want.RUN:
        text += f", asked to {job.want}"
    return text


def colour(job: Job) -> str:
    """Return the Quasar colour of a job's state."""
    return COLOURS["pending" if job.status == "pending" else job.state.value]


def figure(value: float | None, digits: int = 4) -> str:
    """Return a number in few characters; a dash where there is none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def span(seconds: float | None) -> str:
    """Return a length of time."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def estimate(said: Estimate) -> str:
    """Say on one line what a job will need."""
    parts = [f"{said.device_gb:.1f} GB on {said.device}"] if said.device_gb is not None else []
    parts += [f"{said.host_gb:.1f} GB of memory", f"{said.disk_gb:.1f} GB of disk"]
    parts += [span(said.total_seconds)] if said.total_seconds is not None else []
    return f"Needs about {', '.join(parts)}" + ("." if said.fits else ", more than there is.")


def clock(at: float | None) -> str:
    """Return a time of this machine's zone."""
    return "-" if at is None else time.strftime("%d %b %H:%M", time.localtime(at))


def presence(agent: Agent, connected: bool, now: float) -> str:
    """Say whether an agent is there, and if not, why as far as is known."""
    if connected:
        return "Connected"
    if agent.bye:
        until = f" until {clock(agent.bye_until)}" if agent.bye_until > now else ""
        return f"Silent{until}: {agent.bye}"
    if agent.last_poll_at is not None and now - agent.last_poll_at <= 60:
        return "Polling"
    return f"Offline since {clock(max(agent.last_seen, agent.last_poll_at or 0))}"


def hardware(agent: Agent) -> str:
    """Return a line on what the machine has."""
    box = agent.machine
    if box is None:
        return agent.platform or ""
    gpus = ", ".join(f"{gpu.name} {gpu.memory_total_gb:.0f} GB" for gpu in box.gpus) or "no GPU"
    return f"{gpus}; {box.cpu_cores} cores, {box.ram_gb:.0f} GB memory, {box.disk_free_gb:.0f} GB disk free"
