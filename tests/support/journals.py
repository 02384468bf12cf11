"""A journal in a folder of the test."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio

from agent.runtime.journal import Journal


def with_journal(path: Path, use: Callable[[Journal], Awaitable[None]]) -> None:
    """Open the journal at ``path``, use it and close it."""

    async def main() -> None:
        journal = Journal.open(path)
        try:
            await use(journal)
        finally:
            await journal.close()

    anyio.run(main)
