"""The trainer's end of the two queues: orders in, numbered events out, and training never waits for either.

`say` writes an event to the pipe when that takes no waiting, so that a kill in the next moment does not lose
it, and leaves it to a sender thread otherwise. It is kept until the agent has committed it: in memory up to a
limit, then in a file; and when the agent is gone, beside the checkpoint (`protocol.worker.LEFTOVERS`) for the
next one.
"""

import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Protocol

import msgspec

from agent.trainer.overflow import Overflow, write_leftovers
from protocol.worker import (
    LEFTOVERS,
    MAX_EVENT,
    AnyEvent,
    AnyOrder,
    Committed,
    Note,
    Numbered,
    encoder,
    order_decoder,
)

KEEP_BYTES = 32 << 20
"""Encoded events kept in memory; what is beyond lies in a file until there is room."""
LOOK_AGAIN = 0.05
"""Seconds between looks for the agent's process. Mostly the end of its pipe tells that it is gone, and sooner."""
CLOSE_LIMIT = 10.0
"""Seconds that `close` waits for the agent to commit the last events."""


class OrderQueue(Protocol):
    """What is read from; see `agent.runtime.bytequeue.ByteQueue`."""

    def get(self) -> bytes: ...


class EventQueue(Protocol):
    """What is written to."""

    def put(self, frame: bytes, /) -> None: ...

    def try_put(self, frame: bytes, /) -> bool: ...


class Line:
    """The line to the agent. One per process; `say` may be called from any thread."""

    def __init__(self, orders: OrderQueue, events: EventQueue, *, parent_pid: int | None = None) -> None:
        self._order_queue = orders
        self._event_queue = events
        self._parent_pid = parent_pid
        self._look_again = 0.0
        self._attempt = 0
        self._next = 0
        self._folder: Path | None = None
        self._overflow: Overflow | None = None
        # One lock, three conditions: something to send, something ordered, something committed.
        self._lock = threading.Lock()
        self._to_send = threading.Condition(self._lock)
        self._ordered = threading.Condition(self._lock)
        self._settled = threading.Condition(self._lock)
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = 0
        self._sent = 0
        """How many at the head of `_kept` were handed to the queue."""
        self._sending = False
        """The sender thread is writing, or waits for room."""
        self._warm: deque[bytes] = deque()
        self._orders: deque[AnyOrder] = deque()
        self._gone = False
        self._closed = False
        for work in (self._send_events, self._take_orders):
            threading.Thread(target=work, name=f"line {work.__name__}", daemon=True).start()

    def __repr__(self) -> str:
        return (
            f"Line(attempt={self._attempt}, next={self._next}, kept={len(self._kept)}, "
            f"sent={self._sent}, overflow={self._overflow!r}, gone={self._gone})"
        )

    def begin(self, attempt: int, first_event: int, leftovers_folder: str) -> None:
        """Say from now on as ``attempt``, numbering from ``first_event``; called once, at `Start`."""
        with self._lock:
            self._attempt = attempt
            self._next = first_event
            self._folder = Path(leftovers_folder)
            self._overflow = Overflow(self._folder)

    def say(self, event: AnyEvent) -> None:
        """Number an event and ship it soon; never waits for the agent.

        Before `begin` there is no attempt to count in: the event (`Warm`) goes as number 0 of attempt 0
        and is not kept.
        """
        with self._lock:
            nothing_waits = not (self._sending or self._warm) and self._sent == len(self._kept)
            if self._overflow is None:
                self._warm.append(encoder.encode(Numbered(0, 0, event)))
            else:
                number = self._next
                self._next = number + 1
                raw = encoder.encode(Numbered(self._attempt, number, event))
                if len(raw) > MAX_EVENT:
                    # The agent would end us for it. A number must not be missing, so a sentence takes its place.
                    text = f"An event of {len(raw)} bytes ({type(event).__name__}) was too large to send."
                    raw = encoder.encode(Numbered(self._attempt, number, Note("warning", text)))
                kept = self._keep(number, raw, self._overflow)
                if kept and nothing_waits and self._try_put(raw):
                    self._sent += 1
                    return
            self._to_send.notify()

    def _keep(self, number: int, raw: bytes, overflow: Overflow) -> bool:
        """Put an event at the end: in memory, or (False) behind those that are in the file already."""
        if overflow.count or self._kept_bytes + len(raw) > KEEP_BYTES:
            overflow.append(number, raw)
            return False
        self._kept.append((number, raw))
        self._kept_bytes += len(raw)
        return True

    def _try_put(self, raw: bytes) -> bool:
        try:
            return self._event_queue.try_put(raw)
        except (OSError, ValueError):
            return False  # the agent closed its end: the sender thread will find that out and say so

    def orders(self) -> list[AnyOrder]:
        """Take the orders that have come; never waits."""
        if not self._orders:  # the usual case at every step, and it needs no lock
            return []
        with self._lock:
            taken = list(self._orders)
            self._orders.clear()
        return taken

    def wait_order(self, timeout: float | None = None) -> AnyOrder | None:
        """Wait for one order; None when time is up or the agent is gone."""
        with self._lock:
            self._ordered.wait_for(lambda: self._orders or self._gone, timeout)
            return self._orders.popleft() if self._orders else None

    @property
    def parent_gone(self) -> bool:
        """Whether the agent has died: save, `close`, leave."""
        if not self._gone and self._parent_pid is not None:
            now = time.monotonic()
            if (
                now >= self._look_again
            ):  # training asks in every micro-batch, and a system call is dear on some hosts
                self._look_again = now + LOOK_AGAIN
                if os.getppid() != self._parent_pid:
                    self._hang_up()
        return self._gone

    def flush(self, timeout: float) -> bool:
        """Wait until everything said was committed; False when time is up or the agent is gone."""
        with self._lock:
            self._settled.wait_for(lambda: self._gone or not self._kept, timeout)
            return not self._kept

    def close(self) -> None:
        """End the line: what the agent has not committed is left on disk. Harmless when repeated."""
        if self._closed:
            return
        self.flush(CLOSE_LIMIT)
        with self._lock:
            self._closed = True
            self._to_send.notify()
            if self._overflow is not None and self._folder is not None:
                kept = [raw for _, raw in self._kept]
                if kept or self._overflow.count:
                    write_leftovers(self._folder / LEFTOVERS, kept, self._overflow)
                self._overflow.remove()

    def _send_events(self) -> None:
        """The sender thread: the only one that waits for a full pipe."""
        while True:
            with self._lock:
                self._to_send.wait_for(
                    lambda: self._warm or self._sent < len(self._kept) or self._closed or self._gone
                )
                if self._closed or self._gone:
                    return
                self._sending = True
                if self._warm:
                    raw = self._warm.popleft()
                else:
                    raw = self._kept[self._sent][1]
                    self._sent += 1
            try:
                self._event_queue.put(raw)
            except (OSError, ValueError):  # the agent closed its end, or this process closed ours
                self._hang_up()
                return
            with self._lock:
                self._sending = False

    def _take_orders(self) -> None:
        """The reader thread: the only one that waits for an order."""
        while True:
            try:
                raw = self._order_queue.get()
            except (EOFError, OSError, TypeError):  # TypeError: closed under our feet while reading
                self._hang_up()
                return
            try:
                order = order_decoder.decode(raw)
            except msgspec.DecodeError as error:
                self.say(
                    Note("warning", f"An order of the agent could not be read and was not obeyed: {error}")
                )
                continue
            with self._lock:
                if isinstance(order, Committed):
                    self._forget(order.number)
                else:
                    self._orders.append(order)
                    self._ordered.notify_all()

    def _forget(self, number: int) -> None:
        """Drop what the agent has committed and make room for what waits in the file."""
        while self._kept and self._sent and self._kept[0][0] <= number:
            _, raw = self._kept.popleft()
            self._kept_bytes -= len(raw)
            self._sent -= 1
        if self._overflow is not None and self._overflow.count and self._kept_bytes <= KEEP_BYTES // 2:
            for entry in self._overflow.take(KEEP_BYTES // 4):
                self._kept.append(entry)
                self._kept_bytes += len(entry[1])
            self._to_send.notify()
        if not self._kept:
            self._settled.notify_all()

    def _hang_up(self) -> None:
        with self._lock:
            self._gone = True
            for condition in (self._to_send, self._ordered, self._settled):
                condition.notify_all()
