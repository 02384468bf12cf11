"""Keeping a page up to date while somebody looks at it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from nicegui import background_tasks, ui

from agent.hub.feed import Feed, Watch

log = logging.getLogger("agent.hub")

PACE = 0.25
"""Seconds between two updates of a page."""
REST = 5.0
"""Seconds after which a page is updated without news: ages and estimates grow old."""


def follow(feed: Feed, topic: str, update: Callable[[Watch], Awaitable[None]]) -> None:
    """Call ``update`` when there is news of ``topic``, from the browser's arrival to its end."""
    client = ui.context.client
    tasks: list[asyncio.Task[None]] = []

    async def run() -> None:
        with feed.watching(topic) as watch:
            while not client.is_deleted:
                with client:
                    await update(watch)
                await asyncio.sleep(PACE)
                with suppress(TimeoutError):
                    async with asyncio.timeout(REST):
                        await watch.event.wait()

    def start() -> None:
        if not tasks:
            tasks.append(background_tasks.create(run(), name=f"follow {topic or 'all'}"))

    def stop() -> None:
        for task in tasks:
            task.cancel()

    client.on_connect(start)
    client.on_delete(stop)
