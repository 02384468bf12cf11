"""Carries out what the core decides: one lock, one transaction for each change, then its effects.

Everything that happens to a job passes `change`: the core is asked, the result and its records
are committed to the journal together, and only then is anything done.
"""

import time
from collections.abc import Callable, Iterable
from typing import Protocol

import anyio
import anyio.abc
import msgspec
from loguru import logger

from agent.core import agenda
from agent.core.effects import Ask, Effect, EndWorker, Report, StartWorker
from agent.core.intake import gone, hear
from agent.core.job import Job, hold, react, report, step, unhold
from agent.core.outbox import Points
from agent.errors import UnknownJob
from agent.ledger import Batch, Ledger
from agent.runtime.journal import JournalFull, Tx
from agent.runtime.supervisor import Exited, Heard, Misbehaved, Supervisor
from protocol.failures import FailureReason, failure
from protocol.lifecycle import HAS_WORKER, IllegalTransition, JobState, Trigger
from protocol.messages import Lane
from protocol.records import AnyRecord, Point
from protocol.worker import AnyOrder, Cancel, Committed, Left, Metrics, Pause

FULL_RETRY = 2.0
"""Seconds between tries while the disk that holds the journal is full."""


class Launcher(Protocol):
    """Gets a job's next attempt going; see `agent.launch`."""

    async def launch(self, job: Job) -> None: ...

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
        self._points = Points()
        self._faults: dict[str, str] = {}
        self._launching: dict[str, anyio.CancelScope] = {}
        self._begun = False
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
        async with self._lock:
            self._begun = True
            batch = Batch()
            for job in list(self.jobs.values()):
                if job.held:
                    self._take(batch, unhold(job, now=self._clock()))
            await self._commit(batch)

    def job(self, job_id: str) -> Job:
        """Return the job; raises UnknownJob."""
        try:
            return self.jobs[job_id]
        except KeyError:
            raise UnknownJob(job_id) from None

    # Changing

    async def change(self, job_id: str, decide: Callable[[Job], tuple[Job, list[Effect]]]) -> Job:
        """Ask the core what becomes of a job, commit it and carry it out. Raises what ``decide`` raises."""
        async with self._lock:
            batch = Batch()
            self._take(batch, decide(self.job(job_id)))
            await self._commit(batch)
            return self.jobs[job_id]

    async def add(
        self, job: Job, *, secrets: dict[str, str] | None = None, effects: list[Effect] | None = None
    ) -> None:
        """Take a new job. One that is known already changes nothing."""
        async with self._lock:
            if job.job_id in self.jobs:
                return
            batch = Batch()
            self._take(batch, (job, [report(job, self._clock()), *(effects or [])]))

            def keep(tx: Tx) -> None:
                for name, value in (secrets or {}).items():
                    tx.put_secret(job.job_id, name, value)

            await self._commit(batch, also=keep)

    async def append(
        self,
        scope: str,
        lane: Lane,
        records: Iterable[AnyRecord],
        *,
        also: Callable[[Tx], None] | None = None,
    ) -> None:
        """Store records that change no job; over the outbox's quota only lane 0 is taken."""
        batch = Batch()
        for record in records:
            self.ledger.append(batch, scope, lane, record)
        if batch.appends or also is not None:
            async with self._lock:
                await self._commit(batch, also)

    def next_order(self) -> int:
        """Return a place at the end of the queue."""
        return max((job.order for job in self.jobs.values()), default=0) + 1

    def _take(self, batch: Batch, outcome: tuple[Job, list[Effect]]) -> None:
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
        for job_id, device in agenda.due(current.values(), self.held, self.devices, self._at_once):
            job = msgspec.structs.replace(current[job_id], device=device)
            self.held[job_id] = device
            self._take(batch, step(job, Trigger.SLOT_FREE, now=self._clock(), by="agent"))

    async def _commit(self, batch: Batch, also: Callable[[Tx], None] | None = None) -> None:
        """Write a batch, then do what it asks. The lock is held.

        A caller that is cancelled (a lost connection) leaves journal and memory alike all the same.
        """
        self._fill(batch)
        told = False
        while True:
            try:
                with anyio.CancelScope(shield=True):
                    await self.ledger.write(batch, also)
                    self._committed(batch)
                return
            except JournalFull as error:
                # Nothing is lost meanwhile: the trainer keeps what is not committed, and the queue holds back.
                if not told:
                    logger.error("{}; free some space, the agent tries again every {:g} s", error, FULL_RETRY)
                    for job_id in self.held:
                        self.supervisor.ask(job_id, Pause())
                    told = True
            await anyio.sleep(FULL_RETRY)

    def _committed(self, batch: Batch) -> None:
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

    def _carry_out(self, effect: Effect) -> None:
        assert self._group is not None
        match effect:
            case StartWorker(job_id=job_id):
                self._group.start_soon(self._launch, self.jobs[job_id], name=f"launch {job_id}")
            case Ask(job_id=job_id, order=order):
                self.ask(job_id, order)
            case EndWorker(job_id=job_id, grace=grace):
                self._group.start_soon(self._end, job_id, grace, name=f"end {job_id}")
            case Report():
                raise AssertionError("reports were committed with their job")

    def ask(self, job_id: str, order: AnyOrder) -> None:
        """Hand an order to the job's worker; one that is not started yet is called off instead."""
        launching = self._launching.get(job_id)
        if launching is not None and isinstance(order, Pause | Cancel):
            launching.cancel()
        else:
            self.supervisor.ask(job_id, order)

    async def _end(self, job_id: str, grace: float) -> None:
        await self.supervisor.end(job_id, grace=grace)

    async def _launch(self, job: Job) -> None:
        assert self.launcher is not None
        started = False
        sentence = ""
        with anyio.CancelScope() as scope:
            self._launching[job.job_id] = scope
            try:
                await self.launcher.launch(job)
                started = True
            except LaunchFailed as error:
                sentence = str(error)
                reason = error.reason
            finally:
                del self._launching[job.job_id]
        if started:
            return
        with anyio.CancelScope(shield=True):
            self.held.pop(job.job_id, None)
            if sentence:
                cause = failure(reason, sentence)
                await self.change(
                    job.job_id,
                    lambda now: react(now, Trigger.FAULT, now=self._clock(), by="agent", failure=cause),
                )
            else:
                await self.change(job.job_id, lambda now: react(now, Trigger.RELEASED, now=self._clock()))
            self._look_idle()

    # Hearing

    async def run(self, facts: anyio.abc.ObjectReceiveStream[Heard | Exited | Misbehaved]) -> None:
        """Take what the supervisor tells, as much at once as is there."""
        while True:
            try:
                taken = [await facts.receive()]
            except anyio.EndOfStream:
                return
            while len(taken) < 2000:
                try:
                    taken.append(facts.receive_nowait())  # type: ignore[attr-defined]  # a memory stream's
                except (anyio.WouldBlock, anyio.EndOfStream):
                    break
            ended = [fact for fact in taken if isinstance(fact, Exited)]
            for fact in ended:
                taken[taken.index(fact) : taken.index(fact)] = await self._left_behind(fact.job_id)
            async with self._lock:
                await self._hear(taken)
            for fact in ended:
                await self._forget(fact.job_id)

    async def _left_behind(self, job_id: str) -> list[Heard]:
        return await self.launcher.left_behind(job_id) if self.launcher is not None else []

    async def _forget(self, job_id: str) -> None:
        if self.launcher is not None:
            await self.launcher.forget(job_id)

    async def _hear(self, facts: list[Heard | Exited | Misbehaved]) -> None:
        batch = Batch()
        points: list[tuple[str, Metrics]] = []
        for fact in facts:
            job = batch.jobs.get(fact.job_id) or self.jobs.get(fact.job_id)
            if job is None:
                continue
            try:
                match fact:
                    case Heard():
                        self._hear_one(batch, job, fact, points)
                    case Misbehaved(sentence=sentence):
                        self._faults[fact.job_id] = sentence
                    case Exited():
                        self._exited(batch, job, fact)
            except IllegalTransition as error:
                logger.exception("a trigger that the table does not know: {!r} {!r}", job, fact)
                self._take(batch, self._internal(job, str(error)))
        await self._commit(batch)
        for job_id, metrics in points:
            self.on_change(self.jobs[job_id], metrics)
        self._look_idle()

    def _internal(self, job: Job, sentence: str) -> tuple[Job, list[Effect]]:
        cause = failure(FailureReason.INTERNAL, f"The agent met a state it should not know: {sentence}.")
        return react(job, Trigger.FAULT, now=self._clock(), by="agent", failure=cause)

    def _hear_one(self, batch: Batch, job: Job, fact: Heard, points: list[tuple[str, Metrics]]) -> None:
        outcome = hear(job, fact.numbered, now=self._clock())
        if fact.numbered.attempt == job.attempt:
            # Also for old news: the trainer repeats it because our answer was lost.
            batch.marks[job.job_id, job.attempt] = max(fact.numbered.number, job.heard)
        if outcome is None:
            return
        self._take(batch, outcome)
        event = fact.numbered.event
        if isinstance(event, Metrics):
            points.append((job.job_id, event))
            body = msgspec.msgpack.encode(event)
            batch.points.append((job.job_id, job.attempt, event.step, body))
            if job.from_backend:
                for record in self._points.records(job.job_id, job.attempt, event):
                    lane = Lane.METRICS if isinstance(record, Point) else Lane.CONTROL
                    self.ledger.append(batch, job.job_id, lane, record)

    def _exited(self, batch: Batch, job: Job, fact: Exited) -> None:
        self.held.pop(job.job_id, None)
        sentence = self._faults.pop(job.job_id, "")
        cause = failure(FailureReason.INTERNAL, sentence) if sentence else None
        if not fact.released:
            logger.warning(
                "job {}: its process is gone, but its memory on the device was not seen to be freed",
                job.job_id,
            )
        why = fact.sentence or "The trainer ended without a word."
        self._take(batch, gone(job, fact.attempt, left=fact.left, why=why, now=self._clock(), failure=cause))

    # After a restart

    async def bury(self, job_id: str, why: str) -> None:
        """Take in what the trainer of an earlier agent left behind, now that its process is gone."""
        facts = await self._left_behind(job_id)
        words = [fact.numbered.event for fact in facts if isinstance(fact.numbered.event, Left)]
        left = words[-1].why if words else "parent_lost"
        async with self._lock:
            await self._hear(list(facts))
        self.held.pop(job_id, None)
        await self.change(job_id, lambda job: gone(job, job.attempt, left=left, why=why, now=self._clock()))
        await self._forget(job_id)
        self._look_idle()

    # Ending

    async def drain(self) -> None:
        """Take no more work, and have every running job save and leave."""
        async with self._lock:
            self.draining = True
            batch = Batch()
            for job_id in list(self.held):
                job = self.jobs[job_id]
                self._take(
                    batch,
                    hold(
                        job, "The agent was stopped; the job goes on when it starts again.", now=self._clock()
                    ),
                )
            await self._commit(batch)
            self._look_idle()

    async def idle(self) -> None:
        """Wait until no trainer is left."""
        while self.held:
            self._idle = anyio.Event()
            await self._idle.wait()

    def busy(self) -> bool:
        """Tell whether any job runs or waits to run."""
        return bool(self.held) or any(job.state is JobState.QUEUED for job in self.jobs.values())

    def _look_idle(self) -> None:
        if not self.held:
            self._idle.set()


class LaunchFailed(Exception):
    """A job cannot be started; the sentence is for the user."""

    def __init__(self, reason: FailureReason, sentence: str) -> None:
        super().__init__(reason, sentence)
        self.reason = reason
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence
