"""One hub per data folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.hub.errors import CannotStart


@contextmanager
def only_one(data_dir: Path) -> Iterator[None]:
    """Hold the folder while the context is open; raises CannotStart if another hub holds it."""
    try:
        import fcntl
    except ImportError:
        # Windows: SQLite's own locks still keep the database whole.
        yield
        return
    with (data_dir / "hub.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CannotStart(
                f"another hub already uses {data_dir}. Stop it, or choose another --data-dir."
            ) from None
        yield
