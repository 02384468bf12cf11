"""The API on HOST:PORT, for curl, the command line, health checks and Prometheus.

It has no meaning of its own: every route asks the Desk, which the backend's messages ask too.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
from loguru import logger
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from agent.config import Settings
from agent.core.ports import CheckpointView, Desk
from agent.errors import AgentError, BadJob, NotPossible, UnknownJob
from agent.local import prometheus, views
from agent.local.auth import Guard
from protocol.jobspec import not_within
from protocol.lifecycle import JobState, Want
from protocol.messages import CommandKind
from protocol.rest import STATUS, Branch, Execute
from protocol.worker import Parameters

T = TypeVar("T")

MAX_BODY = 64 * 1024
MAX_JOB = 64 * 1024 * 1024
"""Bytes of a job, which may carry its data set."""
MAX_LINES = 1000
MAX_POINTS = 100_000
BY = "owner"
"""What comes by this door is the owner's."""

_STATUS = {UnknownJob: 404, NotPossible: 409, BadJob: 400}


class _Empty(msgspec.Struct):
    """The body of an order that needs none."""

    checkpoint_path: str = ""
    resume_from_best: bool = False
    accept_changes: bool = False


class _Pin(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Which checkpoint is to be kept, or no more."""

    checkpoint: str
    pinned: bool = True


class _Update(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Live parameters; their limits are those of a job."""

    learning_rate: float | None = None
    batch_size: int | None = None
    gradient_accumulation_steps: int | None = None
    eval_steps: int | None = None
    save_steps: int | None = None
    logging_steps: int | None = None
    early_stopping_patience: int | None = None

    def __post_init__(self) -> None:
        for name, value in msgspec.structs.asdict(self).items():
            if value is not None and (must := not_within(name, value)):
                raise ValueError(f"{name} must be {must}, not {value:g}")


def build(desk: Desk, settings: Settings, token: str) -> Starlette:
    """Return the application; serve it with `agent.local.server.serve`."""
    doors = _Doors(desk)
    job = "/api/training"
    routes = [
        Route("/health", doors.health),
        Route("/metrics", doors.prometheus),
        Route(f"{job}/agent", doors.agent),
        Route(f"{job}/execute", doors.execute, methods=["POST"]),
        Route(f"{job}/jobs", doors.jobs),
        Route(f"{job}/queue", doors.queue),
        Route(f"{job}/status/{{job_id}}", doors.status),
        Route(f"{job}/logs/{{job_id}}", doors.logs),
        Route(f"{job}/metrics/{{job_id}}", doors.points),
        Route(f"{job}/checkpoints/{{job_id}}", doors.checkpoints),
        Route(f"{job}/checkpoints/{{job_id}}", doors.pin, methods=["POST"]),
        Route(f"{job}/branch/{{job_id}}", doors.branch, methods=["POST"]),
        *(
            Route(f"{job}/{want}/{{job_id}}", doors.wanting(meaning), methods=["POST"])
            for want, meaning in _WANTS.items()
        ),
        Route(f"{job}/retry/{{job_id}}", doors.retry, methods=["POST"]),
        Route(f"{job}/{{job_id}}/force-start", doors.force_start, methods=["POST"]),
        Route(f"{job}/{{job_id}}/errors", doors.errors),
        Route(f"{job}/{{job_id}}/update-params", doors.update, methods=["PATCH"]),
        *(
            Route(f"{job}/{{job_id}}/{kind.replace('_', '-')}", doors.commanding(kind), methods=["POST"])
            for kind in (CommandKind.SAVE_NOW, CommandKind.EVALUATE_NOW)
        ),
    ]
    guard = Middleware(
        Guard,
        token=token,
        open_=settings.local_api_open,
        backend_url=settings.backend_url,
        host=settings.host,
    )
    handlers = {AgentError: _answer_error, HTTPException: _answer_http}
    return Starlette(routes=routes, middleware=[guard, Middleware(_Defects)], exception_handlers=handlers)


_WANTS = {"pause": Want.PAUSE, "resume": Want.RUN, "cancel": Want.CANCEL, "stop": Want.STOP}


class _Doors:
    """The handlers of one desk."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._figures = prometheus.Exporter(desk)

    async def health(self, request: Request) -> Response:
        return _json(views.health(self._desk.health()))

    async def agent(self, request: Request) -> Response:
        return _json(self._desk.health())

    async def prometheus(self, request: Request) -> Response:
        return Response(self._figures.text(), media_type=prometheus.CONTENT_TYPE)

    async def execute(self, request: Request) -> Response:
        body = await _body(request, Execute, MAX_JOB)
        job_id = await self._desk.submit(
            body.config,
            job_id=body.execution_id,
            dataset_path=body.dataset_path,
            name=body.name,
            dataset_content=body.dataset_content,
            by=BY,
        )
        job = self._desk.job(job_id)
        sentence = f"Job {job_id} is {job.state}."
        return _json({"job_id": job_id, "status": STATUS[job.state], "message": sentence})

    async def jobs(self, request: Request) -> Response:
        jobs = [views.summary(job) for job in self._desk.jobs()]
        return _json({"jobs": jobs, "total": len(jobs)})

    async def queue(self, request: Request) -> Response:
        waiting = [job for job in self._desk.jobs() if job.state is JobState.QUEUED]
        waiting.sort(key=lambda job: (job.queue_position or 0, job.created_at))
        return _json({"queue": [views.summary(job) for job in waiting], "queue_length": len(waiting)})

    async def status(self, request: Request) -> Response:
        return _json(views.status(self._job(request)))

    async def errors(self, request: Request) -> Response:
        return _json(views.errors(self._job(request)))

    async def logs(self, request: Request) -> Response:
        limit = _number(request, "limit", 100, 1, MAX_LINES)
        page = await self._desk.logs(self._job(request).job_id, limit, _number(request, "offset", 0, 0))
        return _json(page)

    async def points(self, request: Request) -> Response:
        job_id = self._job(request).job_id
        limit = _number(request, "limit", 1000, 1, MAX_POINTS)
        points = await self._desk.points(job_id, _number(request, "after_step", -1, -1), limit)
        return _json({"job_id": job_id, "metrics": [views.point(point) for point in points]})

    async def checkpoints(self, request: Request) -> Response:
        job_id = self._job(request).job_id
        return self._listed(job_id, await self._desk.checkpoints(job_id))

    async def pin(self, request: Request) -> Response:
        job_id = self._job(request).job_id
        body = await _body(request, _Pin, MAX_BODY)
        return self._listed(job_id, await self._desk.pin(job_id, body.checkpoint, body.pinned))

    async def branch(self, request: Request) -> Response:
        job_id = self._job(request).job_id
        body = await _body(request, Branch, MAX_JOB)
        if body.config is not None:
            raise HTTPException(400, "config: give what is to be changed, as config_adjustments.")
        new_id = await self._desk.branch(
            job_id,
            checkpoint=body.checkpoint,
            adjustments=body.config_adjustments,
            new_id=body.job_id or "",
            name=body.name,
            by=BY,
        )
        where = f"checkpoint {body.checkpoint}" if body.checkpoint else "the newest checkpoint"
        return _json({"job_id": new_id, "message": f"Job {new_id} begins with {where} of {job_id}."})

    def _listed(self, job_id: str, found: list[CheckpointView]) -> Response:
        best = next((one for one in found if one.is_best), None)
        return _json(
            {
                "job_id": job_id,
                "checkpoints": found,
                "best_checkpoint": best,
                "message": "" if found else "This job has no checkpoint yet.",
            }
        )

    async def retry(self, request: Request) -> Response:
        job_id = self._job(request).job_id
        checkpoint, accept = await _start(request)
        sentence = await self._desk.retry(job_id, checkpoint=checkpoint, accept_changes=accept, by=BY)
        return self._done(job_id, sentence)

    async def force_start(self, request: Request) -> Response:
        job_id = self._job(request).job_id
        position = await self._desk.move_to_front(job_id)
        return _json({"success": True, "job_id": job_id, "queue_position": position})

    async def update(self, request: Request) -> Response:
        job_id = self._job(request).job_id
        body = await _body(request, _Update, MAX_BODY)
        asked = {name: value for name, value in msgspec.structs.asdict(body).items() if value is not None}
        if not asked:
            allowed = list(_Update.__struct_fields__)
            sentence = f"No parameters specified. Give one of: {', '.join(allowed)}."
            return _json({"error": sentence, "allowed_params": allowed}, 400)
        return self._done(job_id, await self._desk.set_parameters(job_id, Parameters(**asked), by=BY))

    def wanting(self, want: Want) -> Callable[[Request], Awaitable[Response]]:
        async def handler(request: Request) -> Response:
            job_id = self._job(request).job_id
            checkpoint, accept = await _start(request)
            sentence = await self._desk.want(
                job_id, want, checkpoint=checkpoint, accept_changes=accept, by=BY
            )
            return self._done(job_id, sentence)

        return handler

    def commanding(self, kind: CommandKind) -> Callable[[Request], Awaitable[Response]]:
        async def handler(request: Request) -> Response:
            job_id = self._job(request).job_id
            return self._done(job_id, await self._desk.command(job_id, kind, by=BY))

        return handler

    def _job(self, request: Request) -> Any:
        return self._desk.job(request.path_params["job_id"])

    def _done(self, job_id: str, sentence: str) -> Response:
        job = self._desk.job(job_id)
        return _json(
            {
                "success": True,
                "job_id": job_id,
                "status": STATUS[job.state],
                "state": job.state,
                "message": sentence,
            }
        )


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise HTTPException(413, f"The body is larger than {limit} bytes.")
    return bytes(body)


async def _body(request: Request, kind: type[T], limit: int) -> T:
    try:
        return msgspec.json.decode(await _read(request, limit) or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise HTTPException(400, f"The body is not what this takes: {error}.") from None


async def _start(request: Request) -> tuple[str, bool]:
    """Return the checkpoint asked for, and whether changes are accepted.

    The platform puts them in the query, the old agent in the body.
    """
    body = await _body(request, _Empty, MAX_BODY)
    query = request.query_params
    accept = body.accept_changes or query.get("accept_changes") == "true"
    if body.resume_from_best or query.get("resume_from_best") == "true":
        return "best", accept
    return query.get("checkpoint_path") or body.checkpoint_path, accept


def _number(request: Request, name: str, default: int, low: int, high: int = 2**53) -> int:
    text = request.query_params.get(name, "")
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        raise HTTPException(400, f"{name}: {text[:40]!r} is not a whole number.") from None
    if value < low:
        raise HTTPException(400, f"{name}: {value} is below {low}.")
    return min(value, high)


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return ``value`` as JSON. A loss that is not finite becomes null, where Starlette's own would fail."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")


async def _answer_error(request: Request, error: Exception) -> Response:
    status = next((code for kind, code in _STATUS.items() if isinstance(error, kind)), 500)
    return _json({"error": str(error)}, status)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = error.detail
    if error.status_code == 404:
        sentence = f"There is nothing at {request.url.path}."
    return _json({"error": sentence}, error.status_code, headers=error.headers)


class _Defects:
    """Answers a defect of ours with a sentence. Starlette's own would raise it again and drop the connection."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except Exception as error:  # noqa: BLE001 - the outermost frame of a request: the agent lives on
            logger.opt(exception=error).error("local API: {} {} failed", scope["method"], scope["path"])
            answer = _json({"error": "A defect of the agent; its log has the details."}, 500)
            await answer(scope, receive, send)
