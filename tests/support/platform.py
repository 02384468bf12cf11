"""The hosted platform's side of the routes that an agent calls, as it is: its plain inserts and its faults too.

Written from the document of its contract and from nothing of ours, so that it can disagree with us. It runs in a
thread, on a real socket; a test looks into ``rows``, ``points`` and ``log`` directly, as its page does.
"""

import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.support.platform_rows import (
    BATCH_COLUMNS,
    KEY,
    LISTED,
    LOG_CAP,
    POINT_COLUMNS,
    STATUSES,
    SUMMARY,
    WRITABLE,
    Lost,
    Refused,
    Served,
    now,
    offer,
    page_of,
    refusal,
)

__all__ = ["KEY", "LOG_CAP", "Platform"]


class Platform(Served):
    """A platform with one user. ``fault`` breaks the next requests of a route.

    Faults: "lost" (done, not answered), "dropped" (not done, not answered), "late" (not answered in time, done
    afterwards), "slow" (done at once, answered too late), "500" and "502" (not done), "gateway" (done, then 502),
    "429", "401" (its own database gave no answer), "page" (404, and a page of the host in place of an answer), and
    "202" of the jobs route (said to be accepted, nothing stored).
    """

    def __init__(self, *, paused_allowed: bool = True, rate_limit: int = 100, port: int = 0) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        self.points: list[dict[str, Any]] = []
        self.log: dict[str, list[str]] = {}
        self.predictions: list[dict[str, Any]] = []
        self.agents: dict[str, dict[str, Any]] = {}
        self.seen: Counter[str] = Counter()
        """Requests of each route that arrived."""
        self.faulted: Counter[str] = Counter()
        self.key_calls: list[float] = []
        self.patches: list[tuple[str, str]] = []
        self.at_work = 0
        """Requests that are not finished, whoever has given them up."""
        self.writers = 0
        self.most_writers = 0
        """Log appends of one job that were in work at the same time, at most."""
        self.poll_seconds = 1
        self.late = 1.5
        """Seconds by which "late" and "slow" miss the client's patience."""
        self.down = False
        super().__init__(port)
        self.paused_allowed = paused_allowed
        """Whether its table knows that status."""
        self._rate_limit = rate_limit
        self._faults: dict[str, list[str]] = {}
        self._said: dict[str, dict[str, Any]] = {}

    # For tests

    def submit(self, config: dict[str, Any], dataset_path: str = "fake/data", **row: Any) -> str:
        """Insert a pending job as the platform's page does."""
        job_id = str(row.pop("id", "")) or secrets.token_hex(8)
        self.rows[job_id] = {
            **dict.fromkeys((*WRITABLE, "agent_id", "claimed_at"), None),
            "id": job_id,
            "config": config,
            "dataset_path": dataset_path,
            "model_name": "My job",
            "status": "pending",
            "job_token": secrets.token_urlsafe(32),
            "created_at": now(),
            "updated_at": time.time(),
            **row,
        }
        return job_id

    def fault(self, route: str, *kinds: str) -> None:
        """Have the next requests of a route ("metrics", "status", "logs", "jobs", "claim", "poll") go wrong so."""
        self._faults.setdefault(route, []).extend(kinds)

    def say(self, route: str, answer: dict[str, Any]) -> None:
        """Have the next request of a route answered with this, whatever it did."""
        self._said[route] = answer

    def pending_faults(self) -> int:
        return sum(len(kinds) for kinds in self._faults.values())

    def chart(self, job_id: str) -> list[dict[str, Any]]:
        """Return the job's points as they were inserted."""
        return [point for point in self.points if point["job_id"] == job_id]

    def stale(self, job_id: str, seconds: float = 300.0) -> bool:
        """Tell whether the page warns that nothing is heard of the job."""
        return time.time() - float(self.rows[job_id]["updated_at"]) > seconds

    # Requests

    def app(self) -> Starlette:
        local = "/api/training/local"
        table: list[tuple[str, str, str, Callable[[Request], Awaitable[dict[str, Any]]]]] = [
            ("GET", "/api/training/agent/poll", "poll", self._poll),
            ("POST", "/api/training/agent/claim/{id}", "claim", self._claim),
            ("POST", f"{local}/metrics", "metrics", self._post_metrics),
            ("GET", f"{local}/metrics", "read-metrics", self._get_metrics),
            ("POST", f"{local}/jobs", "jobs", self._post_jobs),
            ("GET", f"{local}/jobs", "read-jobs", self._get_jobs),
            ("POST", f"{local}/predictions", "predictions", self._post_predictions),
            ("GET", "/api/training/predictions/{id}", "read-predictions", self._get_predictions),
            ("PUT", f"{local}/{{id}}/metrics", "put", self._put_metrics),
            ("PATCH", f"{local}/{{id}}/status", "status", self._patch_status),
            ("GET", f"{local}/{{id}}/status", "read-status", self._get_status),
            ("POST", f"{local}/{{id}}/logs", "logs", self._post_logs),
            ("GET", f"{local}/{{id}}/logs", "read-logs", self._get_logs),
        ]
        return Starlette(
            routes=[Route(path, self._route(name, do), methods=[method]) for method, path, name, do in table]
        )

    def _route(
        self, name: str, do: Callable[[Request], Awaitable[dict[str, Any]]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            self.at_work += 1
            try:
                return await serve(request)
            finally:
                self.at_work -= 1

        async def serve(request: Request) -> Response:
            self.seen[name] += 1
            waiting = self._faults.get(name)
            kind = "down" if self.down else waiting.pop(0) if waiting else ""
            if kind:
                self.faulted[kind] += 1
            if b"\\u0000" in await request.body():
                # What its database cannot store as text; the jobs route hides that.
                kind = "202" if name == "jobs" else "500"
            if kind == "202":
                return JSONResponse({"success": True, "accepted": True, "persisted": False}, 202)
            if (instead := refusal(kind)) is not None:
                return instead
            if kind == "late":
                await anyio.sleep(self.late)
            try:
                reply = await do(request)
            except Refused as refused:
                return JSONResponse(refused.body, refused.status)
            except (KeyError, TypeError, ValueError, msgspec.DecodeError) as error:
                return JSONResponse({"error": "Failed to process request", "details": str(error)}, 500)
            if kind == "slow":
                await anyio.sleep(self.late)
            if kind == "gateway":
                return Response("<h1>Bad gateway</h1>", 502)
            return Lost() if kind == "lost" else JSONResponse(self._said.pop(name, reply))

        return answer

    def _by_key(self, request: Request) -> None:
        head = request.headers
        given = head.get("x-api-key") or head.get("x-workspace-api-key")
        given = given or head.get("authorization", "").removeprefix("Bearer ")
        if not given.startswith("wak_"):
            raise Refused(401, "Invalid API key format")
        if given != KEY:
            raise Refused(401, "Invalid API key")
        at = time.time()
        self.key_calls.append(at)
        if sum(at - one < 60 for one in self.key_calls) > self._rate_limit:
            raise Refused(429, "Rate limit exceeded. Try again later.")

    def _by_token(self, request: Request, job_id: str) -> dict[str, Any]:
        head = request.headers.get("authorization", "")
        if not head.startswith("Bearer "):
            raise Refused(401, "Unauthorized: Bearer token required")
        row = self.rows.get(job_id)
        if row is None:
            raise Refused(404, "Job not found")
        if head[7:] != row["job_token"]:
            raise Refused(401, "Unauthorized: Invalid token")
        return row

    def _agent(self, request: Request) -> str:
        self._by_key(request)
        agent = request.headers.get("x-agent-id")
        if not agent:
            raise Refused(400, "Missing X-Agent-ID header")
        if not agent.startswith("agent_") or len(agent) < 10:
            raise Refused(400, "Invalid X-Agent-ID format. Expected: agent_xxxxx")
        return agent

    async def _poll(self, request: Request) -> dict[str, Any]:
        agent = self._agent(request)
        head = request.headers
        platform = head.get("x-agent-platform")
        if platform in (None, "linux", "darwin", "windows"):
            # What a poll leaves out becomes null; a platform outside the list spoils the whole write.
            self.agents[agent] = {
                "hostname": head.get("x-agent-hostname"),
                "platform": platform,
                "version": head.get("x-agent-version"),
                "last_poll_at": time.time(),
            }
        waiting = [
            row for row in self.rows.values() if row["status"] == "pending" and row["agent_id"] is None
        ]
        if not waiting:
            none = "No pending jobs available"
            return {"job": None, "poll_interval_seconds": self.poll_seconds, "message": none}
        oldest = min(waiting, key=lambda row: str(row["created_at"]))
        return {"job": offer(oldest), "poll_interval_seconds": self.poll_seconds}

    async def _claim(self, request: Request) -> dict[str, Any]:
        agent = self._agent(request)
        row = self.rows.get(request.path_params["id"])
        if row is None:
            raise Refused(404, "Job not found", code="JOB_NOT_FOUND")
        if row["agent_id"] is not None:
            raise Refused(409, "Job already claimed", code="ALREADY_CLAIMED")
        if row["status"] != "pending":
            raise Refused(409, f"Job is not available (status: {row['status']})", code="INVALID_STATUS")
        row |= {"agent_id": agent, "claimed_at": now(), "status": "running"}
        return {"success": True, "job_token": row["job_token"], "job": offer(row)}

    def _insert(self, row: dict[str, Any], metrics: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
        fresh = []
        for item in metrics:
            if not isinstance(item["step"], int) or not isinstance(item["epoch"], int):
                raise TypeError("invalid input syntax for type integer")
            fresh.append(
                {
                    "job_id": row["id"],
                    "step": item["step"],
                    "epoch": item["epoch"],
                    **{name: item.get(name) for name in columns},
                    "timestamp": (item.get("timestamp") if columns is BATCH_COLUMNS else None) or now(),
                }
            )
        self.points += fresh
        last = max(fresh, key=lambda point: point["step"])
        row |= {name: last.get("train_loss" if name == "loss" else name) for name in SUMMARY}
        if columns is BATCH_COLUMNS:
            row |= {
                name: last.get(name)
                for name in ("loss_trend", "best_eval_loss", "epochs_without_improvement")
            }
        row |= {"current_step": last["step"], "current_epoch": last["epoch"], "updated_at": time.time()}
        if row["status"] in ("pending", "queued"):
            row["status"] = "running"

    async def _put_metrics(self, request: Request) -> dict[str, Any]:
        row = self._by_token(request, request.path_params["id"])
        body = await request.json()
        if not body.get("step") or not isinstance(body.get("epoch"), int | float):
            raise Refused(400, "Invalid metric: step and epoch are required")
        self._insert(row, [body], POINT_COLUMNS)
        return {"success": True}

    async def _post_metrics(self, request: Request) -> dict[str, Any]:
        if not request.headers.get("authorization", "").startswith("Bearer "):
            raise Refused(401, "Unauthorized: Bearer token required")
        if request.headers.get("content-length", "0") == "0":
            raise Refused(400, "Request body is required")
        body = await request.json()
        if not body.get("job_id"):
            raise Refused(400, "job_id is required")
        if not isinstance(body.get("metrics"), list) or not body["metrics"]:
            raise Refused(400, "metrics array is required and must not be empty")
        if body["job_id"] not in self.rows:
            raise Refused(500, "Job query failed")
        row = self._by_token(request, body["job_id"])
        self._insert(row, body["metrics"], BATCH_COLUMNS)
        return {"success": True, "count": len(body["metrics"])}

    async def _get_metrics(self, request: Request) -> dict[str, Any]:
        self._by_key(request)
        query = request.query_params
        if query["job_id"] not in self.rows:
            raise Refused(404, "Job not found")
        limit, offset = min(int(query.get("limit", 1000)), 5000), int(query.get("offset", 0))
        ordered = sorted(self.chart(query["job_id"]), key=lambda point: int(point["step"]))
        names = ("step", "epoch", *POINT_COLUMNS, "timestamp")
        page = [{name: point.get(name) for name in names} for point in ordered[offset : offset + limit]]
        return {
            "job_id": query["job_id"],
            "metrics": page,
            "total": len(ordered),
            "limit": limit,
            "offset": offset,
        }

    async def _patch_status(self, request: Request) -> dict[str, Any]:
        row = self._by_token(request, request.path_params["id"])
        body = await request.json()
        if body.get("status") not in STATUSES:
            raise Refused(400, f"Invalid status. Must be one of: {', '.join(STATUSES)}")
        if body["status"] == "paused" and not self.paused_allowed:
            raise Refused(500, "Failed to update status", details="violates check constraint")
        self.patches.append((row["id"], body["status"]))
        row |= {"status": body["status"], "updated_at": time.time()}
        if body["status"] in ("completed", "failed", "cancelled"):
            row["completed_at"] = row["completed_at"] or now()
        if body["status"] == "failed":
            row["config"] = {**row["config"], "error": body.get("error")}
        return {"success": True, "status": body["status"], "updated_at": now()}

    async def _get_status(self, request: Request) -> dict[str, Any]:
        self._by_key(request)
        row = self.rows.get(request.path_params["id"])
        if row is None:
            raise Refused(404, "Job not found")
        hidden = ("config", "job_token", "parameter_updates", "agent_id", "claimed_at", "error_message")
        shown = {name: value for name, value in row.items() if name not in hidden}
        error = row["config"].get("error") or ("Training failed" if row["status"] == "failed" else None)
        return {**shown, "job_id": row["id"], "error": error}

    async def _post_logs(self, request: Request) -> dict[str, Any]:
        row = self._by_token(request, request.path_params["id"])
        lines = (await request.json()).get("logs")
        if not isinstance(lines, list):
            raise Refused(400, "Invalid request: logs must be an array")
        if not lines:
            return {"success": True, "message": "No logs to append"}
        self.writers += 1
        self.most_writers = max(self.most_writers, self.writers)
        # Read, change, write: whoever comes between is lost.
        before = list(self.log.get(row["id"], []))
        await anyio.sleep(0.01)
        self.log[row["id"]] = [*before, *lines][-LOG_CAP:]
        self.writers -= 1
        row["updated_at"] = time.time()
        return {"success": True, "logs_appended": len(lines), "total_logs": len(self.log[row["id"]])}

    async def _get_logs(self, request: Request) -> dict[str, Any]:
        self._by_key(request)
        lines = self.log.get(request.path_params["id"], [])
        if not lines:
            raise Refused(503, "Failed to connect to local training server")
        page, offset, limit = page_of(request, lines, 100)
        return {"logs": page, "total_lines": len(lines), "offset": offset, "limit": limit}

    async def _post_jobs(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        if "user_id" not in body:
            self._by_key(request)
        if not body.get("job_id"):
            raise Refused(400, "job_id is required")
        if "application/json" not in request.headers.get("content-type", ""):
            raise Refused(400, "Content-Type must be application/json")
        if body["job_id"] not in self.rows:
            self.submit({}, id=body["job_id"], status="running")
        row = self.rows[body["job_id"]]
        row |= {name: body[name] for name in WRITABLE if name in body}
        head = {"success": True, "persisted": True, "job_id": row["id"], "user_id": "u1"}
        return {**head, "job_token": row["job_token"]}

    async def _post_predictions(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        if not body.get("predictions"):
            raise Refused(400, "predictions array is required and must not be empty")
        self._by_token(request, body["job_id"])
        # Each record's own job and owner are believed; whole numbers are whole in the table.
        for record in body["predictions"]:
            if any(not isinstance(record[name], int) for name in ("epoch", "step", "sample_index")):
                raise TypeError("invalid input syntax for type integer")
            if record["user_id"] != "u1" or None in (record["prompt"], record["prediction"]):
                raise ValueError("violates a constraint")
        self.predictions += body["predictions"]
        return {"success": True, "count": len(body["predictions"])}

    async def _get_predictions(self, request: Request) -> dict[str, Any]:
        self._by_key(request)
        rows = [row for row in self.predictions if row["job_id"] == request.path_params["id"]]
        return {"predictions": page_of(request, rows, 50)[0], "total_count": len(rows)}

    async def _get_jobs(self, request: Request) -> dict[str, Any]:
        self._by_key(request)
        wanted = request.query_params.get("status")
        rows = sorted(self.rows.values(), key=lambda row: str(row["created_at"]), reverse=True)
        shown = [{name: row[name] for name in LISTED} for row in rows if wanted in (None, row["status"])]
        page, offset, limit = page_of(request, shown, 50, most=100)
        return {"jobs": page, "total": len(shown), "limit": limit, "offset": offset}
