"""Work that the training thread hands over, done one after the other in a thread of its own."""

import threading
from collections.abc import Callable
from queue import SimpleQueue


class Reporter:
    """Does what it is given, in order. Where something fails, `flush` raises it, and what came after is not done."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._given = 0
        self._done = 0
        self._error: BaseException | None = None
        self._idle = threading.Condition()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"Reporter({self._given - self._done} waiting)"

    @property
    def failed(self) -> bool:
        """Whether `flush` would raise."""
        return self._error is not None

    def give(self, work: Callable[[], None]) -> None:
        """Have ``work`` done soon; never waits."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
            self._thread.start()
        self._given += 1
        self._work.put(work)

    def flush(self) -> None:
        """Wait until all is done. Raises what failed, once."""
        if self._done < self._given:
            with self._idle:
                self._idle.wait_for(lambda: self._done == self._given)
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        while True:
            work = self._work.get()
            try:
                if self._error is None:
                    work()
            except BaseException as error:  # noqa: BLE001  raised again in the thread that trains
                self._error = error
            finally:
                self._done += 1
                if self._done == self._given:
                    with self._idle:
                        self._idle.notify_all()
