"""Finding out that the machine slept: the clocks that went on are ahead of those that stood still."""

import time
from dataclasses import dataclass

EVERY = 1.0
"""Seconds between looks."""
SUSPENDED = 2.0
"""Seconds that the clock which counts a suspend may gain on the one which does not, between two looks."""
DIVERGED = 5.0
"""Seconds that the wall clock may gain: a virtual machine that was paused, or a system whose steady clock stops too."""
LATE = 10.0
"""Seconds that a look may come late: this process was stopped, or starved."""


@dataclass(frozen=True)
class Clocks:
    """What the time is, in seconds, by each clock."""

    wall: float
    steady: float
    """Stops while a Linux machine sleeps; what every timer here counts by."""
    boot: float
    """Goes on in a suspend, where the system has such a clock."""


def read_clocks() -> Clocks:
    """Return what the time is now."""
    steady = time.monotonic()
    boot = time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else steady
    return Clocks(time.time(), steady, boot)


def slept(before: Clocks, now: Clocks, due: float = EVERY) -> float:
    """Return for how many seconds nobody looked although ``due`` had passed: asleep, stopped or paused; else 0.

    A wall clock that was set back, or forward by less than `DIVERGED`, is no sleep.
    """
    steady = now.steady - before.steady
    gained = max(
        now.boot - before.boot - steady if now.boot - before.boot - steady > SUSPENDED else 0.0,
        now.wall - before.wall - steady if now.wall - before.wall - steady > DIVERGED else 0.0,
    )
    late = steady - due if steady - due > LATE else 0.0
    return gained + late
