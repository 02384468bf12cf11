"""Carries out what the core decides: one lock, one transaction for each change, then its effects.

Everything that happens to a job passes `change` or `run`: the core is asked, the result and its
records are committed to the journal together, and only then is anything done.
"""

import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import anyio
import anyio.abc
import msgspec
from loguru import logger

from agent.core import agenda
from agent.core.effects import Ask, Effect, EndWorker, Report, StartWorker
from agent.core.explain import room_needed, waits
from agent.core.job import Job, hold, react, report, rest, step, unhold
from agent.errors import UnknownJob
from agent.ledger import Batch, Ledger
from agent.runtime.journal import JournalFull, JournalRefused, Tx
from agent.runtime.supervisor import Heard, Supervisor
from protocol.failures import FailureReason, failure
from protocol.lifecycle import HAS_WORKER, Trigger
from protocol.messages import Lane
from protocol.records import AnyRecord
from protocol.worker import AnyOrder, Cancel, Committed, Metrics, Pause

FULL_RETRY = 2.0
"""Seconds between tries while the disk that holds the journal is full."""
REFUSED_RETRY = 0.5
"""Seconds between tries while only the journal's own files take no writes."""
REFUSED_WITHIN = 10.0
"""Seconds in which they must take them again; one that does not by then is no hiccup."""
DISK_FULL = "The disk that holds AGENT_HOME is full; free some space, and the job goes on by itself."
STOPPED = "The agent was stopped; the job goes on when it starts again."


class Launcher(Protocol):
    """Gets a job's next attempt going; see `agent.launch`."""

    async def run(self, job: Job) -> None:
        """Start the job's process, or tell the desk why not."""
        ...

    def call_off(self, job_id: str) -> bool:
        """Stop a start that has no process yet; False where there is none."""
        ...

    async def left_behind(self, job_id: str) -> list[Heard]:
        """Return what the job's trainer wrote to disk because nobody committed it."""
        ...

    async def forget(self, job_id: str) -> None:
        """Remove that file: all of it is committed."""
        ...


class JobDesk:
    """All jobs of this agent. Make it, `load` it, then `run` it in a task group."""

    def __init__(
        self,
        ledger: Ledger,
        supervisor: Supervisor,
        *,
        devices: list[str],
        at_once: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.ledger = ledger
        self.supervisor = supervisor
        self.jobs: dict[str, Job] = {}
        self.held: dict[str, str] = {}
        """Device of each job whose process may be alive."""
        self.orphans: list[str] = []
        """Jobs whose trainer an earlier agent started; each is to be buried once."""
        self.draining = False
        self.launcher: Launcher | None = None
        self.on_change: Callable[[Job, Metrics | None], None] = lambda job, metrics: None
        self.devices = devices
        """What jobs may run on; "cpu" takes as many as may run at once."""
        self._at_once = at_once
        self._clock = clock
        self._lock = anyio.Lock()
        self._begun = False
        self._waiting_for_disk = False
        self._group: anyio.abc.TaskGroup | None = None
        self._idle = anyio.Event()

    def __repr__(self) -> str:
        return f"<JobDesk {len(self.jobs)} jobs, held={self.held}, draining={self.draining}>"

    async def load(self, epoch: int, group: anyio.abc.TaskGroup) -> None:
        """Read the journal and begin this boot's streams; effects run in ``group``."""
        self._group = group
        for job in await self.ledger.load(epoch):
            self.jobs[job.job_id] = job
            if job.state in HAS_WORKER:
                # Its trainer may be alive and saving: the device is not free before that is known.
                self.held[job.job_id] = job.device or self.devices[0]
                self.orphans.append(job.job_id)

    async def begin(self) -> None:
        """Let what the agent itself had paused go on, and start what can start."""
        self._begun = True
        # What waits for the machine goes on when the machine has what it waits for; see `agent.guard`.
        await self.insist(lambda: self._release(lambda job: bool(job.held) and not job.held_for))

    def job(self, job_id: str) -> Job:
        """Return the job; raises UnknownJob."""
        try:
            return self.jobs[job_id]
        except KeyError:
            raise UnknownJob(job_id) from None

    def next_order(self) -> int:
        """Return a place at the end of the queue."""
        return max((job.order for job in self.jobs.values()), default=0) + 1

    # Changing

    async def transact(
        self, decide: Callable[[Batch], None], *, also: Callable[[Tx], None] | None = None
    ) -> None:
        """Have ``decide`` fill a batch, commit it and carry it out.

        Raises what ``decide`` raises, and JournalFull; then nothing has changed. A caller that is
        cancelled (a lost connection) leaves journal and memory alike all the same.
        """
        async with self._lock:
            batch = Batch()
            decide(batch)
            self._fill(batch)
            with anyio.CancelScope(shield=True):
                await self.ledger.write(batch, also)
                self._committed(batch)

    async def change(
        self,
        job_id: str,
        decide: Callable[[Job], tuple[Job, list[Effect]]],
        *,
        also: Callable[[Tx], None] | None = None,
    ) -> Job:
        """Ask the core what becomes of a job, commit it and carry it out. Raises as `transact` does."""
        await self.transact(lambda batch: self.take(batch, decide(self.job(job_id))), also=also)
        return self.jobs[job_id]

    async def add(self, job: Job, *, secrets: dict[str, str] | None = None) -> None:
        """Take a new job. One that is known already changes nothing. Raises JournalFull."""

        def take(batch: Batch) -> None:
            if job.job_id not in self.jobs:
                self.take(batch, (job, [report(job, self._clock())]))

        def keep(tx: Tx) -> None:
            for name, value in (secrets or {}).items():
                tx.put_secret(job.job_id, name, value)

        await self.transact(take, also=keep)

    async def append(
        self,
        scope: str,
        lane: Lane,
        records: Iterable[AnyRecord],
        *,
        also: Callable[[Tx], None] | None = None,
    ) -> None:
        """Store records that change no job. Raises JournalFull."""

        def append(batch: Batch) -> None:
            for record in records:
                self.ledger.append(batch, scope, lane, record)

        await self.transact(append, also=also)

    async def insist(self, action: Callable[[], Awaitable[object]]) -> None:
        """Do what must be written down, however long the disk is full; the desk is not held meanwhile.

        Raises JournalRefused where the disk refuses writes, and not for a moment only.
        """
        refused_at = 0.0
        while True:
            try:
                await action()
            except JournalFull as error:
                refused_at = 0.0
                await self._wait_for_disk(error)
                await anyio.sleep(FULL_RETRY)
            except JournalRefused as error:
                refused_at = refused_at or anyio.current_time()
                if not error.elsewhere or anyio.current_time() - refused_at >= REFUSED_WITHIN:
                    raise
                logger.warning("it is tried again for {:g} s: {}", REFUSED_WITHIN, error)
                await anyio.sleep(REFUSED_RETRY)
            else:
                return

    def take(self, batch: Batch, outcome: tuple[Job, list[Effect]]) -> None:
        """Add a job as the core left it, and what is to be done, to a batch."""
        job, effects = outcome
        batch.jobs[job.job_id] = job
        for effect in effects:
            if isinstance(effect, Report):
                if effect.job_id != job.job_id or job.from_backend:
                    self.ledger.append(batch, effect.job_id, effect.lane, effect.record)
            else:
                batch.effects.append(effect)

    def _fill(self, batch: Batch) -> None:
        """Give free devices to the jobs that are next."""
        if self.draining or not self._begun:
            return
        current = {**self.jobs, **batch.jobs}
        held = {job_id: device for job_id, device in self.held.items() if job_id not in batch.freed}
        for job_id, device in agenda.due(current.values(), held, self.devices, self._at_once):
            job = msgspec.structs.replace(current[job_id], device=device)
            batch.held[job_id] = device
            self.take(batch, step(job, Trigger.SLOT_FREE, now=self._clock(), by="agent"))

    def _committed(self, batch: Batch) -> None:
        for job_id in batch.freed:
            self.held.pop(job_id, None)
        self.held |= batch.held
        for job in batch.jobs.values():
            before = self.jobs.get(job.job_id)
            self.jobs[job.job_id] = job
            if before is None or before.state is not job.state:
                was = before.state if before else "-"
                logger.info("job {}: {} -> {} {}", job.job_id, was, job.state, job.detail)
                self.on_change(job, None)
        if batch.appends:
            self.ledger.on_append()
        for effect in batch.effects:
            self._carry_out(effect)
        for (job_id, attempt), number in batch.marks.items():
            if self.jobs[job_id].attempt == attempt:
                self.supervisor.ask(job_id, Committed(number))
        if not self.held:
            self._idle.set()

    def _carry_out(self, effect: Effect) -> None:
        assert self._group is not None and self.launcher is not None
        match effect:
            case StartWorker(job_id=job_id):
                self._group.start_soon(self.launcher.run, self.jobs[job_id], name=f"launch {job_id}")
            case Ask(job_id=job_id, order=order):
                self.ask(job_id, order)
            case EndWorker(job_id=job_id, grace=grace):
                self.end_soon(job_id, grace)
            case Report():
                raise AssertionError("reports were committed with their job")

    def ask(self, job_id: str, order: AnyOrder) -> None:
        """Hand an order to the job's worker; a start without a process yet is called off instead."""
        called_off = isinstance(order, Pause | Cancel) and self.launcher and self.launcher.call_off(job_id)
        if not called_off:
            self.supervisor.ask(job_id, order)

    def end_soon(self, job_id: str, grace: float) -> None:
        """See a job's worker out in the background; after ``grace`` seconds by force."""
        assert self._group is not None
        self._group.start_soon(self._end, job_id, grace, name=f"end {job_id}")

    async def _end(self, job_id: str, grace: float) -> None:
        await self.supervisor.end(job_id, grace=grace)

    async def not_started(self, job_id: str, reason: FailureReason | None, sentence: str) -> None:
        """Note that a job's process was not started: called off (no reason), or it cannot be."""

        def note(batch: Batch) -> None:
            batch.freed.add(job_id)
            job, now = self.jobs[job_id], self._clock()
            if reason is None:
                self.take(batch, react(job, Trigger.RELEASED, now=now))
            elif reason is FailureReason.DISK_FULL:
                room = room_needed(job, job.dataset_size, 0)
                self.take(batch, rest(job, "disk", f"{sentence} {waits(room)}", room=room, now=now))
            else:
                cause = failure(reason, sentence)
                self.take(batch, react(job, Trigger.FAULT, now=now, by="agent", failure=cause))

        await self.insist(lambda: self.transact(note))

    # Pausing for reasons of the agent's own

    async def drain(self) -> None:
        """Take no more work, and have every running job save and leave."""
        self.draining = True
        await self._hold_all(STOPPED)

    async def _hold_all(self, why: str, by: str = "agent") -> None:
        def hold_each(batch: Batch) -> None:
            for job_id in self.held:
                self.take(batch, hold(self.jobs[job_id], why, now=self._clock(), by=by))

        try:
            await self.transact(hold_each)
        except JournalFull:
            # Not even that can be written: the trainers save all the same, and the next start finds it.
            for job_id in self.held:
                self.ask(job_id, Pause())

    async def _release(self, which: Callable[[Job], bool]) -> None:
        def release(batch: Batch) -> None:
            for job in self.jobs.values():
                if which(job):
                    self.take(batch, unhold(job, now=self._clock()))

        await self.transact(release)

    async def _wait_for_disk(self, error: JournalFull) -> None:
        """Pause what runs until there is room again."""
        if self._waiting_for_disk or self._group is None:
            return
        self._waiting_for_disk = True
        logger.error("{}; jobs are paused until there is room", error)
        await self._hold_all(DISK_FULL, by="disk")
        self._group.start_soon(self._until_there_is_room)

    async def _until_there_is_room(self) -> None:
        # Nobody tells when space is freed: the journal looks whenever it is asked something.
        while self.ledger.journal.full:
            await anyio.sleep(FULL_RETRY)
            await self.ledger.journal.read(lambda rows: rows.epoch())
        self._waiting_for_disk = False
        logger.info("the disk has room again")
        await self.insist(lambda: self._release(lambda job: job.held == DISK_FULL))

    async def idle(self) -> None:
        """Wait until no trainer is left."""
        while self.held:
            self._idle = anyio.Event()
            await self._idle.wait()
