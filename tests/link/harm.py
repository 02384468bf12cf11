"""What is done to the programs and to what lies between them, one thing at a time."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable

from tests.link.stand import HEARTBEAT, Stand, pause

UNNOTICED = 2.5 * HEARTBEAT
"""Seconds after which an agent must have noticed that nobody answers."""


class Harm:
    """Does harm to a stand, and undoes it."""

    def __init__(self, stand: Stand, rng: random.Random, *, long: bool, only: str = "") -> None:
        self.stand, self.rng, self.long = stand, rng, long
        self.done: Counter[str] = Counter()
        kinds: list[Callable[[str, Callable[[], None]], None]] = [
            self.cut,
            self.stall,
            self.half_open,
            self.throttle,
            self.corrupt,
            self.refuse,
            self.no_sockets,
            self.hub_killed,
            self.agent_killed,
            self.trainer_killed,
            self.sleep,
            self.long_outage,
        ]
        kinds += [self.disk_full] if stand.disk else []
        self.kinds = [kind for kind in kinds if only in kind.__name__]
        self._bag: list[Callable[[str, Callable[[], None]], None]] = []

    def one(self, job: str, meanwhile: Callable[[], None]) -> str:
        """Do the next harm, each kind once before any comes again; call ``meanwhile`` while it lasts."""
        if not self._bag:
            self._bag = self.rng.sample(self.kinds, len(self.kinds))
        kind = self._bag.pop()
        self.done[kind.__name__] += 1
        began = time.monotonic()
        kind(job, meanwhile)
        self.stand.alive()
        return f"{kind.__name__} {time.monotonic() - began:.1f} s"

    def some(self, most: float) -> float:
        """Return a time that a fault may last."""
        return self.rng.uniform(0.1, most) * (2 if self.long else 1)

    def cut(self, job: str, meanwhile: Callable[[], None]) -> None:
        for _ in range(self.rng.randint(1, 4)):
            self.stand.network("cut")
            pause(self.some(0.8))
        meanwhile()

    def stall(self, job: str, meanwhile: Callable[[], None]) -> None:
        self.stand.network("stall")
        meanwhile()
        pause(self.some(UNNOTICED))
        if self.rng.random() < 0.5:
            self.stand.network("cut")
        self.stand.network("heal")

    def half_open(self, job: str, meanwhile: Callable[[], None]) -> None:
        self.stand.network("half_open")
        meanwhile()
        pause(UNNOTICED + self.some(0.5))

    def throttle(self, job: str, meanwhile: Callable[[], None]) -> None:
        self.stand.network(f"throttle {self.rng.choice([500, 3000, 20000])}")
        meanwhile()
        pause(self.some(3.0))
        self.stand.network("heal")

    def corrupt(self, job: str, meanwhile: Callable[[], None]) -> None:
        self.stand.network(f"corrupt {self.rng.randint(1, 3)} heads")
        meanwhile()
        pause(self.some(1.5))
        self.stand.network("heal")

    def refuse(self, job: str, meanwhile: Callable[[], None]) -> None:
        self.stand.network("refuse")
        self.stand.network("cut")
        meanwhile()
        pause(self.some(3.0))
        self.stand.network("accept")

    def no_sockets(self, job: str, meanwhile: Callable[[], None]) -> None:
        self.stand.network("no_sockets")
        self.stand.network("cut")
        # Until REST has the records, and then for a while.
        self.stand.wait_presence("polling")
        meanwhile()
        pause(self.some(3.0))
        self.stand.network("heal")

    def hub_killed(self, job: str, meanwhile: Callable[[], None]) -> None:
        self.stand.hub.stop(signal.SIGKILL)
        pause(self.some(1.0))
        self.stand.hub.start()
        meanwhile()

    def agent_killed(self, job: str, meanwhile: Callable[[], None]) -> None:
        if self.rng.random() < 0.7:
            # What its trainer says from here on is in the pipe between them when it dies.
            self.stand.signal_agent(signal.SIGSTOP)
            pause(self.some(1.5))
        self.stand.kill_agent()
        meanwhile()
        pause(self.some(1.0))
        self.stand.agent.start()

    def trainer_killed(self, job: str, meanwhile: Callable[[], None]) -> None:
        self.stand.kill_trainer(job)
        meanwhile()

    def sleep(self, job: str, meanwhile: Callable[[], None]) -> None:
        self.stand.signal_agent(signal.SIGSTOP)
        meanwhile()
        pause(self.rng.choice([2.0, 7.0, 12.5]) if self.long else self.some(4.0))
        self.stand.signal_agent(signal.SIGCONT)

    def long_outage(self, job: str, meanwhile: Callable[[], None]) -> None:
        self.stand.hub.stop(signal.SIGKILL)
        pause(self.rng.uniform(30.0, 60.0) if self.long else 6.0)
        self.stand.hub.start()
        meanwhile()

    def disk_full(self, job: str, meanwhile: Callable[[], None]) -> None:
        self.stand.fill()
        meanwhile()
        pause(self.some(3.0))
        self.stand.make_room()
