"""Work that the training thread hands over, done one after the other in a thread of its own."""

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

NAP = 0.05
"""Seconds between looks for more work, until there is none: to wake a sleeping thread costs the training thread more
than all the rest, so where steps are short it is not done at each."""


class Reporter:
    """Does what it is given, in order. Where something fails, `flush` raises it, and what came after is not done."""

    def __init__(self) -> None:
        self._work: deque[Callable[[], None]] = deque()
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._asleep = False
        """The thread looks for work no more before the bell rings."""
        self._error: BaseException | None = None
        self._turn = threading.Lock()
        """Held while work is done, by the thread or by `flush`."""
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"Reporter({len(self._work)} waiting)"

    @property
    def failed(self) -> bool:
        """Whether `flush` would raise."""
        return self._error is not None

    def give(self, work: Callable[[], None]) -> None:
        """Have ``work`` done soon; never waits."""
        self._work.append(work)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
            self._thread.start()
        elif self._asleep:
            self._asleep = False
            self._bell.put(None)

    def flush(self) -> None:
        """Do what is left here and now. Raises what failed, once."""
        self._do_all()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        while True:
            while self._do_all():
                time.sleep(NAP)
            self._asleep = True
            if not self._work:  # else it was given before this thread could be seen asleep
                self._bell.get()
            self._asleep = False

    def _do_all(self) -> bool:
        """Do all that waits; return whether there was anything."""
        with self._turn:
            some = bool(self._work)
            while self._work:
                # Taken out when it is done: whoever finds nothing waiting knows that nothing is being done.
                try:
                    if self._error is None:
                        self._work[0]()
                except BaseException as error:  # noqa: BLE001  raised again in the thread that trains
                    self._error = error
                finally:
                    self._work.popleft()
        return some
