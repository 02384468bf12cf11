"""An agent's records for the platform's tests: in memory, with what the REST side keeps beside them."""

from collections.abc import Mapping
from typing import Any

import anyio
import msgspec

from agent.core.job import Job
from agent.net.client import RestClient
from agent.net.platform import PlatformDrain
from protocol.lifecycle import JobState, Want
from protocol.messages import Desired, Lane, Machine
from protocol.records import JobStatus, LogChunk, Notice, Point, Schema
from protocol.session import Key
from tests.net.backend import Records
from tests.protocol.golden import MACHINE
from tests.support.platform import KEY, Platform

NAMES = ["train_loss", "learning_rate", "samples_per_second"]
EVAL = ["eval_loss", "perplexity", "best_eval_loss", "best_step", "best_epoch", "epochs_without_improvement"]
AGENT = "agent_0123456789abcdef"


class Kept(Records):
    """The agent's records and what the REST side keeps with them."""

    def __init__(self, job_id: str) -> None:
        super().__init__()
        self.job_id = job_id
        self.held = {job_id: Job(job_id=job_id, config="{}", from_backend=True, state=JobState.RUNNING)}
        self.tokens: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.free = 1
        self.told: list[tuple[str, str]] = []
        """What the agent itself had to say to jobs' users."""
        self.control, self.metrics, self.lines = (Key(7, job_id, lane) for lane in Lane)
        self.add(self.control, Schema(1, NAMES), Schema(2, EVAL))

    def jobs(self) -> Mapping[str, Job]:
        return self.held

    def room(self) -> int:
        return self.free

    async def machine(self) -> Machine:
        return MACHINE

    async def token(self, job_id: str) -> str:
        return self.tokens.get(job_id, "")

    async def keep_token(self, job_id: str, token: str) -> None:
        self.tokens[job_id] = token

    async def noted(self, name: str) -> str:
        return self.notes.get(name, "")

    async def note(self, notes: Mapping[str, str]) -> None:
        self.notes |= notes

    async def settled(self, key: Key, seq: int, notes: Mapping[str, str]) -> None:
        # One commit, as the journal's: whoever is killed here has both or neither.
        with anyio.CancelScope(shield=True):
            await self.acked(key, seq)
            self.notes |= notes

    async def announce(self, told: Mapping[str, str], notes: Mapping[str, str], *, warn: bool = True) -> None:
        self.notes |= notes
        for job_id, text in told.items():
            self.told.append((job_id, text))
            key = Key(7, job_id, Lane.CONTROL)
            self.add(key, Notice(1e9, "warning" if warn else "info", text))

    async def desired(self, message: Desired) -> None:
        await super().desired(message)
        job = self.held.get(message.job_id)
        if job is not None:
            self.held[job.job_id] = msgspec.structs.replace(
                job, observed=message.version, want=Want(message.want)
            )

    # What a trainer says

    def step(self, step: int, loss: float = 1.0, attempt: int = 1) -> None:
        self._newest(step, {"train_loss": loss, "learning_rate": 1e-4, "samples_per_second": 2.0})
        self.add(
            self.metrics, Point(1e9 + step, attempt, step, step / 100, 1, [loss, 1e-4, 2.0], "improving")
        )

    def evaluated(self, step: int, loss: float) -> None:
        self._newest(step, {"eval_loss": loss, "perplexity": 2.0, "best_eval_loss": loss})
        self.add(self.metrics, Point(1e9 + step, 1, step, step / 100, 2, [loss, 2.0, loss, step, 0.9, 0.0]))

    def _newest(self, step: int, values: dict[str, float]) -> None:
        job = self.held[self.job_id]
        self.held[self.job_id] = msgspec.structs.replace(job, step=step, values={**job.values, **values})

    def status(self, state: str, attempt: int = 1) -> None:
        self.held[self.job_id] = msgspec.structs.replace(self.held[self.job_id], state=JobState(state))
        self.add(self.control, JobStatus(1e9, attempt, state))

    def print(self, *lines: str) -> None:
        self.add(self.lines, LogChunk(1e9, 1, 0, list(lines)))


def kept(platform: Platform) -> Kept:
    """Return the records of a job that this agent has claimed."""
    job_id = platform.submit({"model": {"name": "m"}}, status="running", agent_id=AGENT)
    store = Kept(job_id)
    store.tokens[job_id] = str(platform.rows[job_id]["job_token"])
    return store


def client(platform: Platform, within: float = 5.0) -> RestClient:
    return RestClient(platform.url, key=lambda: KEY, agent_id=AGENT, user_agent="test", answer_within=within)


def drain(
    rest: RestClient, store: Kept, settle: float = 0.0, within: float = 5.0, **more: Any
) -> PlatformDrain:
    # What the agent has to say to a job's user wakes nothing here, so that it is found at the next look.
    made = PlatformDrain(rest, store, settle=settle, within=within, **{"look_every": 1.0, **more})
    made.aside = (0.02, 0.05)
    made.hurry()
    return made


async def _deliver(platform: Platform, store: Kept, within: float, settle: float) -> None:
    rest = client(platform, within)
    made = drain(rest, store, settle, within)
    empty = anyio.Event()
    store.on_change = lambda: None if sum(store.backlog()) else empty.set()
    with anyio.fail_after(60):
        async with anyio.create_task_group() as group:
            group.start_soon(made.run)
            if sum(store.backlog()):
                await empty.wait()
            group.cancel_scope.cancel()
    await rest.close()


def deliver(platform: Platform, store: Kept, within: float = 5.0, settle: float = 0.0) -> None:
    """Run a fresh drain until everything is delivered."""
    anyio.run(_deliver, platform, store, within, settle)
