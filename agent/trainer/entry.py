"""The trainer process from its imports to its last word. Started by name; nothing imports it."""

import errno
import logging
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from agent.trainer.errors import TrainerError
from agent.trainer.line import EventQueue, Line, OrderQueue
from protocol.failures import Evidence, Failure, FailureReason, failure
from protocol.worker import Failed, Start, Warm

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
        line.say(Failed(failure_of(error)))
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

    from agent.trainer import run

    datasets.disable_progress_bars()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal():
        torch.set_num_threads(max(1, int(threads)))
    line.say(Warm(os.getpid(), time.monotonic() - began))
    order = line.wait_order()
    while order is not None and not isinstance(order, Start):
        order = line.wait_order()
    if order is None:  # the agent is gone, and there is no job
        return 0
    line.begin(order.attempt, order.first_event, order.workspace.checkpoints)
    return run.train(order, line)


def failure_of(error: BaseException) -> Failure:
    """Return what is told of an error: its reason, a sentence for the user, and the traceback as evidence."""
    trace = "".join(traceback.format_exception(error))[-20_000:]
    if isinstance(error, TrainerError):
        told = error.failure()
        evidence = told.evidence or Evidence()
        return failure(told.reason, told.sentence, _with(evidence, trace))
    reason, sentence = _explain(error)
    return failure(reason, sentence, _with(Evidence(), trace))


def _with(evidence: Evidence, trace: str) -> Evidence:
    torch = sys.modules.get("torch")
    on_cuda = torch is not None and torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() / (1 << 30) if torch is not None and on_cuda else None
    return Evidence(
        traceback=trace,
        step=evidence.step,
        rows=evidence.rows,
        device_memory_gb=peak,
        host_memory_gb=_host_memory_gb(),
    )


def _explain(error: BaseException) -> tuple[FailureReason, str]:
    """Return reason and sentence for an error that is not ours."""
    kind, text = type(error).__name__, str(error).strip()
    first = text.splitlines()[0][:500] if text else "no further words"
    if kind == "OutOfMemoryError" or "CUDA out of memory" in text:
        return (
            FailureReason.DEVICE_MEMORY,
            f"The device's memory did not suffice: {first} "
            "Lower training.batch_size (and raise gradient_accumulation_steps), lower max_length, "
            "or turn gradient_checkpointing on.",
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return (
            FailureReason.HOST_MEMORY,
            f"The machine's memory did not suffice: {first}. Lower training.batch_size or max_length, "
            "or close other programs.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({Path(error.filename).parent})" if isinstance(error.filename, str) else ""
        return FailureReason.DISK_FULL, f"The disk is full{where}. Free some space, then resume the job."
    if kind == "AcceleratorError" or text.startswith("CUDA error"):
        return FailureReason.DRIVER, f"The device reported an error: {first}"
    return (
        FailureReason.INTERNAL,
        f"The trainer met an error that it has no answer for, {kind}: {first}. "
        "The job's log and its checkpoints are kept.",
    )


def _host_memory_gb() -> float | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (1 << 30 if sys.platform == "darwin" else 1 << 20)
