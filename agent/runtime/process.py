"""One trainer process: its queues, its exit, and the way to its end.

Nothing that a child does can hold up the agent's loop or grow its memory: its events are read without
waiting and only as fast as they are taken, its orders are written without waiting, and its exit is told by a
pidfd, which a grandchild that inherited the pipes cannot delay.
"""

import multiprocessing
import os
import signal
import sys
import types
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

import anyio
import anyio.to_thread

from agent.runtime import boot
from agent.runtime.bytequeue import PIPE_SIZE, BadFrame, FrameReader, make_queue, pack
from agent.runtime.tree import LINUX, Identity, identify, members, orphan_alive, orphan_gone, sweep
from protocol.worker import MAX_EVENT

__all__ = ["Child", "Identity", "orphan_alive", "orphan_gone"]

READ_SIZE = 1 << 18
MAX_ORDERS = 1 << 24
"""Bytes of orders that may wait for a child that does not read them."""

Hear = Callable[[list[bytes]], Awaitable[None]]
"""Is given events that came together, in order; called by one at a time."""
Blame = Callable[[str], Awaitable[None]]


class Child:
    """A child process of the spawn context that runs ``boot.main(plan, ...)``."""

    def __init__(self, plan: boot.Plan, *, term_grace: float = 5.0, kill_limit: float = 30.0) -> None:
        self.plan = plan
        self.term_grace = term_grace
        self.kill_limit = kill_limit
        self.exited = anyio.Event()
        """Its process has ended."""
        self.gone = anyio.Event()
        """Its whole tree has ended, or `survivors` names who did not."""
        self.survivors: frozenset[Identity] = frozenset()
        self.forced: signal.Signals | None = None
        """The strongest signal that was sent from here."""
        self.known: set[Identity] = set()
        """Everyone of its tree that was ever seen, for the proof that their memory left the device."""
        ctx = multiprocessing.get_context("spawn")
        self._orders = make_queue(ctx)
        self._events = make_queue(ctx)
        self._process = ctx.Process(
            target=boot.main,
            args=(plan, self._orders.reading_end(), self._events.writing_end()),
            name="trainer",
        )
        self._pidfd: int | None = None
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        self._latest: bytes | None = None
        self._something_to_write = anyio.Event()
        self._idle = anyio.CancelScope()
        self._deaf = False
        self.identity = Identity(0, 0.0)

    def __repr__(self) -> str:
        return f"Child(pid={self.identity.pid}, exited={self.exited.is_set()}, forced={self.forced!r})"

    @property
    def exit_code(self) -> int | None:
        """What it left with; negative for the signal that ended it. None while it lives."""
        return self._process.exitcode if self.exited.is_set() else None

    @property
    def is_ending(self) -> bool:
        """It has ended or was sent a signal: whatever it had to save is saved or lost."""
        return self.exited.is_set() or self.forced is not None

    def start(self) -> Identity:
        """Start the process. Called on the main thread, where a signal to it can be held back.

        Raises OSError when the log cannot be written or no process can be made.
        """
        log = Path(self.plan.log)
        log.parent.mkdir(parents=True, exist_ok=True)
        # Tried here, where somebody can be told; the child could only die of it.
        os.close(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
        # Its first start unblocks the very signal that is to be held back.
        resource_tracker.ensure_running()
        with _plain_main(), _interrupts_held_back():
            self._process.start()
        pid = self._process.pid
        assert pid is not None
        if LINUX:
            self._pidfd = os.pidfd_open(pid)
        self.identity = identify(pid) or Identity(pid, 0.0)
        self._orders.close_reader()
        self._events.close_writer()
        os.set_blocking(self._orders.writer_fileno(), False)
        os.set_blocking(self._events.fileno(), False)
        return self.identity

    def send(self, order: bytes, *, replaces: bool = False) -> None:
        """Have an order written; never waits. ``replaces``: only the newest of such matters (Committed)."""
        if replaces:
            self._latest = pack(order)
        elif self._outbox_bytes < MAX_ORDERS:
            self._outbox.append(pack(order))
            self._outbox_bytes += len(self._outbox[-1])
        self._something_to_write.set()

    async def run(self, hear: Hear, blame: Blame) -> None:
        """Carry events to ``hear`` and orders to the child until its whole tree is gone.

        What the pipe held when it died still goes to ``hear``. ``blame`` is told, once, of bytes that are
        no frames; the child is ended for them.
        """
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._write_orders)
            tasks.start_soon(self._watch)
            try:
                await self._read_events(hear)
            except BadFrame as error:
                self.kill()
                await blame(f"The trainer broke the line to the agent: {error}.")
            if not self.exited.is_set() and self._listening():
                # It closed its end, so it is leaving. One that then stays is stuck on its way out.
                with anyio.move_on_after(self.kill_limit):
                    await self.exited.wait()
                if not self.exited.is_set():
                    tasks.start_soon(self.end, None, 0.0)
            await self.gone.wait()
            tasks.cancel_scope.cancel()
        self.close()

    async def end(self, ask: bytes | None, grace: float) -> None:
        """Ask, wait, SIGTERM, wait, SIGKILL: each with a limit of its own. Returns when `gone` is set.

        May be called again while it runs, with less grace.
        """
        await self._look_at_tree()
        if grace > 0:
            if ask is not None:
                self.send(ask)
            with anyio.move_on_after(grace):
                await self.exited.wait()
        if not self.exited.is_set():
            await self._look_at_tree()
            self._signal(signal.SIGTERM)
            with anyio.move_on_after(self.term_grace):
                await self.exited.wait()
        if not self.exited.is_set():
            await self._look_at_tree()
            self.kill()
        with anyio.move_on_after(self.kill_limit):
            await self.exited.wait()
        if not self.exited.is_set():
            # Not even SIGKILL: it hangs in a driver. Whoever waits must be released all the same.
            self.survivors = members(self.identity.pid, self.known)
            self._stop_reading()
            self.gone.set()
        await self.gone.wait()

    @property
    def is_heard(self) -> bool:
        """Whether what it says still counts: not after `kill`."""
        return self._listening()

    def kill(self) -> None:
        """SIGKILL it and its group at once, and take no more from it."""
        self._stop_reading()
        self._signal(signal.SIGKILL)

    async def bury(self, limit: float) -> None:
        """End it without a word and with no help of `run`, which was cancelled. Safe to repeat."""
        if not self.exited.is_set():
            await self._look_at_tree()
            self.kill()
            with anyio.move_on_after(limit):
                await self._leader_gone()
                self.exited.set()
        self.survivors = await sweep(self.identity.pid, self.known, limit)
        self.gone.set()
        self.close()

    def abandon(self) -> None:
        """Let go of it, alive as it is: the end of file on its orders tells it to save and leave.

        For the time after `run` was cancelled. Nobody waits for it then, not even the exit of this program.
        """
        self.close()
        # All that stand here are joined at the exit of the interpreter, which would last as long as the save.
        multiprocessing.process._children.discard(self._process)  # type: ignore[attr-defined]

    def close(self) -> None:
        """Close what the agent holds of it, and reap it."""
        self._orders.close()
        self._events.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if self.exited.is_set():
            self._process.join()

    async def _read_events(self, hear: Hear) -> None:
        frames = FrameReader(MAX_EVENT)
        fd = self._events.fileno()
        # After the end of the tree the pipe holds at most its own size, whatever an escaped
        # grandchild goes on to write.
        left = PIPE_SIZE + READ_SIZE
        while self._listening() and left > 0:
            over = self.gone.is_set()
            try:
                chunk = os.read(fd, READ_SIZE)
            except BlockingIOError:
                if over:
                    return
                await self._readable(fd)
                continue
            if not chunk:
                return
            if over:
                left -= len(chunk)
            if whole := frames.feed(chunk):
                await hear(whole)

    async def _readable(self, fd: int) -> None:
        """Wait for bytes or for the end of the tree. Only this wait is ever cut short, never a hand-over."""
        with anyio.CancelScope() as self._idle:
            if not self.gone.is_set() and self._listening():
                await anyio.wait_readable(fd)

    async def _write_orders(self) -> None:
        fd = self._orders.writer_fileno()
        while True:
            if self._outbox:
                data = self._outbox.popleft()
                self._outbox_bytes -= len(data)
            elif self._latest is not None:
                data, self._latest = self._latest, None
            else:
                self._something_to_write = anyio.Event()
                await self._something_to_write.wait()
                continue
            while data:
                try:
                    data = data[os.write(fd, data) :]
                except BlockingIOError:
                    await anyio.wait_writable(fd)
                except BrokenPipeError:
                    return

    async def _watch(self) -> None:
        await self._leader_gone()
        self.exited.set()
        # The leader is still a zombie here, so that its number, which names session and group, is not
        # given to another. What it left behind has nothing to save.
        self.survivors = await sweep(self.identity.pid, self.known, self.kill_limit)
        self.gone.set()
        self._idle.cancel()

    async def _leader_gone(self) -> None:
        if self._pidfd is not None:
            await anyio.wait_readable(self._pidfd)
        else:
            await anyio.to_thread.run_sync(self._process.join, abandon_on_cancel=True)

    async def _look_at_tree(self) -> None:
        """Note who descends from it: one that left the session is found again by this alone."""
        if not self.exited.is_set():
            self.known |= await anyio.to_thread.run_sync(members, self.identity.pid, frozenset(self.known))

    def _signal(self, number: signal.Signals) -> None:
        if self.exited.is_set() or self._process.pid is None:
            return
        if self.forced is not signal.SIGKILL:
            self.forced = number
        pid = self.identity.pid
        try:
            # In its first moments it is in the agent's own group.
            if os.getpgid(pid) == pid:
                os.killpg(pid, number)
            else:
                os.kill(pid, number)
        except ProcessLookupError:
            return  # reaped by the start of another child: the pidfd is about to tell

    def _listening(self) -> bool:
        return not self._deaf

    def _stop_reading(self) -> None:
        self._deaf = True
        self._idle.cancel()


@contextmanager
def _plain_main() -> Iterator[None]:
    """Hide the main module from `spawn`, which would import it again in the child, and the command line.

    The target lives in `agent.runtime.boot`, so the child has no use for either.
    """
    main, argv = sys.modules["__main__"], sys.argv
    sys.modules["__main__"], sys.argv = types.ModuleType("__main__"), argv[:1]
    try:
        yield
    finally:
        sys.modules["__main__"], sys.argv = main, argv


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Block SIGINT: the child inherits that, and is not hit by a Ctrl-C before it leads its own session."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
