"""Starts, asks, stops and buries trainers, and says what became of them as facts."""

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import anyio.abc
import anyio.to_thread
import msgspec
from anyio.streams.memory import MemoryObjectSendStream

from agent.runtime.boot import Plan
from agent.runtime.ending import log_tail, sentence
from agent.runtime.process import Child, Identity
from protocol.codec import UNREADABLE
from protocol.worker import (
    AnyOrder,
    Cancel,
    Committed,
    Failed,
    Finished,
    Left,
    Numbered,
    Start,
    Warm,
    encoder,
    event_decoder,
)

WARM_LIMIT = 60.0
"""Seconds to wait for a warm trainer that is still importing."""
LEAVE_LIMIT = 120.0
"""Seconds for a trainer that said its last word to leave: more than it waits for its last events to be committed."""
WARM_PAUSES = (5.0, 300.0)
"""Seconds after which another warm trainer is started where the last one failed: the first pause, which doubles, and
the longest."""
MAX_COPIED_LOG = 1 << 24
"""Bytes of an older log that are copied for the sake of a warm trainer; beyond, a cold one is quicker."""
LAST_WORDS = (Left, Failed, Finished)


class Heard(msgspec.Struct, frozen=True):
    """A trainer said something. To be journalled, and then answered with `Committed`."""

    job_id: str
    attempt: int
    numbered: Numbered


@dataclass(frozen=True)
class Exited:
    """A trainer and its whole process tree are gone. Everything it said was heard before this."""

    job_id: str
    attempt: int
    exit_code: int | None
    """None: a signal ended it, or it could not be ended at all."""
    signal: int | None
    left: str
    """The `why` of its `Left`; empty when it said none."""
    released: bool
    """Proved: the tree is gone and its memory has left the device."""
    log_tail: list[str]
    sentence: str
    need: int = 0
    """Bytes of disk that its `Left` asked for."""
    forced: bool = False
    """The agent itself sent the signal."""


@dataclass(frozen=True)
class Misbehaved:
    """A trainer sent what no trainer of ours sends, and is being ended for it; `Exited` follows."""

    job_id: str
    attempt: int
    sentence: str


Fact = Heard | Exited | Misbehaved
Released = Callable[[frozenset[int]], Awaitable[bool]]
"""Given the pids of a tree that is gone: whether none of them holds memory of a device any more."""


@dataclass(eq=False)
class _Worker:
    """A child and what is known of it. ``job_id`` is empty while it is a warm one."""

    child: Child
    env: dict[str, str]
    log: Path
    job_id: str = ""
    attempt: int = 0
    heard: int = 0
    """The number of the last event."""
    last_word: Left | Failed | Finished | None = None
    blamed: str = ""
    warm: anyio.Event = field(default_factory=anyio.Event)
    """It has said that it waits for its job, or has ended."""


class Supervisor:
    """Owns every trainer of this agent. ``run`` must be running for anything else to be called."""

    def __init__(
        self,
        *,
        facts: MemoryObjectSendStream[list[Fact]],
        module: str = "agent.trainer.entry",
        nice: int = 0,
        term_grace: float = 5.0,
        kill_limit: float = 30.0,
        leave_limit: float = LEAVE_LIMIT,
        gpu_released: Released | None = None,
    ) -> None:
        self._facts = facts
        self._module = module
        self._nice = nice
        self._term_grace = term_grace
        self._kill_limit = kill_limit
        self._leave_limit = leave_limit
        self._gpu_released = gpu_released
        self._tasks: anyio.abc.TaskGroup | None = None
        self._jobs: dict[str, _Worker] = {}
        self._all: list[_Worker] = []
        self._warm: _Worker | None = None
        self._warm_pause = 0.0
        self._warm_not_before = 0.0
        self.kill_on_exit = False
        """Whether trainers that live when `run` ends are killed, and not left to save by themselves."""

    def __repr__(self) -> str:
        return f"Supervisor({ {job: worker.child for job, worker in self._jobs.items()} }, warm={self._warm})"

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Tend the children until cancelled, by an error of the agent too: that costs them a save, never a step.

        They read the end of their orders, finish the step, save, leave what nobody committed beside the
        checkpoint, and go; the next agent takes over from there.
        """
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks
                task_status.started()
                await anyio.sleep_forever()
        finally:
            self._tasks = None
            with anyio.CancelScope(shield=True):
                ended = [worker.child for worker in self._all if self.kill_on_exit or worker.child.is_ending]
                for worker in self._all:
                    if worker.child not in ended:
                        worker.child.abandon()
                for child in ended:
                    child.kill()
                for child in ended:
                    await child.bury(self._kill_limit)
            self._all.clear()
            self._jobs.clear()
            self._warm = None

    async def start(self, job_id: str, order: Start, *, env: dict[str, str], log: Path) -> Identity:
        """Start a job's attempt, in the warm trainer if there is one of the same environment.

        Raises OSError when its log cannot be written or no process can be made.
        """
        if job_id in self._jobs:
            raise RuntimeError(f"job {job_id} has a trainer already")
        worker = await self._take_warm(env, log) or self._spawn(env, log)
        worker.job_id, worker.attempt, worker.heard = job_id, order.attempt, order.first_event - 1
        self._jobs[job_id] = worker
        worker.child.send(encoder.encode(order))
        return worker.child.identity

    def ask(self, job_id: str, order: AnyOrder) -> None:
        """Send an order to a job's trainer; never waits. Nothing happens when it has none."""
        worker = self._jobs.get(job_id)
        if worker is not None:
            worker.child.send(encoder.encode(order), replaces=isinstance(order, Committed))

    async def end(self, job_id: str, *, grace: float) -> None:
        """See a job's trainer out: `Cancel`, ``grace`` seconds, SIGTERM, SIGKILL. Returns at once.

        An `Exited` tells the end. May be repeated with less grace; 0 asks no more.
        """
        worker = self._jobs.get(job_id)
        if worker is not None:
            self._running().start_soon(worker.child.end, encoder.encode(Cancel()), grace)

    async def keep_warm(self, env: dict[str, str], log: Path) -> None:
        """Have a trainer stand by with its imports done; one of another environment is replaced.

        Where the last one failed at its imports, nothing happens until its pause is over.
        """
        if self._warm is not None:
            if _same(self._warm.env, env):
                return
            self._running().start_soon(self._warm.child.end, None, 0.0)
            self._warm = None
        if anyio.current_time() >= self._warm_not_before:
            self._warm = self._spawn(env, log)

    async def kill_all(self) -> None:
        """SIGKILL every trainer and wait until all trees are gone; each ends in an `Exited` as ever.

        One that is started after this does not outlive `run` either.
        """
        self.kill_on_exit = True
        workers = list(self._all)
        for worker in workers:
            worker.child.kill()
        for worker in workers:
            await worker.child.end(None, 0.0)

    def alive(self) -> dict[str, Identity]:
        """Return the jobs that have a trainer now, for the journal and the local API."""
        return {job_id: worker.child.identity for job_id, worker in self._jobs.items()}

    def _running(self) -> anyio.abc.TaskGroup:
        if self._tasks is None:
            raise RuntimeError("Supervisor.run() is not running")
        return self._tasks

    def _spawn(self, env: dict[str, str], log: Path) -> _Worker:
        tasks = self._running()
        plan = Plan(self._module, str(log), env, self._nice)
        worker = _Worker(Child(plan, term_grace=self._term_grace, kill_limit=self._kill_limit), env, log)
        worker.child.start()
        self._all.append(worker)
        tasks.start_soon(self._tend, worker)
        return worker

    async def _take_warm(self, env: dict[str, str], log: Path) -> _Worker | None:
        worker = self._warm
        if worker is None or not _same(worker.env, env) or worker.child.exited.is_set():
            return None
        self._warm = None
        adopted = False
        try:
            # A cold one would need as long for its imports; and before them it may not hold its log yet.
            with anyio.move_on_after(WARM_LIMIT):
                await worker.warm.wait()
            adopted = worker.warm.is_set() and await anyio.to_thread.run_sync(_adopt_log, worker.log, log)
        finally:
            # Nobody else knows of it, also where this start was cancelled or the log could not be written.
            if not adopted and self._tasks is not None:
                self._tasks.start_soon(worker.child.end, None, 0.0)
        if not adopted or worker not in self._all:  # it has ended meanwhile
            return None
        worker.log = log
        return worker

    async def _tend(self, worker: _Worker) -> None:
        """Hear a child out, from its first word to its burial."""

        async def hear(frames: list[bytes]) -> None:
            await self._hear(worker, frames)

        async def blame(sentence: str) -> None:
            await self._blame(worker, sentence)

        await worker.child.run(hear, blame)
        if not worker.warm.is_set() and not worker.job_id and worker.child.forced is None:
            first, longest = WARM_PAUSES
            self._warm_pause = min(longest, max(first, 2 * self._warm_pause))
            self._warm_not_before = anyio.current_time() + self._warm_pause
        worker.warm.set()
        released = not worker.child.survivors
        if released and self._gpu_released is not None:
            tree = worker.child.known | {worker.child.identity}
            released = await self._gpu_released(frozenset(identity.pid for identity in tree))
        tail = await anyio.to_thread.run_sync(log_tail, worker.log)
        self._all.remove(worker)
        if self._warm is worker:
            self._warm = None
        if not worker.job_id:
            return
        del self._jobs[worker.job_id]
        code, word, forced = worker.child.exit_code, worker.last_word, worker.child.forced is not None
        exited = Exited(
            worker.job_id,
            worker.attempt,
            exit_code=code if code is not None and code >= 0 else None,
            signal=-code if code is not None and code < 0 else None,
            left=word.why if isinstance(word, Left) else "",
            released=released,
            log_tail=tail,
            sentence=sentence(word, code, blamed=worker.blamed, forced=forced, released=released),
            need=word.need if isinstance(word, Left) else 0,
            forced=forced,
        )
        await self._facts.send([exited])

    async def _hear(self, worker: _Worker, frames: list[bytes]) -> None:
        facts: list[Fact] = []
        wrong = ""
        for raw in frames:
            wrong = self._read(worker, raw, facts)
            if wrong:
                break
        if facts and worker.child.is_heard:
            await self._facts.send(facts)
        if wrong:
            await self._end_for(worker, wrong)

    def _read(self, worker: _Worker, raw: bytes, facts: list[Fact]) -> str:
        """Add what was said to ``facts``; return what is wrong with it where no trainer of ours would say that."""
        try:
            numbered = event_decoder.decode(raw)
        except UNREADABLE as error:  # RecursionError: arrays in arrays, very deep
            return f"The trainer sent {len(raw)} bytes that are no event: {error}."
        if numbered.attempt == 0 and numbered.number == 0:
            # It belongs to no job: the process is there, and that is all.
            if not isinstance(numbered.event, Warm):
                return f"The trainer said {type(numbered.event).__name__} before its job began."
            worker.warm.set()
            self._warm_pause = 0.0
            return ""
        if numbered.number != worker.heard + 1 or numbered.attempt != worker.attempt or not worker.job_id:
            return (
                f"The trainer said event {numbered.number} of attempt {numbered.attempt} where event "
                f"{worker.heard + 1} of attempt {worker.attempt} was due."
            )
        worker.heard = numbered.number
        facts.append(Heard(worker.job_id, worker.attempt, numbered))
        event = numbered.event
        if isinstance(event, LAST_WORDS) and worker.last_word is None:
            worker.last_word = event
            self._running().start_soon(self._see_off, worker)
        return ""

    async def _see_off(self, worker: _Worker) -> None:
        """One that has said its last word must leave, also when a library's thread hangs."""
        with anyio.move_on_after(self._leave_limit):
            await worker.child.exited.wait()
        await worker.child.end(None, 0.0)

    async def _end_for(self, worker: _Worker, sentence: str) -> None:
        worker.child.kill()
        await self._blame(worker, sentence)

    async def _blame(self, worker: _Worker, sentence: str) -> None:
        if not worker.blamed:
            worker.blamed = sentence
            if worker.job_id:
                await self._facts.send([Misbehaved(worker.job_id, worker.attempt, sentence)])


def _same(one: dict[str, str], other: dict[str, str]) -> bool:
    """Whether a trainer of one environment serves for the other; TMPDIR differs from job to job."""
    return {**one, "TMPDIR": ""} == {**other, "TMPDIR": ""}


def _adopt_log(warm: Path, log: Path) -> bool:
    """Make the file that a warm trainer writes to the job's log, after what that holds already.

    Offsets in the job's log stay true. False when the older log is too long to be copied.
    """
    if log.exists():
        if log.stat().st_size > MAX_COPIED_LOG:
            return False
        os.truncate(warm, 0)  # only what its imports printed
        with warm.open("ab") as file:
            file.write(log.read_bytes())
    log.parent.mkdir(parents=True, exist_ok=True)
    warm.replace(log)
    return True
