"""What trainers say and how they end, on its way to the desk."""

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator

import anyio
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream
from loguru import logger

from agent.core.effects import Effect, Report
from agent.core.explain import Seen, enriched, is_final, no_room, room_needed, verdict
from agent.core.intake import gone, hear, hear_points
from agent.core.job import Job, react
from agent.core.merging import Sent, merged
from agent.core.outbox import Points
from agent.desk import JobDesk
from agent.ledger import Batch
from agent.runtime.journal import JournalFull, JournalRefused
from agent.runtime.redact import Redactor
from agent.runtime.supervisor import Exited, Fact, Heard, Misbehaved
from protocol.failures import Evidence, FailureReason, failure
from protocol.lifecycle import IllegalTransition, Trigger
from protocol.messages import Lane
from protocol.records import Notice, Point
from protocol.worker import AnyEvent, Failed, Left, Metrics, Numbered, ParametersSet, Trained, Warm

AT_ONCE = 2000
"""Facts in one transaction at most."""
NOT_PROVED = "Its process is gone, but that its memory has left the device could not be seen."


def cleaned(event: AnyEvent, redactor: Redactor, share_logs: bool) -> AnyEvent:
    """Return an event as it may be stored and sent: without secrets, and without what the owner keeps."""
    match event:
        case Metrics() | Warm() | Left() | Trained() | ParametersSet():
            return event
        case Failed(failure=why) if why.evidence is not None and not share_logs:
            evidence = msgspec.structs.replace(why.evidence, traceback="", log_tail=[])
            event = Failed(msgspec.structs.replace(why, evidence=evidence))
        case _:
            pass
    return msgspec.convert(redactor.redact_value(msgspec.to_builtins(event)), type(event))


class Hearing:
    """Takes the supervisor's facts to the desk. ``clean`` takes secrets out of what a trainer says."""

    def __init__(
        self, desk: JobDesk, clean: Callable[[AnyEvent], AnyEvent], clock: Callable[[], float] = time.time
    ) -> None:
        self._desk = desk
        self._clean = clean
        self._clock = clock
        self._points = Points()
        self._encode = msgspec.msgpack.Encoder().encode
        self._faults: dict[tuple[str, int], str] = {}
        self._seen: dict[tuple[str, int], Seen] = {}
        self.look: Callable[[str, int], Awaitable[Seen]] = _unseen
        """Says what was seen of the machine in the last moments; see `agent.guard`."""
        self.on_event: Callable[[str, int, AnyEvent], None] = lambda job_id, attempt, event: None
        self.where = "CHECKPOINTS_DIR"
        """The folders whose disk jobs write to."""

    async def run(self, facts: MemoryObjectReceiveStream[list[Fact]]) -> None:
        """Take what the supervisor tells, as much at once as is there, for ever."""
        while True:
            try:
                taken = await facts.receive()
            except anyio.EndOfStream:
                return
            while len(taken) < AT_ONCE:
                try:
                    taken += facts.receive_nowait()
                except (anyio.WouldBlock, anyio.EndOfStream):
                    break
            ended = [fact for fact in taken if isinstance(fact, Exited)]
            for fact in ended:
                taken[taken.index(fact) : taken.index(fact)] = await self._left_behind(fact.job_id)
            for one in taken:
                if isinstance(one, Exited) or _is_failure(one):
                    self._seen[one.job_id, one.attempt] = await self.look(one.job_id, one.attempt)
            # Nothing is lost while the disk is full: the trainer keeps what is not committed.
            await self._take_in(taken)
            self._seen.clear()
            for fact in ended:
                await self._forget(fact.job_id)

    async def _take_in(self, facts: Iterable[Fact]) -> None:
        await self._desk.insist(lambda: self._once(facts))

    async def bury(self, job_id: str, why: str) -> None:
        """Take in what the trainer of an earlier agent left behind, now that its process is gone."""
        facts = await self._left_behind(job_id)
        words = [fact.numbered.event for fact in facts if isinstance(fact.numbered.event, Left)]
        left = words[-1] if words else Left("parent_lost", 0)
        await self._take_in(facts)
        seen = await self.look(job_id, 0)

        def end(batch: Batch) -> None:
            batch.freed.add(job_id)
            job = self._release(batch, self._desk.jobs[job_id])
            room = room_needed(job, left.need, seen.disk_free)
            said = no_room(room, seen.disk_free, self.where) if left.why == "disk_full" else why
            outcome = gone(job, job.attempt, left=left.why, why=said, now=self._clock(), room=room)
            self._desk.take(batch, outcome)

        await self._desk.insist(lambda: self._desk.transact(end))
        await self._forget(job_id)

    async def _left_behind(self, job_id: str) -> list[Heard]:
        launcher = self._desk.launcher
        return await launcher.left_behind(job_id) if launcher is not None else []

    async def _forget(self, job_id: str) -> None:
        if self._desk.launcher is not None:
            await self._desk.launcher.forget(job_id)

    async def _once(self, facts: Iterable[Fact]) -> None:
        points: list[tuple[str, Metrics]] = []

        def take(batch: Batch) -> None:
            for run in _runs(facts):
                fact = run[0]
                job = batch.jobs.get(fact.job_id) or self._desk.jobs.get(fact.job_id)
                if job is None:
                    continue
                if _is_point(fact):
                    self._points_heard(
                        batch, job, [one.numbered for one in run if isinstance(one, Heard)], points
                    )
                else:
                    self._fact(batch, job, fact, points)

        try:
            await self._desk.transact(take)
        except (JournalFull, JournalRefused):
            # What was to be stored was not, a schema among it perhaps.
            self._points = Points()
            raise
        for job_id, metrics in points:
            self._desk.on_change(self._desk.jobs[job_id], metrics)

    def _fact(self, batch: Batch, job: Job, fact: Fact, points: list[tuple[str, Metrics]]) -> None:
        try:
            match fact:
                case Heard():
                    self._heard(batch, job, fact, points)
                case Misbehaved(sentence=sentence):
                    self._faults[fact.job_id, fact.attempt] = sentence
                case Exited():
                    self._exited(batch, job, fact)
        except IllegalTransition as error:
            logger.exception("a trigger that the table does not know: {!r} {!r}", job, fact)
            self._desk.take(batch, self._internal(job, str(error)))

    def _internal(self, job: Job, sentence: str) -> tuple[Job, list[Effect]]:
        cause = failure(FailureReason.INTERNAL, f"The agent met a state it should not know: {sentence}.")
        return react(job, Trigger.FAULT, now=self._clock(), by="agent", failure=cause)

    def _heard(self, batch: Batch, job: Job, fact: Heard, points: list[tuple[str, Metrics]]) -> None:
        said = self._clean(fact.numbered.event)
        if isinstance(said, Failed):
            said = Failed(enriched(job, said.failure, self._seen.get((job.job_id, fact.attempt), Seen())))
        numbered = msgspec.structs.replace(fact.numbered, event=said)
        outcome = hear(job, numbered, now=self._clock())
        if numbered.attempt == job.attempt:
            # Also for old news: the trainer repeats it because our answer was lost.
            batch.marks[job.job_id, job.attempt] = max(numbered.number, job.heard)
        if outcome is None:
            return
        self._desk.take(batch, outcome)
        self.on_event(job.job_id, job.attempt, numbered.event)

    def _points_heard(
        self, batch: Batch, job: Job, run: list[Numbered], points: list[tuple[str, Metrics]]
    ) -> None:
        """Take in points of one attempt that came in a row."""
        if run[0].attempt == job.attempt:
            batch.marks[job.job_id, job.attempt] = max(run[-1].number, job.heard)
        outcome = hear_points(job, run)
        if outcome is None:
            return
        job, fresh = outcome
        for event in fresh:
            points.append((job.job_id, event))
            batch.points.append((job.job_id, job.attempt, event.step, self._encode(event)))
        if fresh:
            self.on_event(job.job_id, job.attempt, fresh[-1])
        if job.from_backend:
            tight, held = self._desk.ledger.over_quota, job.merge
            sent: Sent = []
            if tight or held is not None:
                for event in fresh:
                    held, more = merged(held, job.attempt, event, tight=tight, now=self._clock())
                    sent += more
            else:
                sent = [(job.attempt, event) for event in fresh]
            if held != job.merge:
                job = msgspec.structs.replace(job, merge=held)
            self._send(batch, job.job_id, sent)
        self._desk.take(batch, (job, []))

    def _send(self, batch: Batch, job_id: str, sent: Sent) -> None:
        points: list[Point] = []
        for attempt, metrics in sent:
            for record in self._points.records(job_id, attempt, metrics):
                if isinstance(record, Point):
                    points.append(record)
                else:
                    self._desk.ledger.append(batch, job_id, Lane.CONTROL, record)
        self._desk.ledger.append_points(batch, job_id, points)

    def _release(self, batch: Batch, job: Job) -> Job:
        """Send what was held back of a job whose trainer is gone; return the job without it."""
        if job.merge is None:
            return job
        self._send(batch, job.job_id, [(job.merge.attempt, job.merge.metrics())])
        return msgspec.structs.replace(job, merge=None)

    def _exited(self, batch: Batch, job: Job, fact: Exited) -> None:
        batch.freed.add(job.job_id)
        job = self._release(batch, job)
        seen = self._seen.get((job.job_id, fact.attempt), Seen())
        now, why, room = self._clock(), fact.sentence or "The trainer ended without a word.", 0
        cause, reason, evidence = None, FailureReason.LOST, Evidence()
        if sentence := self._faults.pop((job.job_id, fact.attempt), ""):
            cause = enriched(job, failure(FailureReason.INTERNAL, sentence), seen)
        elif fact.left == "disk_full":
            room = room_needed(job, fact.need, seen.disk_free)
            why = no_room(room, seen.disk_free, self.where)
        elif not fact.left:
            reason, why = verdict(job, why, fact.signal, fact.forced, seen)
            told = enriched(job, failure(reason, why), seen)
            evidence = told.evidence or evidence
            cause = told if is_final(reason, seen) else None
        job, effects = gone(
            job,
            fact.attempt,
            left=fact.left,
            why=why,
            now=now,
            failure=cause,
            reason=reason,
            evidence=evidence,
            room=room,
        )
        if not fact.released:
            logger.warning("job {}: {}", job.job_id, NOT_PROVED)
            notice = Notice(now, "warning", NOT_PROVED, job.attempt)
            effects = [*effects, Report(job.job_id, Lane.CONTROL, notice)]
        self._desk.take(batch, (job, effects))


def _is_point(fact: Fact) -> bool:
    return isinstance(fact, Heard) and isinstance(fact.numbered.event, Metrics)


def _runs(facts: Iterable[Fact]) -> Iterator[list[Fact]]:
    """Yield the facts in order, points of one attempt that follow one another together."""
    run: list[Fact] = []
    of: tuple[str, int] | None = None
    for fact in facts:
        mine = (fact.job_id, fact.attempt) if _is_point(fact) else None
        if mine is not None and mine == of:
            run.append(fact)
            continue
        if run:
            yield run
        run, of = [fact], mine
    if run:
        yield run


async def _unseen(job_id: str, attempt: int) -> Seen:
    """Stand in where nobody looks at the machine."""
    return Seen()


def _is_failure(fact: Fact) -> bool:
    return isinstance(fact, Heard) and isinstance(fact.numbered.event, Failed)
