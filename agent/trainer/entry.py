"""The trainer process from its imports to its last word. Started by name; nothing imports it."""

import contextlib
import logging
import os
import sys
import time
import traceback
from typing import Any

import msgspec

from agent.trainer.errors import TrainerError
from agent.trainer.line import EventQueue, Line, OrderQueue
from agent.trainer.reasons import explain
from protocol.failures import Evidence, Failure, FailureReason, failure
from protocol.worker import Check, Failed, Left, Note, Start, Warm

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""Read by the libraries when they are imported: nothing is reported to anybody, no threads are forked over."""
FAILED = 1


def main(orders: OrderQueue, events: EventQueue) -> int:
    """Import, say Warm, wait for Start, train; return the exit code."""
    began = time.monotonic()
    line = Line(orders, events, parent_pid=os.getppid())
    try:
        return _work(line, began)
    except Exception as error:  # noqa: BLE001  the outermost frame: whatever happened becomes a sentence
        traceback.print_exc()
        told = failure_of(error)
        if told.reason is FailureReason.DISK_FULL:
            # What is on the disk is good, and the job can wait until there is room.
            line.say(Note("warning", told.sentence))
            line.say(Left("disk_full", 0))
        else:
            line.say(Failed(told))
        return FAILED
    finally:
        line.close()


def _work(line: Line, began: float) -> int:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # Start-up: these imports take seconds, and a warm trainer has them behind it when a job comes.
    import datasets
    import torch

    # bitsandbytes, which PEFT loads, compiles functions when it is imported: 1.3 s and 45 MB for the compiler alone.
    # torch asks for this where something is compiled, so what a job wants compiled later still is.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from agent.trainer import run

    del os.environ["TORCHDYNAMO_DISABLE"]
    datasets.disable_progress_bars()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal():
        torch.set_num_threads(max(1, int(threads)))
    line.say(Warm(os.getpid(), time.monotonic() - began))
    order = line.wait_order()
    while order is not None and not isinstance(order, Start | Check):
        order = line.wait_order()
    if order is None:  # the agent is gone, and there is no job
        return 0
    if isinstance(order, Check):
        from agent.trainer import check

        line.begin(1, 1, order.workspace.cache)
        return check.check(order, line)
    line.begin(order.attempt, order.first_event, order.workspace.checkpoints)
    try:
        return run.train(order, line)
    except Exception as error:
        if failure_of(error).reason in (FailureReason.DEVICE_MEMORY, FailureReason.HOST_MEMORY):
            error.advice = getattr(error, "advice", "") or _savings(order, error)  # type: ignore[attr-defined]
        raise


def _savings(order: Start, error: BaseException) -> str:
    """Return what would save most memory in this job, and how much; "" where that cannot be told."""
    from agent.trainer import check, estimate

    spec = order.spec
    if isinstance(error, TrainerError):  # it was tried with single rows: a smaller micro-batch is no advice
        spec = msgspec.structs.replace(spec, training=msgspec.structs.replace(spec.training, batch_size=1))
    try:
        config = check.config_of(spec, order.workspace, order.limits)
        return " ".join(estimate.advice_for(spec, order.limits, config)[:3])
    except Exception:  # noqa: BLE001  advice must not hide the failure that it is for
        traceback.print_exc()
        return ""


def failure_of(error: BaseException) -> Failure:
    """Return what is told of an error: its reason, a sentence for the user, and the traceback as evidence."""
    trace = "".join(traceback.format_exception(error))[-20_000:]
    if isinstance(error, TrainerError):
        told = error.failure()
        return msgspec.structs.replace(told, evidence=_with(told.evidence or Evidence(), trace))
    reason, sentence, advice = explain(error)
    figures = getattr(error, "advice", "")
    return failure(reason, sentence, _with(Evidence(), trace), figures or advice)


def _with(evidence: Evidence, trace: str) -> Evidence:
    peak, free = _device_memory_gb()
    return msgspec.structs.replace(
        evidence,
        traceback=trace,
        device_memory_gb=peak,
        device_free_gb=free,
        host_memory_gb=_host_memory_gb(),
    )


def _device_memory_gb() -> tuple[float | None, float | None]:
    """Return the peak of what was allocated on the device, and what is free there now."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None, None
    peak, free = torch.cuda.max_memory_allocated() / (1 << 30), None
    with contextlib.suppress(RuntimeError):  # after an error of the device it answers nothing more
        free = torch.cuda.mem_get_info()[0] / (1 << 30)
    return peak, free


def _host_memory_gb() -> float | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (1 << 30 if sys.platform == "darwin" else 1 << 20)
