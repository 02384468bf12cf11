"""Whether the machine's memory runs out, and which trainer is to be paused for it."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

WINDOW = 30.0
"""Seconds over which growth is measured."""
MARGIN = 512 << 20
"""Bytes that must be free beyond what a paused trainer will need, or less where the reserve is less."""
GB = 1 << 30


@dataclass(frozen=True)
class Shortage:
    """A trainer is to be paused."""

    job_id: str
    why: str
    room: int
    """Bytes that must be free before it goes on."""


class HostMemory:
    """What was seen of the machine's memory, and of that of each trainer."""

    def __init__(self, reserve: int) -> None:
        self._reserve = reserve
        self._samples: deque[tuple[float, Mapping[str, int]]] = deque()
        self._available = 0
        self._total = 0
        self._first: dict[str, int] = {}
        """What each trainer held when its training began."""

    def note(self, now: float, available: int, total: int, held: Mapping[str, int]) -> None:
        """Take in what is free, and what the trainer of each training job holds."""
        self._available, self._total = available, total
        self._samples.append((now, held))
        while now - self._samples[0][0] > WINDOW:
            self._samples.popleft()
        self._first = {job_id: self._first.get(job_id, size) for job_id, size in held.items()}

    def held(self, job_id: str) -> int | None:
        """Return what a job's trainer held when it was last looked at."""
        return next((held[job_id] for _, held in reversed(self._samples) if job_id in held), None)

    def shortage(self) -> Shortage | None:
        """Return which trainer is to be paused now: the one that grows, or the largest where others eat the rest."""
        if not self._reserve or not self._samples or self._available >= self._reserve:
            return None
        now, held = self._samples[-1]
        began, before = self._samples[0]
        grown = {job_id: size - before.get(job_id, self._first[job_id]) for job_id, size in held.items()}
        if not grown:
            return None
        job_id = max(grown, key=lambda one: grown[one])
        if grown[job_id] < self._reserve // 16:
            if self._available >= self._reserve // 2:
                return None
            # Others take what is left, and the kernel would end a trainer first.
            job_id = max(held, key=lambda one: held[one])
        needs = max(self._first[job_id], held[job_id] // 2)
        room = self._reserve + needs + min(self._reserve, MARGIN)
        return Shortage(
            job_id,
            f"The machine's memory is nearly full: {self._available / GB:.2f} of {self._total / GB:.1f} GB are free, "
            f"less than HOST_MEMORY_RESERVE_MB ({self._reserve >> 20}). The trainer holds {held[job_id] / GB:.2f} GB, "
            f"{grown[job_id] / GB:+.2f} GB in {now - began:.0f} s; it was paused before the kernel would end it.",
            room,
        )
