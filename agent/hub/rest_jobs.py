"""What the API key may do with jobs: submit, read, control, adjust."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from agent.hub import jobs, logs
from agent.hub.errors import Refusal
from agent.hub.hub import Hub
from agent.hub.model import Job
from agent.hub.points import curve
from agent.hub.status import SETTABLE, brief, set_status, view
from agent.hub.store import Db
from agent.hub.tables import find_job, get_job, list_jobs
from agent.hub.web import Json, json_of, shaped, whole
from protocol.codec import decode_record
from protocol.records import Checkpoint
from protocol.rest import Branch, Control, SubmitJob

USER = "local"
"""This hub has one user."""


async def post_jobs(request: Request, hub: Hub) -> Response:
    """`POST /api/training/local/jobs`: submit a job, or set the totals of one that exists."""
    await hub.keys.require(request.headers)
    raw = await json_of(request)
    body = shaped(raw, SubmitJob)
    now = hub.clock()

    def op(db: Db) -> Job:
        if body.config is not None:
            return jobs.submit(db, body, now)
        if not body.job_id:
            raise Refusal(400, "job_id is required")
        if find_job(db, body.job_id) is None:
            raise Refusal(
                400, f"config: there is no job {body.job_id} yet; give its TrainingConfig as an object."
            )
        job = jobs.amend(db, body.job_id, raw, now)
        error = raw.get("error_message")
        if raw.get("status") in SETTABLE:
            set_status(db, job, raw["status"], error, now)
        return job

    job = await hub.store.write(op)
    hub.changed(job)
    await hub.place()
    return Json(
        {
            "success": True,
            "persisted": True,
            "job_id": job.id,
            "user_id": USER,
            "job_token": job.token,
            "status": job.status,
        }
    )


async def get_jobs(request: Request, hub: Hub) -> Response:
    """`GET /api/training/local/jobs`."""
    await hub.keys.require(request.headers)
    limit, offset = whole(request, "limit", 50, 100, 1), whole(request, "offset", 0, 2**31)
    status = request.query_params.get("status")
    found, total = await hub.store.read(lambda db: list_jobs(db, status, limit, offset))
    return Json({"jobs": [brief(job) for job in found], "total": total, "limit": limit, "offset": offset})


async def get_status(request: Request, hub: Hub) -> Response:
    """`GET .../{id}/status`."""
    await hub.keys.require(request.headers)
    job = await hub.store.read(lambda db: get_job(db, request.path_params["job_id"]))
    since = await hub.offline_since(job)
    answer = view(job, hub.clock(), since)
    answer["agent_connected"] = job.agent_id in hub.lines
    return Json(answer)


async def get_metrics(request: Request, hub: Hub) -> Response:
    """`GET .../{id}/metrics`: the current curve."""
    await hub.keys.require(request.headers)
    job_id = request.path_params["job_id"]

    def op(db: Db) -> list[dict[str, Any]]:
        get_job(db, job_id)
        return [dot.public() for dot in curve(db, job_id)]

    return Json({"job_id": job_id, "metrics": await hub.store.read(op)})


async def query_metrics(request: Request, hub: Hub) -> Response:
    """`GET /api/training/local/metrics?job_id&limit&offset`."""
    await hub.keys.require(request.headers)
    job_id = request.query_params.get("job_id")
    if not job_id:
        raise Refusal(400, "job_id is required")
    limit, offset = whole(request, "limit", 1000, 5000, 1), whole(request, "offset", 0, 2**31)

    def op(db: Db) -> tuple[list[dict[str, Any]], int]:
        get_job(db, job_id)
        dots = curve(db, job_id)
        return [dot.public() for dot in dots[offset : offset + limit]], len(dots)

    metrics, total = await hub.store.read(op)
    return Json({"job_id": job_id, "metrics": metrics, "total": total, "limit": limit, "offset": offset})


async def get_logs(request: Request, hub: Hub) -> Response:
    """`GET .../{id}/logs?limit&offset`; a negative offset counts from the end."""
    await hub.keys.require(request.headers)
    job_id = request.path_params["job_id"]
    limit = whole(request, "limit", 100, 10_000)
    offset = whole(request, "offset", 0, 2**31, -(2**31))

    def op(db: Db) -> tuple[list[str], int]:
        get_job(db, job_id)
        return logs.read(db, job_id, limit, offset)

    lines, total = await hub.store.read(op)
    return Json({"job_id": job_id, "logs": lines, "total_lines": total, "offset": offset, "limit": limit})


async def get_checkpoints(request: Request, hub: Hub) -> Response:
    """`GET .../{id}/checkpoints`: those that the agent has reported."""
    await hub.keys.require(request.headers)
    job_id = request.path_params["job_id"]

    def op(db: Db) -> list[dict[str, Any]]:
        get_job(db, job_id)
        rows = db.execute("SELECT body FROM checkpoints WHERE job=?", (job_id,))
        found = [record for row in rows if isinstance(record := decode_record(row[0]), Checkpoint)]
        found.sort(key=lambda one: (one.attempt, one.step))
        names = (
            "name",
            "attempt",
            "step",
            "epoch",
            "size",
            "seconds",
            "reason",
            "eval_loss",
            "train_loss",
            "is_best",
            "stall",
        )
        return [{name: getattr(one, name) for name in names} for one in found]

    found = await hub.store.read(op)
    best = next((one for one in reversed(found) if one["is_best"]), None)
    return Json({"job_id": job_id, "checkpoints": found, "best_checkpoint": best})


async def post_control(request: Request, hub: Hub) -> Response:
    """`POST .../{id}/control`."""
    await hub.keys.require(request.headers)
    raw = await json_of(request)
    actions = ("pause", "resume", "cancel", "stop", "retry")
    if raw.get("action") not in actions:
        raise Refusal(400, f"Invalid or missing action. Must be one of: {', '.join(actions)}")
    body = shaped(raw, Control)
    job, told = await hub.control(
        request.path_params["job_id"], body.action, body.checkpoint_path, body.accept_changes
    )
    result = {
        "want": job.want.value,
        "desired_version": job.version,
        "state": job.state.value,
        "status": job.status,
        "agent_told": told,
    }
    return Json({"success": True, "action": body.action, "job_id": job.id, "result": result})


async def post_branch(request: Request, hub: Hub) -> Response:
    """`POST .../{id}/branch`: a new job that begins with a checkpoint of this one."""
    await hub.keys.require(request.headers)
    body = shaped(await json_of(request), Branch)
    parent_id = request.path_params["job_id"]
    job, told = await hub.branch(parent_id, body)
    where = f"checkpoint {body.checkpoint}" if body.checkpoint else "the newest checkpoint"
    return Json(
        {
            "success": True,
            "job_id": job.id,
            "job_token": job.token,
            "status": job.status,
            "resumed_from_job_id": parent_id,
            "agent_told": told,
            "message": f"Job {job.id} begins with {where} of {parent_id}.",
        }
    )


async def patch_params(request: Request, hub: Hub) -> Response:
    """`PATCH .../{id}/update-params`."""
    await hub.keys.require(request.headers)
    job, told = await hub.adjust(request.path_params["job_id"], await json_of(request))
    return Json(
        {
            "success": True,
            "job_id": job.id,
            "parameters": job.parameters,
            "desired_version": job.version,
            "agent_told": told,
            "message": "The agent was told." if told else "The agent will be told when it connects.",
        }
    )
