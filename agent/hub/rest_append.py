"""What a job's own token may do: append points and lines, say its status, fetch its data set."""

import hmac
import math
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from agent.hub import ingest, logs
from agent.hub.auth import bearer
from agent.hub.datasets import file_of
from agent.hub.errors import Refusal
from agent.hub.hub import Hub
from agent.hub.model import Job
from agent.hub.points import Dot, iso, store_rest_points
from agent.hub.status import set_status, started
from agent.hub.store import Db
from agent.hub.tables import get_job, save_job
from agent.hub.web import Json, body_of, json_of
from protocol.codec import UNREADABLE, Codec, number
from protocol.messages import SUBPROTOCOL_MSGPACK, Lane
from protocol.rest import HEADER_AGENT, HEADER_RANGE, HEADER_STREAM, HEADER_TOMB, METRIC_NAMES, TRENDS
from protocol.session import Key

MSGPACK = "application/msgpack"
MOST_POINTS = 20_000
MOST_LINES = 20_000
_RECORDS = msgspec.msgpack.Decoder(list[msgspec.Raw])


def authorised(db: Db, job_id: str, token: str) -> Job:
    """Return the job that ``token`` belongs to; raises Refusal 404 or 401."""
    job = get_job(db, job_id)
    if not hmac.compare_digest(job.token.encode(), token.encode()):
        raise Refusal(401, "Unauthorized: Invalid token")
    return job


def token_of(request: Request) -> str:
    token = bearer(request.headers)
    if token is None:
        raise Refusal(401, "Unauthorized: Bearer token required")
    return token


@dataclass(frozen=True)
class Range:
    """Which records of which stream an append carries."""

    epoch: int
    lane: int
    lo: int
    hi: int


def range_of(request: Request) -> Range | None:
    """Return the append's stream and numbers, or None where the caller knows no such thing."""
    stream, span = request.headers.get(HEADER_STREAM), request.headers.get(HEADER_RANGE)
    if stream is None and span is None:
        return None
    try:
        epoch, lane = map(int, (stream or "").split("/"))
        lo, hi = map(int, (span or "").split("-"))
    except ValueError:
        epoch = lane = lo = hi = -1
    if not (0 <= epoch < 2**63 and 0 <= lane <= 2 and 1 <= lo <= hi < 2**63):
        raise Refusal(
            400, f"{HEADER_STREAM} must be <epoch>/<lane> and {HEADER_RANGE} <lo>-<hi>, both or neither."
        )
    return Range(epoch, lane, lo, hi)


def answer(job: Job, **more: Any) -> dict[str, Any]:
    """Return the answer to an append: it also carries what is wanted, for whom only REST works."""
    return {
        "success": True,
        **more,
        "desired_version": job.version,
        "want": job.want.value,
        "parameters": job.parameters,
        "checkpoint": job.checkpoint,
        "accept_changes": job.accept_changes,
        "reason": job.reason,
    }


class _Numbered:
    """Runs an append once, whatever the number of times it comes."""

    def __init__(self, db: Db, job: Job, span: Range | None) -> None:
        self._db, self._job, self._span = db, job, span
        self._key = Key(span.epoch, job.id, span.lane) if span else None
        self._have = ingest.position(db, job.agent_id or "", self._key) if self._key else 0

    def skip(self, count: int | None) -> int | None:
        """Return how many of the records are stored already, or None if all are."""
        if self._span is None:
            return 0
        lo, hi = self._span.lo, self._span.hi
        if hi <= self._have:
            return None
        if lo > self._have + 1 or (lo <= self._have and count != hi - lo + 1):
            raise Refusal(409, f"The stream is stored up to {self._have}; go on from there.", ack=self._have)
        return self._have + 1 - lo

    def done(self) -> dict[str, int]:
        """Move the stream on, in the same transaction; return what to tell the sender."""
        if self._span is None or self._key is None:
            return {}
        ack = max(self._have, self._span.hi)
        ingest.advance_to(self._db, self._job.agent_id or "", self._key, ack)
        return {"ack": ack}


class Numbered(NamedTuple):
    """Records of an append, as they are on the socket; none where they were lost, for the reason ``tomb``."""

    key: Key
    lo: int
    hi: int
    records: list[msgspec.Raw]
    tomb: str


async def numbered(request: Request, scope: str, lane: int | None = None) -> Numbered:
    """Read an append of records, of ``lane`` if that is given; raises Refusal 400."""
    span = range_of(request)
    try:
        records = _RECORDS.decode(await body_of(request))
    except UNREADABLE as error:
        raise Refusal(400, f"The body is not an array of records: {error}") from None
    tomb = request.headers.get(HEADER_TOMB, "")[:32]
    expected = 0 if tomb else span.hi - span.lo + 1 if span else -1
    if span is None or len(records) != expected or lane not in (None, span.lane):
        of_lane = "" if lane is None else f", of lane {lane}"
        raise Refusal(
            400, f"{HEADER_STREAM} and {HEADER_RANGE} must number exactly the records sent{of_lane}."
        )
    return Numbered(Key(span.epoch, scope, span.lane), span.lo, span.hi, records, tomb)


def keep(db: Db, sender: str, sent: Numbered, now: float) -> ingest.Applied:
    """Store what was sent; raises Refusal 409 at a hole."""
    try:
        if sent.tomb:
            return ingest.bury(db, sender, sent.key, sent.lo, sent.hi, sent.tomb, now)
        return ingest.apply(db, sender, sent.key, sent.lo, sent.records, Codec(SUBPROTOCOL_MSGPACK), now)
    except ingest.Gap as gap:
        raise Refusal(409, f"The stream is stored up to {gap.ack}; go on from there.", ack=gap.ack) from None


async def _raw_records(request: Request, hub: Hub, job_id: str, lane: int) -> Response:
    """Append records as they are on the socket: `application/msgpack`, an array of them."""
    token = token_of(request)
    sent = await numbered(request, job_id, lane)

    def op(db: Db) -> tuple[Job, ingest.Applied]:
        job = authorised(db, job_id, token)
        # Where the sender says who it is, the job must be its own: another agent may hold it by now.
        sender = request.headers.get(HEADER_AGENT) or job.agent_id or ""
        done = keep(db, sender, sent, hub.clock())
        return done.job or job, done

    job, applied = await hub.store.write(op, behind=True, records=len(sent.records))
    await hub.stored(applied)
    return Json(answer(job, ack=applied.ack, count=len(sent.records), status=job.status))


async def put_metrics(request: Request, hub: Hub) -> Response:
    """`PUT .../{id}/metrics`: one point."""
    job_id = request.path_params["job_id"]
    if request.headers.get("content-type", "").startswith(MSGPACK):
        return await _raw_records(request, hub, job_id, Lane.METRICS)
    token, span = token_of(request), range_of(request)
    body = await json_of(request)
    if body.get("step") is None or body.get("epoch") is None:
        raise Refusal(400, "Invalid metric: step and epoch are required")
    return await _append_points(hub, job_id, token, span, [body], counted=False)


async def post_metrics(request: Request, hub: Hub) -> Response:
    """`POST /api/training/local/metrics`: many points."""
    token, span = token_of(request), range_of(request)
    body = await json_of(request)
    job_id, metrics = body.get("job_id"), body.get("metrics")
    if not job_id or not isinstance(job_id, str):
        raise Refusal(400, "job_id is required")
    if not isinstance(metrics, list) or not metrics:
        raise Refusal(400, "metrics array is required and must not be empty")
    if len(metrics) > MOST_POINTS:
        raise Refusal(413, f"metrics: {len(metrics)} points; send at most {MOST_POINTS} at a time.")
    return await _append_points(hub, job_id, token, span, metrics, counted=True)


async def _append_points(
    hub: Hub, job_id: str, token: str, span: Range | None, metrics: list[Any], counted: bool
) -> Response:
    now = hub.clock()

    def op(db: Db) -> tuple[Job, list[Dot], dict[str, int]]:
        job = authorised(db, job_id, token)
        numbered = _Numbered(db, job, span)
        dots = [_dot(item, index, job, now) for index, item in enumerate(metrics)]
        skip = numbered.skip(len(dots))
        fresh = dots[skip:] if skip is not None else []
        if fresh:
            store_rest_points(db, job, fresh)
            started(job, now)
            job.updated_at = now
            save_job(db, job)
        return job, fresh, numbered.done()

    job, dots, ack = await hub.store.write(op, behind=True, records=len(metrics))
    hub.feed.tell(job.id, dots)
    hub.changed(job)
    count = {"count": len(metrics)} if counted else {}
    return Json(answer(job, **count, **ack))


def _dot(item: Any, index: int, job: Job, now: float) -> Dot:
    """Return a platform's metric point; raises Refusal 400 that names the field."""
    where = f"metrics[{index}]"
    if not isinstance(item, dict):
        raise Refusal(400, f"{where}: expected an object.")
    step, epoch, attempt = item.get("step"), item.get("epoch", 0), item.get("attempt", job.attempt)
    numbers: dict[str, int] = {}
    for name, value in (("step", step), ("attempt", attempt)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < ingest.WHOLE:
            raise Refusal(400, f"{where}.{name}: expected a whole number, found {value!r}.")
        numbers[name] = int(value)
    values: dict[str, float | None] = {}
    for name in METRIC_NAMES:
        value = item.get(name)
        if value is None:
            continue
        if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):
            value = number(value)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise Refusal(400, f"{where}.{name}: expected a number, found {value!r}.")
        values[name] = float(value)
    trend = item.get("loss_trend")
    if not isinstance(epoch, int | float) or not math.isfinite(epoch):
        epoch = 0.0
    return Dot(
        numbers["attempt"],
        numbers["step"],
        float(epoch),
        _time(item.get("timestamp"), now),
        trend if trend in TRENDS else "",
        values,
    )


def _time(text: Any, now: float) -> float:
    """Return an ISO time as Unix seconds; a time that cannot be read is now, as on the platform."""
    if not isinstance(text, str):
        return now
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return now


async def patch_status(request: Request, hub: Hub) -> Response:
    """`PATCH .../{id}/status`."""
    job_id = request.path_params["job_id"]
    if request.headers.get("content-type", "").startswith(MSGPACK):
        return await _raw_records(request, hub, job_id, Lane.CONTROL)
    token, span = token_of(request), range_of(request)
    body = await json_of(request)

    def op(db: Db) -> tuple[Job, bool, dict[str, int]]:
        job = authorised(db, job_id, token)
        numbered = _Numbered(db, job, span)
        was_live = job.live
        if numbered.skip(1) is not None:
            set_status(db, job, body.get("status"), body.get("error"), hub.clock())
        return job, was_live and not job.live, numbered.done()

    job, ended, ack = await hub.store.write(op, behind=True)
    hub.changed(job)
    if ended:
        await hub.place()
    return Json(answer(job, status=job.status, updated_at=iso(job.updated_at), **ack))


async def post_logs(request: Request, hub: Hub) -> Response:
    """`POST .../{id}/logs`."""
    job_id = request.path_params["job_id"]
    if request.headers.get("content-type", "").startswith(MSGPACK):
        return await _raw_records(request, hub, job_id, Lane.LOGS)
    token, span = token_of(request), range_of(request)
    body = await json_of(request)
    lines = body.get("logs")
    if not isinstance(lines, list):
        raise Refusal(400, "Invalid request: logs must be an array")
    if not all(isinstance(line, str) for line in lines):
        raise Refusal(400, "Invalid request: all log entries must be strings")
    if len(lines) > MOST_LINES:
        raise Refusal(413, f"logs: {len(lines)} lines; send at most {MOST_LINES} at a time.")

    def op(db: Db) -> tuple[Job, int, dict[str, int]]:
        job = authorised(db, job_id, token)
        numbered = _Numbered(db, job, span)
        fresh = numbered.skip(None) is not None
        if fresh and lines:
            now = hub.clock()
            logs.append(db, job, job.attempt, lines, now)
            job.updated_at = now
            save_job(db, job)
        return job, len(lines) if fresh else 0, numbered.done()

    job, added, ack = await hub.store.write(op, behind=True)
    if not lines:
        return Json(answer(job, message="No logs to append", **ack))
    hub.feed.tell(job.id, lines=lines[:added])
    return Json(answer(job, logs_appended=added, total_logs=job.log_lines, **ack))


async def get_dataset(request: Request, hub: Hub) -> Response:
    """`GET .../{id}/dataset`: the uploaded file, with ranges; its sha256 is its ETag."""
    job_id = request.path_params["job_id"]
    token = token_of(request)

    def op(db: Db) -> Job:
        return authorised(db, job_id, token)

    job = await hub.store.read(op)
    if job.dataset is None or not await anyio.Path(file_of(hub.data_dir, job.dataset_id)).is_file():
        raise Refusal(
            404, "No data set was uploaded to this hub for the job; its dataset_path is the agent's own."
        )
    headers = {
        "ETag": f'"{job.dataset.sha256}"',
        "X-Content-SHA256": job.dataset.sha256,
        "Cache-Control": "private, no-transform",
    }
    return FileResponse(
        file_of(hub.data_dir, job.dataset_id),
        headers=headers,
        media_type="application/octet-stream",
        filename=job.dataset.name,
    )
