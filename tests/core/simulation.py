"""A job, its trainer's process and people who want things of it, all from one seed.

The core is real; the trainer is a few lines that say what a real one says, and it may die at
any time. What is said arrives late, as over the real queue.

`python -m tests.core.simulation --schedules 100000 --seed 0` runs so many and prints what happened.
"""

import random
import sys
from collections import Counter, deque

import msgspec

from agent.core import agenda
from agent.core.control import desire, retried, wanted
from agent.core.effects import Ask, Effect, EndWorker, Report, StartWorker
from agent.core.intake import gone, hear
from agent.core.job import Job, hold, react, short_of_memory, step, unhold
from agent.errors import NotPossible
from protocol.failures import FailureReason, failure
from protocol.lifecycle import HAS_WORKER, TERMINAL, JobState, Trigger, Want
from protocol.messages import Desired
from protocol.records import JobStatus
from protocol.worker import (
    AnyEvent,
    AnyOrder,
    Cancel,
    Failed,
    Finished,
    Left,
    Metrics,
    Numbered,
    Parameters,
    ParametersSet,
    Pause,
    Phase,
    Preparing,
    Ready,
    Saved,
    SetParameters,
    Stop,
    Trained,
)
from tests.support.schedules import many

ENDS = {
    Want.RUN: {JobState.COMPLETED},
    Want.STOP: {JobState.COMPLETED},
    # A job that was done before the pause reached it is complete.
    Want.PAUSE: {JobState.PAUSED, JobState.COMPLETED},
    Want.CANCEL: {JobState.CANCELLED},
}
"""Where a job comes to rest, for what was wanted last; one that ended before stays where it is."""


class Process:
    """One attempt's trainer: it obeys at its next step, and says so in order."""

    def __init__(self, attempt: int, start: int, steps: int) -> None:
        self.attempt = attempt
        self.step = self.start = start
        self.steps = steps
        self.number = 0
        self.orders: deque[AnyOrder] = deque()
        self.said: deque[Numbered] = deque()
        self.phase = "loading"
        self.left = ""
        self.alive = True

    def say(self, event: AnyEvent) -> None:
        """Put an event on the queue."""
        self.number += 1
        self.said.append(Numbered(self.attempt, self.number, event))

    def go(self) -> None:
        """Live a little."""
        while self.orders:
            match self.orders.popleft():
                case Cancel():
                    return self._leave("cancelled")
                case Pause() if self.phase != "finishing":
                    if self.phase == "stepping":
                        self.save("pause")
                    return self._leave("paused")
                case Stop() if self.phase == "stepping":
                    self.steps = self.step
                case SetParameters(parameters=parameters):
                    self.say(ParametersSet(self.step, parameters))
        if self.phase == "loading":
            self.say(Preparing(Phase.LOAD))
            self.say(Ready(self.steps, 1.0, self.start, 9, 0, "cpu", 1, 1, 1, 1))
            self.phase = "stepping"
        elif self.phase == "stepping" and self.step < self.steps:
            self.step += 1
            self.say(Metrics(self.step, 0.0, 0.0, {"train_loss": 1.0}))
        elif self.phase == "stepping":
            self.say(Trained(self.step, "steps"))
            self.phase = "finishing"
        else:
            self.say(Finished("/m", "", "h", self.step, {}))
            self.alive = False
        return None

    def save(self, reason: str) -> None:
        """Leave a checkpoint behind."""
        self.say(Saved(f"/c/checkpoint-{self.step}", self.step, 0.0, 1, 0.1, reason))

    def _leave(self, why: str) -> None:
        self.say(Left(why, self.step))
        self.left = why
        self.alive = False


class World:
    """One job on one device, for one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.job = Job(job_id="j", config="{}", from_backend=True)
        self.process: Process | None = None
        self.held: dict[str, str] = {}
        self.asked: Want = Want.RUN
        self.version = 0
        self.draining = False
        self.states: list[JobState] = []
        self.attempts: list[int] = []
        self.happened: Counter[str] = Counter()
        self.now = 0.0

    def take(self, outcome: tuple[Job, list[Effect]] | None) -> None:
        """Do what the desk does with what the core decided."""
        if outcome is None:
            return
        self.job, effects = outcome
        for effect in effects:
            match effect:
                case Report(record=JobStatus() as status):
                    self.states.append(JobState(status.state))
                case StartWorker():
                    assert self.process is None, "an attempt began while another's process lived"
                    assert self.job.attempt > max(self.attempts, default=0)
                    self.attempts.append(self.job.attempt)
                    steps = self.random.choice([1, 3, 10])
                    self.process = Process(self.job.attempt, min(self.job.saved_step, steps), steps)
                case Ask(order=order) if self.process is not None:
                    self.process.orders.append(order)
                case EndWorker() if self.process is not None:
                    self.process.orders.append(Cancel())
        if self.process is None and not self.draining:
            for job_id, device in agenda.due([self.job], self.held, ["cpu"], 1):
                self.held[job_id] = device
                self.take(step(self.job, Trigger.SLOT_FREE, now=self.now, by="agent"))

    # What can happen

    def work(self) -> None:
        """Let the trainer live a little."""
        if self.process is not None and self.process.alive:
            self.process.go()

    def listen(self) -> None:
        """Hear the trainer's next word, or of its end."""
        process = self.process
        if process is None:
            return
        if process.said:
            numbered = process.said.popleft()
            self.take(hear(self.job, numbered, now=self.now))
            if self.random.random() < 0.1:
                assert hear(self.job, numbered, now=self.now) is None, "said twice, heard twice"
        elif not process.alive:
            self.bury("The trainer ended without a word.")

    def bury(self, why: str) -> None:
        """Hear that the process is gone."""
        assert self.process is not None
        process, self.process = self.process, None
        self.held.clear()
        self.take(gone(self.job, process.attempt, left=process.left, why=why, now=self.now, room=9))

    def save(self) -> None:
        """A checkpoint by schedule."""
        if self.process is not None and self.process.alive and self.process.phase == "stepping":
            self.process.save("schedule")

    def crash(self) -> None:
        """The trainer is killed; what it had put on the queue is still there."""
        if self.process is not None:
            self.process.alive = False

    def run_out(self) -> None:
        """The trainer finds no room on the disk, or no memory in one piece, and leaves."""
        process = self.process
        if process is None or not process.alive or process.phase == "loading":
            return
        if process.phase == "stepping" and self.random.random() < 0.5:
            process.save("fresh_process")
            process._leave("fresh_process")
        else:
            process._leave("disk_full")

    def squeeze(self) -> None:
        """The machine's memory runs out."""
        self.take(short_of_memory(self.job, "The memory is nearly full.", room=9, now=self.now))

    def relax(self) -> None:
        """There is room again."""
        if self.job.held_for and self.job.state is JobState.PAUSED:
            self.take(unhold(self.job, now=self.now, why="There is room again."))

    def fail(self) -> None:
        """The trainer gives up."""
        if self.process is not None and self.process.alive and self.random.random() < 0.2:
            self.process.say(Failed(failure(FailureReason.DATA, "Row 57.")))
            self.process.alive = False

    def ask(self) -> None:
        """Somebody wants something, by either door."""
        want = self.random.choice(list(Want))
        if self.random.random() < 0.5:
            self.version += self.random.choice([0, 1, 1])
            parameters = Parameters(learning_rate=self.random.choice([None, 1e-5]))
            message = Desired("j", self.version, want.value, parameters=parameters)
            owned = self.job.want_by == "owner" and self.job.want is Want.PAUSE
            before = self.job
            self.take(desire(self.job, message, now=self.now))
            assert self.job.observed == self.version or before.observed >= self.version
            if owned and want is not Want.CANCEL:
                assert self.job.want is Want.PAUSE
                assert self.job.want_by == "owner"
        else:
            try:
                self.take(wanted(self.job, want, by="owner", now=self.now))
            except NotPossible:
                assert self.job.state in TERMINAL

    def retry(self) -> None:
        """Somebody gives an ended job another chance."""
        if self.job.state in (JobState.FAILED, JobState.CANCELLED):
            self.take(retried(self.job, by="user", now=self.now))

    def stop_agent(self) -> None:
        """The agent drains, or dies; it comes back, and its trainer had left by itself."""
        self.draining = True
        if self.random.random() < 0.5:
            self.take(hold(self.job, "The agent was stopped.", now=self.now))
            for _ in range(60):
                self.work()
                self.listen()
            assert self.process is None, "a drained agent has no trainer left"
        elif self.process is not None:
            # What it had said and nobody heard is in the file that it leaves.
            self.process.left = "parent_lost" if self.process.alive else self.process.left
            self.process.alive = False
            while self.process is not None:
                self.listen()
        self.draining = False
        self.take(
            unhold(self.job, now=self.now) if self.job.held and not self.job.held_for else (self.job, [])
        )

    def run(self, steps: int) -> None:
        """Let ``steps`` things happen, then nothing but the trainer's work."""
        usual = [self.work, self.listen]
        rare = [self.crash, self.fail, self.ask, self.ask, self.retry, self.save, self.stop_agent]
        rare += [self.run_out, self.squeeze, self.relax]
        self.take(react(self.job, Trigger.SAVED, now=0.0))
        for _ in range(steps):
            self.now += 1
            event = self.random.choice(usual if self.random.random() < 0.85 else rare)
            self.happened[event.__name__] += 1
            event()
            self.check()
        for _ in range(300):
            self.work()
            self.listen()
            self.relax()
            self.check()

    def check(self) -> None:
        """What must hold at any time."""
        job = self.job
        if job.state in HAS_WORKER:
            assert self.process is not None, f"{job!r} waits for a trainer that is not there"
        if self.process is not None:
            assert self.held == {"j": "cpu"}
        if job.state in TERMINAL:
            assert job.completed_at is not None
            assert not job.held
        if job.state is JobState.PAUSED:
            assert job.want is Want.PAUSE or job.held
        if job.state is JobState.FAILED:
            assert job.failure is not None
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(job), type=Job) == job

    def check_rest(self) -> None:
        """What must hold once nothing happens any more."""
        job = self.job
        rest = ENDS[job.want] | {JobState.FAILED, JobState.CANCELLED}
        assert job.state in rest, f"{job.state} where {job.want} is wanted"
        if job.state is JobState.FAILED:
            assert job.failure is not None
            assert job.failure.reason in (FailureReason.DATA, FailureReason.LOST)
        assert self.process is None
        assert self.states[-1:] in ([], [job.state]), "the last thing told is how it stands"


def check(seed: int) -> Counter[str]:
    """Run one schedule; raise AssertionError where something is wrong."""
    world = World(seed)
    world.run(150)
    world.check_rest()
    return world.happened + Counter({"attempts": len(world.attempts), f"ended {world.job.state}": 1})


if __name__ == "__main__":
    sys.exit(many(check, sys.argv[1:], prog="tests.core.simulation"))
