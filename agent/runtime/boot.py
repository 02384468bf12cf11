"""The first steps of a trainer process. Standard library only, so that nothing can print before its time.

`spawn` pickles the target of a process by name: `main` is that target, and imports the trainer itself only
when the output, the session, the signals and the environment are as they must be.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import importlib
import os
import signal
import sys
from dataclasses import dataclass, field
from typing import NoReturn

from agent.runtime.bytequeue import ByteQueue


@dataclass(frozen=True)
class Plan:
    """What a child is to become."""

    module: str
    """Its ``main(orders, events)`` is called, and what that returns is the exit code."""
    log: str
    """File for everything that the process and its children print."""
    env: dict[str, str] = field(default_factory=dict)
    """The whole environment; nothing else is left."""
    nice: int = 0


def main(plan: Plan, orders: ByteQueue, events: ByteQueue) -> None:
    """Become the trainer that ``plan`` names, and leave with what that returns."""
    # Its own session: a closed terminal does not reach it, and the whole group can be ended by one signal.
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setsid()
    claim_output(plan.log)
    faulthandler.enable()
    # The agent asks a trainer that stands still where it stands; the answer goes to the log.
    faulthandler.register(signal.SIGUSR1)
    # Ctrl-C belongs to the agent, which blocked it while this process was on its way here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    _measure_coverage()
    os.environ.clear()
    os.environ.update(plan.env)
    if plan.nice:
        os.nice(plan.nice)
    _offer_to_oom_killer()
    orders.close_writer()
    events.close_reader()
    # There is no PR_SET_PDEATHSIG: the death of the agent is an end of file on `orders`, and must
    # leave the time to save.
    _leave(importlib.import_module(plan.module).main(orders, events))


def _leave(code: int) -> NoReturn:
    """End this process now. To take torch's modules apart one by one would hold a pause up for a second or two."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # What native code has printed may still lie in the C library's own buffers.
    ctypes.CDLL(None).fflush(None)
    os._exit(code)


def claim_output(log: str) -> None:
    """Send every print of this process and its children to ``log``, native ones too."""
    target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    for stream in (sys.stdout, sys.stderr):
        # Without line buffering the last lines are lost when the process leaves by os._exit.
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]


def _offer_to_oom_killer() -> None:
    """When memory runs out, the trainer goes and not the agent, which can start it again."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123  (pathlib costs its import)
        score.write("500")


def _measure_coverage() -> None:
    """Under a coverage run of the tests, count this process too."""
    if "COVERAGE_PROCESS_START" in os.environ:
        import coverage  # a tool of the tests, absent otherwise

        if coverage.Coverage.current() is None:
            coverage.process_startup()
