"""Pauses jobs before the machine runs out of something, lets them go on after, and ends trainers that stand still."""

import time
from collections.abc import Callable

import anyio
import anyio.to_thread
from loguru import logger

from agent.config import Settings
from agent.core.effects import Effect
from agent.core.explain import Seen
from agent.core.job import Job, note, short_of_memory, unhold
from agent.core.pace import Pace
from agent.desk import JobDesk
from agent.runtime import tree
from agent.runtime.ending import log_tail
from agent.runtime.redact import Redactor
from agent.witness import Witness, with_stack
from protocol.lifecycle import JobState
from protocol.worker import AnyEvent

TICK = 1.0
"""Seconds between looks at memory, at the driver and at how long ago each trainer was heard of."""
DISK_TICKS = 3
"""Looks at the disk are so many times rarer."""
AGAIN = 60.0
"""Seconds between two times that a job is let go on by itself."""
STACK_WITHIN = 3.0
"""Seconds that a trainer is given to write where it stands to its log."""
IS_BACK = {
    "memory": "There is enough memory again, so the job goes on.",
    "disk": "There is room on the disk again, so the job goes on.",
}


class Guard:
    """Runs beside the desk; `run` it in a task group."""

    def __init__(
        self,
        desk: JobDesk,
        settings: Settings,
        redactor: Redactor,
        witness: Witness,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desk = desk
        self._settings = settings
        self._redactor = redactor
        self._witness = witness
        self._clock = clock
        self._monotonic = monotonic
        self._awake = 0.0
        self._ticked = monotonic()
        self._ticks = 0
        self._paces: dict[tuple[str, int], Pace] = {}
        self._ended: dict[tuple[str, int], tuple[str, list[str]]] = {}
        """Trainers that were ended because they stood still: the sentence, and where they stood."""
        self._let_go: dict[str, float] = {}
        self._enough: dict[str, int] = {}
        """Looks in a row at which a job that is paused for memory would have had enough."""

    def now(self) -> float:
        """Return the seconds that this process has been awake: asleep with the machine, nobody stands still."""
        return self._awake + min(self._monotonic() - self._ticked, 2 * TICK)

    def heard(self, job_id: str, attempt: int, event: AnyEvent) -> None:
        """Take in that a trainer has said something."""
        if not self._settings.stall_factor:
            return
        pace = self._paces.get((job_id, attempt))
        if pace is None:
            for old in [key for key in self._paces if key[0] == job_id]:
                del self._paces[old]
            shortest = self._settings.stall_min_seconds
            pace = self._paces[job_id, attempt] = Pace(self._settings.stall_factor, shortest)
        pace.heard(event, self.now())

    async def seen(self, job_id: str, attempt: int) -> Seen:
        """Return what was seen of the machine, and of the trainer where it was ended for standing still."""
        try:
            seen = await self._witness.seen(job_id)
        except OSError as error:
            # The end itself must be taken in, whatever the machine does not tell of it.
            logger.warning("job {}: the machine could not be looked at: {}", job_id, error)
            seen = Seen()
        ended = self._ended.pop((job_id, attempt), None)
        return with_stack(seen, *ended) if ended is not None else seen

    async def look_at_device(self, job: Job) -> None:
        """Tell the user, before a job starts, that others hold memory of its device."""
        said = await anyio.to_thread.run_sync(self._witness.crowded, job.device)
        if said:
            logger.warning("job {}: {}", job.job_id, said)
            await self._change(job.job_id, lambda job: self._noted(job, said))

    def _noted(self, job: Job, said: str) -> tuple[Job, list[Effect]]:
        job, told = note(job, "warning", said, now=self._clock())
        return job, [told]

    async def run(self) -> None:
        """Look, for ever."""
        while True:
            await anyio.sleep(TICK)
            try:
                await self.tick()
            except OSError as error:
                # A disk that was unplugged, a /proc that is full of surprises: the next look may do.
                logger.warning("the machine could not be looked at: {}", error)

    async def tick(self) -> None:
        """Look once."""
        now = self._monotonic()
        self._awake += min(now - self._ticked, 2 * TICK)
        self._ticked = now
        self._ticks += 1
        shortage = await self._witness.look() if self._desk.held else None
        if shortage is not None:
            logger.warning("job {}: {}", shortage.job_id, shortage.why)
            why, room = shortage.why, shortage.room
            await self._change(
                shortage.job_id, lambda job: short_of_memory(job, why, room=room, now=self._clock())
            )
        await self._stalls()
        waiting = [job for job in self._desk.jobs.values() if job.state is JobState.PAUSED and job.held_for]
        for cause in ("memory", "disk"):
            if any(job.held_for == cause for job in waiting):
                await self._release(cause, waiting)

    async def _change(self, job_id: str, decide: Callable[[Job], tuple[Job, list[Effect]]]) -> None:
        await self._desk.insist(lambda: self._desk.change(job_id, decide))

    async def _release(self, cause: str, waiting: list[Job]) -> None:
        """Let the first job that waits for ``cause`` go on if there is enough of it."""
        if cause == "disk":
            if self._ticks % DISK_TICKS:
                return
            free = await anyio.to_thread.run_sync(self._witness.disk_free)
            free_for_data = await anyio.to_thread.run_sync(self._witness.data_free)
        else:
            await self._witness.look()
            free = free_for_data = self._witness.newest.available
        for job in waiting:
            if job.held_for != cause or not job.room:
                continue
            # So much is waited for only where the data set itself was to be fetched (`JobDesk.not_started`).
            there = free_for_data if job.room == job.dataset_size else free
            enough = self._enough[job.job_id] = (
                self._enough.get(job.job_id, 0) + 1 if there >= job.room else 0
            )
            # Memory comes and goes from one second to the next; and what was full may be a quota that nobody tells of.
            lately = self.now() - self._let_go.get(job.job_id, -AGAIN) < AGAIN
            if not lately and enough >= (1 if cause == "disk" else 3):
                del self._enough[job.job_id]
                self._let_go[job.job_id] = self.now()
                logger.info("job {}: {}", job.job_id, IS_BACK[cause])
                await self._change(job.job_id, lambda job: self._go_on(job, cause))
                return

    def _go_on(self, job: Job, cause: str) -> tuple[Job, list[Effect]]:
        if job.state is not JobState.PAUSED or job.held_for != cause:
            return job, []
        return unhold(job, now=self._clock(), why=IS_BACK[cause])

    async def _stalls(self) -> None:
        for (job_id, attempt), pace in list(self._paces.items()):
            job = self._desk.jobs.get(job_id)
            if job is None or job.attempt != attempt or job_id not in self._desk.held:
                del self._paces[job_id, attempt]
            elif self._desk.ledger.journal.full:
                pace.alive(self.now())  # what it says is not taken in
            elif sentence := pace.overdue(self.now()):
                del self._paces[job_id, attempt]
                await self._end(job_id, attempt, sentence)

    async def _end(self, job_id: str, attempt: int, sentence: str) -> None:
        """End a trainer that stands still, and keep where it stood."""
        identity = self._desk.supervisor.alive().get(job_id)
        if identity is None:
            return
        stack: list[str] = []
        if await anyio.to_thread.run_sync(tree.stopped, identity):
            sentence += " Its process had been stopped by somebody (SIGSTOP)."
        else:
            stack = await self._stack(job_id, identity)
        logger.error("job {}: {} Its trainer is ended.", job_id, sentence)
        self._ended[job_id, attempt] = (sentence, stack)
        # It has had its time, and a process that was stopped cannot even obey SIGTERM.
        tree.kill(identity)
        await self._desk.supervisor.end(job_id, grace=0)

    async def _stack(self, job_id: str, identity: tree.Identity) -> list[str]:
        """Have the trainer write to its log where each of its threads stands, and return that."""
        log = self._settings.logs_dir / f"{job_id}.log"
        if not log.exists():
            return []
        before = log.stat().st_size
        tree.send(identity, tree.ASK_WHERE)
        lines: list[str] = []
        with anyio.move_on_after(STACK_WITHIN):
            # Nobody tells when the log has grown.
            seen: list[str] = []
            while not lines or lines != seen:
                await anyio.sleep(0.1)
                seen, lines = lines, await anyio.to_thread.run_sync(log_tail, log, before)
        return [self._redactor.redact(line) for line in lines] if self._settings.share_logs else []
