"""One attempt at a job: a trainer forked from this process, which has its imports done, and what it says."""

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from agent.runtime import boot
from agent.runtime.bytequeue import ByteQueue, FrameReader, make_queue
from protocol.worker import MAX_EVENT, AnyEvent, AnyOrder, Committed, encoder, event_decoder

Body = Callable[[ByteQueue, ByteQueue], int]
"""What a trainer does with its two queues; returns its exit code."""


class Attempt:
    """A trainer process. Its events are committed as an agent does it, as they are heard."""

    def __init__(self, body: Body, log: Path) -> None:
        # A copy of a process with running threads may hold their locks for ever. Arrow's allocator has one, and
        # minds being forked.
        names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
        assert len([name for name in names if not name.startswith("jemalloc")]) == 1, names
        ctx = multiprocessing.get_context("fork")
        self._orders, self._events = make_queue(ctx), make_queue(ctx)
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _become(body, log, self._orders, self._events)
        self._orders.close_reader()
        self._events.close_writer()
        self._frames = FrameReader(MAX_EVENT)
        self.silent = False
        """It has closed its end: nothing more will come."""

    def order(self, order: AnyOrder) -> None:
        self._orders.put(encoder.encode(order))

    def hear(self, timeout: float) -> list[AnyEvent]:
        """Return what was said within ``timeout`` seconds, as soon as there is something."""
        fd = self._events.fileno()
        if not select.select([fd], [], [], timeout)[0]:
            return []
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            self.silent = True
            return []
        heard = [event_decoder.decode(frame) for frame in self._frames.feed(chunk)]
        if heard and heard[-1].number:
            with contextlib.suppress(BrokenPipeError):  # it has gone; its last words are worth having
                self.order(Committed(heard[-1].number))
        return [numbered.event for numbered in heard]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> int:
        """Wait for the process, and return its exit code, negative for a signal."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self._orders.close()
        self._events.close()
        return code


def _become(body: Body, log: Path, orders: ByteQueue, events: ByteQueue) -> NoReturn:
    """Be a trainer, as `agent.runtime.boot` would begin it."""
    code = 1
    try:
        os.setsid()
        boot.claim_output(str(log))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        orders.close_writer()
        events.close_reader()
        code = body(orders, events)
    except BaseException:  # noqa: BLE001  the outermost frame of a process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_a_child(work: Callable[[], Any]) -> None:
    """Do something that starts threads, in a copy of this process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001  the outermost frame of a process
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the model and the rows could not be made")
