"""One agent per home."""

import fcntl
import os
from pathlib import Path
from types import TracebackType

from agent.errors import AlreadyRunning


class HomeLock:
    """Holds ``home/agent.lock`` from entry to exit; the kernel lets go of it however the process ends.

    Raises AlreadyRunning on entry when it is taken.
    """

    def __init__(self, home: Path) -> None:
        self.path = home / "agent.lock"
        self._fd: int | None = None

    def __enter__(self) -> "HomeLock":
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Not inheritable: a trainer that outlives the agent must not hold it.
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 32).decode("ascii", "replace").strip()
            os.close(fd)
            raise AlreadyRunning(
                f"An agent runs on {self.path.parent} already ({f'process {holder}' if holder else 'who, it does not say'}). "
                "Stop it first, or give this one a home of its own with AGENT_HOME."
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        self._fd = fd
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The file stays: to remove it would let two agents lock two files of one name.
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
