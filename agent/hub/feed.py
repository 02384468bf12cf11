"""News inside the hub: what was stored, told to the pages that look at it."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from agent.hub.points import Dot

AGENTS = ""
"""The topic of all agents and of the list of jobs."""
MOST_KEPT = 5000


@dataclass(eq=False)
class Watch:
    """What came since a page last looked. ``missed`` says that it should read everything again."""

    event: asyncio.Event = field(default_factory=asyncio.Event)
    dots: list[Dot] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    missed: bool = False

    def take(self) -> tuple[list[Dot], list[str], bool]:
        """Return points, log lines and whether some were missed, and begin anew."""
        taken = self.dots, self.lines, self.missed
        self.dots, self.lines, self.missed = [], [], False
        self.event.clear()
        return taken


class Feed:
    """Topics are job ids, and AGENTS."""

    def __init__(self) -> None:
        self._watches: defaultdict[str, set[Watch]] = defaultdict(set)

    def watched(self, topic: str) -> bool:
        """Tell whether anybody looks at ``topic``."""
        return topic in self._watches

    def tell(self, topic: str, dots: list[Dot] | None = None, lines: list[str] | None = None) -> None:
        """Wake the pages of ``topic``; a page that falls behind is told to read again."""
        for watch in self._watches.get(topic, ()):
            if len(watch.dots) + len(dots or []) > MOST_KEPT or len(watch.lines) > MOST_KEPT:
                watch.dots, watch.lines, watch.missed = [], [], True
            else:
                watch.dots += dots or []
                watch.lines += lines or []
            watch.event.set()

    @contextmanager
    def watching(self, topic: str) -> Iterator[Watch]:
        """Hear of ``topic`` while the context is open."""
        watch = Watch()
        self._watches[topic].add(watch)
        try:
            yield watch
        finally:
            self._watches[topic].discard(watch)
            if not self._watches[topic]:
                del self._watches[topic]
