"""What the hosted platform's tables take, and how it says no."""

import socket
import threading
from datetime import UTC, datetime
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

KEY = "wak_" + "k" * 32
STATUSES = ("running", "completed", "failed", "cancelled", "paused")
POINT_COLUMNS = (
    *("train_loss", "eval_loss", "learning_rate", "grad_norm", "gpu_memory_allocated_gb"),
    *("gpu_memory_reserved_gb", "gpu_utilization_percent", "perplexity", "train_perplexity"),
    *("samples_per_second", "tokens_per_second"),
)
BATCH_COLUMNS = (
    *POINT_COLUMNS,
    "loss_trend",
    "best_eval_loss",
    "best_epoch",
    "best_step",
    "epochs_without_improvement",
)
SUMMARY = (
    *(
        "loss",
        "eval_loss",
        "learning_rate",
        "grad_norm",
        "samples_per_second",
        "perplexity",
        "train_perplexity",
    ),
    *("gpu_memory_allocated_gb", "gpu_memory_reserved_gb", "gpu_utilization_percent"),
)
WRITABLE = (
    *(
        "model_name",
        "dataset_path",
        "status",
        "config",
        "job_token",
        "total_epochs",
        "total_steps",
        "total_samples",
    ),
    *(
        "train_samples",
        "val_samples",
        "total_tokens_processed",
        "final_loss",
        "final_eval_loss",
        "best_eval_loss",
    ),
    *(
        "best_epoch",
        "best_step",
        "started_at",
        "completed_at",
        "elapsed_seconds",
        "remaining_seconds",
        "progress",
    ),
    *("current_epoch", "current_step", "epochs_without_improvement", "loss_trend", "resume_from_checkpoint"),
    *("num_gpus", "parameter_updates", "error_message", "batch_size", "gradient_accumulation_steps"),
    *("max_learning_rate", *SUMMARY),
)
LOG_CAP = 10_000


def now() -> str:
    return datetime.now(UTC).isoformat()


def offer(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a poll and a claim show of a job."""
    names = ("id", "model_name", "dataset_path", "config", "total_epochs", "total_steps", "created_at")
    return {name: row[name] for name in names}


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, error: str, **more: Any) -> None:
        super().__init__(error)
        self.status, self.body = status, {"error": error, **more}


class Lost(Response):
    """The connection ends before the answer does."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9999")]})


class Served:
    """An app on a real socket, in a thread."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._thread: threading.Thread | None = None
        self._server: uvicorn.Server | None = None

    def app(self) -> Starlette:
        raise NotImplementedError

    def __enter__(self) -> Self:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self.app(), http="h11", ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._server is not None and self._thread is not None
        self._server.should_exit = True
        self._thread.join(timeout=20)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def refusal(kind: str) -> Response | None:
    """Return what a fault that does nothing answers with."""
    match kind:
        case "502" | "down":
            return Response("<h1>no</h1>", 502)
        case "500":
            return JSONResponse({"error": "oh"}, 500)
        case "401":
            return JSONResponse({"error": "Database error"}, 401)
        case "429":
            return JSONResponse({"error": "Rate limit exceeded. Try again later."}, 429)
        case "page":
            return Response("<h1>DEPLOYMENT_NOT_FOUND</h1>", 404)
        case "dropped":
            return Lost()
        case _:
            return None


LISTED = (
    *(
        "id",
        "model_name",
        "dataset_path",
        "status",
        "progress",
        "current_step",
        "current_epoch",
        "total_steps",
    ),
    *("total_epochs", "loss", "eval_loss", "best_eval_loss", "started_at", "completed_at", "created_at"),
    "error_message",
)
"""What the list of jobs shows of each."""


def page_of(request: Request, rows: list[Any], usual: int, most: int = 1 << 30) -> tuple[list[Any], int, int]:
    """Return what a reader asks for of ``rows``, and from where and how much that is."""
    limit, offset = (int(request.query_params.get(*one)) for one in (("limit", usual), ("offset", 0)))
    limit = min(limit, most)
    return rows[offset:][:limit], offset, limit
