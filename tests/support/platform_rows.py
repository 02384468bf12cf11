"""What the hosted platform's tables take, and how it says no."""

from typing import Any

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


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, error: str, **more: Any) -> None:
        super().__init__(error)
        self.status, self.body = status, {"error": error, **more}


class Lost(Response):
    """The connection ends before the answer does."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9999")]})


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
