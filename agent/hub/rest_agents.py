"""Agents: their list, and the poll and claim of those that cannot have a socket."""

import re
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from agent.hub.errors import Refusal
from agent.hub.hub import ONLINE_SECONDS, Hub
from agent.hub.jobs import open_commands
from agent.hub.model import Agent, Job
from agent.hub.points import iso
from agent.hub.rest_append import keep, numbered
from agent.hub.store import Db
from agent.hub.tables import (
    find_agent,
    find_job,
    jobs_of,
    list_agents,
    live_jobs_of,
    save_agent,
    save_job,
    unassigned_jobs,
)
from agent.hub.web import Json
from protocol.lifecycle import JobState
from protocol.messages import SUBPROTOCOL_MSGPACK, Command
from protocol.rest import HEADER_AGENT

POLL_SECONDS = 10
_ID = re.compile(r"^agent_[A-Za-z0-9_-]{4,64}$")


def presence(agent: Agent, connected: bool, now: float) -> str:
    """Say in words whether the agent is there, and if not, why as far as is known."""
    if connected:
        return "connected"
    if agent.bye:
        until = f" until {iso(agent.bye_until)}" if agent.bye_until > now else ""
        return f"silent{until}: {agent.bye}"
    if agent.last_poll_at is not None and now - agent.last_poll_at <= ONLINE_SECONDS:
        return "polling"
    return f"offline since {iso(max(agent.last_seen, agent.last_poll_at or 0))}"


def public(agent: Agent, connected: bool, now: float) -> dict[str, Any]:
    """Return the platform's row of an agent, and ours."""
    said = presence(agent, connected, now)
    online = said in ("connected", "polling")
    last = now if connected else max(agent.last_seen, agent.last_poll_at or 0)
    return {
        "id": agent.id,
        "agent_id": agent.id,
        "hostname": agent.hostname,
        "platform": agent.platform,
        "version": agent.version,
        "status": "online" if online else "offline",
        "is_online": online,
        "last_poll_at": iso(last),
        "registered_at": iso(agent.registered_at),
        "connected": connected,
        "presence": said,
        "bye": agent.bye or None,
        "bye_until": iso(agent.bye_until) if agent.bye_until else None,
        "machine": _machine(agent),
        "figures": agent.figures,
        "figures_at": iso(agent.figures_time),
        "boot": agent.boot,
        "attempt": agent.attempt,
        "notes": [{"time": iso(note.time), "level": note.level, "text": note.text} for note in agent.notes],
    }


def _machine(agent: Agent) -> dict[str, Any] | None:
    if agent.machine is None:
        return None
    machine = msgspec.structs.asdict(agent.machine)
    machine["gpus"] = [msgspec.structs.asdict(gpu) for gpu in agent.machine.gpus]
    return machine


async def get_agents(request: Request, hub: Hub) -> Response:
    """`GET /api/training/agents`."""
    await hub.keys.require(request.headers)
    now = hub.clock()
    rows = [public(agent, agent.id in hub.lines, now) for agent in await hub.store.read(list_agents)]
    return Json({"agents": rows, "online_threshold_seconds": ONLINE_SECONDS})


async def get_agent(request: Request, hub: Hub) -> Response:
    """`GET /api/training/agents/{id}`."""
    await hub.keys.require(request.headers)
    agent_id = request.path_params["agent_id"]
    agent, held = await hub.store.read(lambda db: (find_agent(db, agent_id), jobs_of(db, agent_id)))
    if agent is None:
        raise Refusal(404, "Agent not found")
    row = public(agent, agent.id in hub.lines, hub.clock())
    row["total_jobs"] = len(held)
    row["completed_jobs"] = sum(job.status == "completed" for job in held)
    row["running_jobs"] = sum(job.status == "running" for job in held)
    return Json({"agent": row})


async def delete_agent(request: Request, hub: Hub) -> Response:
    """`DELETE /api/training/agents/{id}`: forget it; jobs it never took wait for another agent again."""
    await hub.keys.require(request.headers)
    agent_id = request.path_params["agent_id"]
    if agent_id in hub.lines:
        raise Refusal(409, f"{agent_id} is connected; stop the agent first.")

    def op(db: Db) -> int:
        for job in live_jobs_of(db, agent_id):
            if not job.taken:
                job.agent_id = None
                save_job(db, job)
        return db.execute("DELETE FROM agents WHERE id=?", (agent_id,)).rowcount

    gone = await hub.store.write(op)
    hub.feed.tell("")
    await hub.place()
    return Json({"success": True, "message": "Agent deleted" if gone else "There was no such agent"})


def _agent_id(request: Request) -> str:
    agent_id = request.headers.get(HEADER_AGENT)
    if not agent_id:
        raise Refusal(400, f"Missing {HEADER_AGENT} header")
    if not _ID.match(agent_id):
        raise Refusal(400, f"Invalid {HEADER_AGENT} format. Expected: agent_xxxxx")
    return agent_id


def _offer(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "model_name": job.model_name,
        "dataset_path": job.dataset_path,
        "config": msgspec.json.decode(job.config),
        "total_epochs": job.total_epochs,
        "total_steps": job.total_steps,
        "created_at": iso(job.created_at),
    }


async def poll(request: Request, hub: Hub) -> Response:
    """`GET /api/training/agent/poll`: the oldest job that waits, or that this agent was given and never took.

    Its open commands come along, as frames: an agent that polls has no other way to hear of them.
    """
    await hub.keys.require(request.headers)
    agent_id = _agent_id(request)
    headers = request.headers
    now = hub.clock()

    def op(db: Db) -> tuple[Job | None, list[Command]]:
        agent = find_agent(db, agent_id) or Agent(id=agent_id, registered_at=now, last_seen=now)
        agent.last_poll_at = agent.last_seen = now
        agent.hostname = headers.get("x-agent-hostname") or agent.hostname
        agent.platform = headers.get("x-agent-platform") or agent.platform
        agent.version = headers.get("x-agent-version") or agent.version
        agent.bye, agent.bye_until = "", 0.0
        save_agent(db, agent)
        mine = [job for job in live_jobs_of(db, agent_id) if not job.taken]
        waiting = mine or [job for job in unassigned_jobs(db) if job.state is JobState.QUEUED]
        return waiting[0] if waiting else None, open_commands(db, agent_id)

    job, commands = await hub.store.write(op)
    hub.feed.tell("")
    said = {
        "job": _offer(job) if job is not None else None,
        "poll_interval_seconds": POLL_SECONDS,
        "records": SUBPROTOCOL_MSGPACK,
        "commands": commands,
    }
    return Json(said if job is not None else {**said, "message": "No pending jobs available"})


async def post_records(request: Request, hub: Hub) -> Response:
    """`POST /api/training/agent/records`: what the agent says of itself, and its answers to commands."""
    await hub.keys.require(request.headers)
    agent_id = _agent_id(request)
    sent = await numbered(request, "")
    applied = await hub.store.write(
        lambda db: keep(db, agent_id, sent, hub.clock()), behind=True, records=len(sent.records)
    )
    await hub.stored(applied)
    return Json({"success": True, "ack": applied.ack})


async def claim(request: Request, hub: Hub) -> Response:
    """`POST /api/training/agent/claim/{id}`; the same agent may ask again and gets the same token."""
    await hub.keys.require(request.headers)
    agent_id = _agent_id(request)
    job_id = request.path_params["job_id"]
    now = hub.clock()

    def op(db: Db) -> Job:
        job = find_job(db, job_id)
        if job is None:
            raise Refusal(404, "Job not found", code="JOB_NOT_FOUND")
        if job.agent_id not in (None, agent_id):
            raise Refusal(409, "Job already claimed by another agent", code="ALREADY_CLAIMED")
        if job.agent_id == agent_id and job.taken:
            return job
        if job.state is not JobState.QUEUED:
            raise Refusal(409, f"Job is not available (status: {job.status})", code="INVALID_STATUS")
        job.agent_id, job.taken, job.claimed_at = agent_id, True, now
        job.state = JobState.PREPARING
        job.started_at = job.started_at or now
        job.updated_at = now
        save_job(db, job)
        return job

    job = await hub.store.write(op)
    hub.changed(job)
    return Json(
        {
            "success": True,
            "job_token": job.token,
            "job": _offer(job),
            "dataset": job.dataset,
            "desired_version": job.version,
            "want": job.want.value,
        }
    )
