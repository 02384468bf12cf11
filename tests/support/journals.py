"""A journal in a folder of the test."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio

from agent.runtime.journal import Journal, Reader


def with_journal(path: Path, use: Callable[[Journal], Awaitable[None]]) -> None:
    """Open the journal at ``path``, use it and close it."""

    async def main() -> None:
        journal = Journal.open(path)
        try:
            await use(journal)
        finally:
            await journal.close()

    anyio.run(main)


async def begin_full(journal: Journal) -> None:
    """Put the journal into the state of a full disk, between two of its looks whether it still is."""

    def begin(_: Reader) -> None:
        journal.path.with_name(journal.path.name + ".ballast").unlink()
        journal.full = True

    await journal.read(begin)


async def until_room(journal: Journal) -> None:
    """Ask until a try for room has found some; it is made after a question."""
    with anyio.fail_after(30):
        while journal.full:
            await journal.read(Reader.epoch)
