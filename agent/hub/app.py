"""The hub's ASGI application: every route, and what guards them."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from agent.hub import agents, datasets, rest_agents, rest_append, rest_jobs
from agent.hub.hub import Hub
from agent.hub.web import Json, handler
from protocol.messages import CONNECT_PATH, SUBPROTOCOLS
from protocol.rest import AGENTS, CLAIM, DATASET, JOB, JOBS, METRICS, POLL, RECORDS, UPLOAD
from protocol.version import AGENT_VERSION


async def health(request: Request, hub: Hub) -> Response:
    """`GET /health`: no key needed."""
    return Json(
        {
            "status": "ok",
            "service": "finetunelab-hub",
            "version": AGENT_VERSION,
            "subprotocols": SUBPROTOCOLS,
            "agents_connected": len(hub.lines),
        }
    )


async def connect(socket: WebSocket) -> None:
    """`/api/training/agent/connect`."""
    await agents.connect(socket, socket.app.state.hub)


def routes() -> list[BaseRoute]:
    """Return every route but the page's."""
    table = [
        ("/health", "GET", health),
        (JOBS, "POST", rest_jobs.post_jobs),
        (JOBS, "GET", rest_jobs.get_jobs),
        (METRICS, "POST", rest_append.post_metrics),
        (METRICS, "GET", rest_jobs.query_metrics),
        (f"{JOB}/metrics", "PUT", rest_append.put_metrics),
        (f"{JOB}/metrics", "POST", rest_append.put_metrics),
        (f"{JOB}/metrics", "GET", rest_jobs.get_metrics),
        (f"{JOB}/status", "PATCH", rest_append.patch_status),
        (f"{JOB}/status", "GET", rest_jobs.get_status),
        (f"{JOB}/logs", "POST", rest_append.post_logs),
        (f"{JOB}/logs", "GET", rest_jobs.get_logs),
        (f"{JOB}/checkpoints", "GET", rest_jobs.get_checkpoints),
        (f"{JOB}/control", "POST", rest_jobs.post_control),
        (f"{JOB}/branch", "POST", rest_jobs.post_branch),
        (f"{JOB}/update-params", "PATCH", rest_jobs.patch_params),
        (DATASET, "GET", rest_append.get_dataset),
        (UPLOAD, "POST", datasets.upload),
        (AGENTS, "GET", rest_agents.get_agents),
        (f"{AGENTS}/{{agent_id}}", "GET", rest_agents.get_agent),
        (f"{AGENTS}/{{agent_id}}", "DELETE", rest_agents.delete_agent),
        (POLL, "GET", rest_agents.poll),
        (CLAIM, "POST", rest_agents.claim),
        (RECORDS, "POST", rest_agents.post_records),
    ]
    plain: list[BaseRoute] = [Route(path, handler(do), methods=[method]) for path, method, do in table]
    return [*plain, WebSocketRoute(CONNECT_PATH, connect)]


def bare(hub: Hub) -> Starlette:
    """Return the application without the page."""
    app = Starlette(routes=routes())
    app.state.hub = hub
    return app
