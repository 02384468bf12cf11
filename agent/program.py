"""The parts that the agent and a job without a backend have in common, built and run together."""

import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import anyio
import anyio.abc
import anyio.to_thread
from loguru import logger

from agent.config import Settings, cut_own
from agent.core.ports import Health
from agent.desk import JobDesk
from agent.doors import Doors
from agent.errors import Exit
from agent.guard import Guard
from agent.hearing import Hearing, cleaned
from agent.launch import Launching
from agent.ledger import Ledger
from agent.net.choice import Transport
from agent.net.websocket import Link
from agent.runtime.environment import cut_own_environment, make_undumpable
from agent.runtime.journal import Journal
from agent.runtime.redact import Redactor
from agent.runtime.supervisor import Fact, Supervisor
from agent.watch import Watch
from agent.witness import Witness
from protocol.lifecycle import HAS_WORKER, JobState
from protocol.messages import Lane
from protocol.records import Notice
from protocol.version import AGENT_VERSION

FACTS_BUFFER = 8
"""Lists of facts that may wait for the desk, each of what was read at once (`agent.runtime.process.READ_SIZE`);
beyond, the trainers' own buffers fill."""
USER_AGENT = f"finetunelab-training-agent/{AGENT_VERSION}"


def secrets_of(settings: Settings) -> list[str]:
    """Return every secret that the settings hold, for the redactor."""
    key = [settings.api_key.reveal()] if settings.api_key else []
    return [*key, *(value.reveal() for value in settings.trainer_environment.values())]


DAMAGED = (
    "This agent's journal was damaged, so it was moved aside and a new one begun. Points, lines and states that had "
    "not arrived here are lost; jobs that are offered again go on from their checkpoints."
)


class Program:
    """The parts that both programs have: journal, supervisor, desk, launching, watching."""

    def __init__(self, settings: Settings, home: Path, module: str, redactor: Redactor | None) -> None:
        self.settings = settings
        self.home = home
        self.started = time.time()
        self.exit_code: int = Exit.OK
        self.link: Link | None = None
        self.transport: Transport | None = None
        self.link_state = ("off", "no backend is set")
        self.redactor = redactor or Redactor(secrets_of(settings))
        # Read before the environment is cut: what the owner passes on goes to trainers alone.
        self._base_env = cut_own(cut_own_environment) | {
            name: value.reveal() for name, value in settings.trainer_environment.items()
        }
        make_undumpable()
        self.journal = Journal.open(home / "journal.sqlite")
        self._send, self._facts = anyio.create_memory_object_stream[list[Fact]](FACTS_BUFFER)
        self.supervisor = Supervisor(facts=self._send, module=module, gpu_released=self._gpu_released)
        self.desk = JobDesk(
            Ledger(self.journal, settings.outbox_max_mb << 20),
            self.supervisor,
            devices=["cpu"],
            at_once=settings.max_concurrent_jobs,
        )
        self.watch = Watch(self.desk, settings, self.redactor)
        self.launching = Launching(self.desk, settings, home, self._base_env, self.redactor, USER_AGENT)
        self.desk.launcher = self.launching
        self.hearing = Hearing(self.desk, lambda event: cleaned(event, self.redactor, settings.share_logs))
        self.launching.bury = self.hearing.bury
        self.witness = Witness(self.desk, settings, self.redactor)
        self.guard = Guard(self.desk, settings, self.redactor, self.witness)
        self.hearing.look = self.guard.seen
        self.launching.look_at_device = self.guard.look_at_device
        self.hearing.on_event = self.guard.heard
        self.hearing.where = self.witness.where
        self.desk.on_change = lambda job, _: self.watch.printing(job)
        self.doors = Doors(
            self.desk,
            health=self.health,
            read_log=self.watch.read_log,
            list_checkpoints=self.launching.list_checkpoints,
            pin=self.launching.pin,
            datasets_dir=settings.datasets_dir,
        )

    async def _gpu_released(self, pids: frozenset[int]) -> bool:
        return await self.watch.gpu_released(pids)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[anyio.abc.TaskGroup]:
        """Run supervisor and desk; on leaving, end what is left of the trainers by force."""
        if self.journal.was_corrupt is not None:
            logger.error(
                "the journal was damaged; it was moved to {} and a new one begun", self.journal.was_corrupt
            )
        try:
            async with anyio.create_task_group() as group:
                await self.desk.load(secrets.randbits(63), group)
                if self.journal.was_corrupt is not None and self.settings.backend_url:
                    notice = Notice(time.time(), "warning", DAMAGED)
                    group.start_soon(self.desk.insist, lambda: self.desk.append("", Lane.CONTROL, [notice]))
                await group.start(self.supervisor.run)
                group.start_soon(self.hearing.run, self._facts)
                yield group
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self.journal.close()

    async def begin(self, group: anyio.abc.TaskGroup) -> None:
        """Look at the machine, bury what an earlier agent left, and let jobs start."""
        self.witness.know(await self.watch.look())
        self.desk.devices = self.watch.devices(self._base_env.get("CUDA_VISIBLE_DEVICES"))
        await anyio.to_thread.run_sync(self.launching.prune)
        await self.desk.begin()
        for job_id in self.desk.orphans:
            self.watch.printing(self.desk.job(job_id))
            group.start_soon(self.launching.take_over, job_id)
        group.start_soon(self.watch.follow_logs)
        group.start_soon(self.guard.run)
        if self.settings.warm_trainer:
            group.start_soon(self.launching.keep_warm)

    async def explain_sleep(self, seconds: float) -> None:
        """Say why nothing was heard of this machine and its running jobs for a while."""
        now = time.time()
        text = (
            f"This machine slept, or its agent was stopped, for {seconds:.0f} s: "
            "nothing was trained or sent in that time."
        )
        running = [job for job in self.desk.jobs.values() if job.from_backend and job.state in HAS_WORKER]
        notices = [("", 0), *((job.job_id, job.attempt) for job in running)]
        for scope, attempt in notices:
            notice = Notice(now, "info", text, attempt)
            await self.desk.insist(partial(self.desk.append, scope, Lane.CONTROL, [notice]))

    async def stop(self, why: str) -> None:
        """Have every job save and leave; past the grace their trainers are killed."""
        logger.info("stopping: {}", why)
        with anyio.move_on_after(self.settings.stop_grace_seconds) as waited:
            await self.desk.drain()
            await self.desk.idle()
        if waited.cancelled_caught:
            logger.error(
                "trainers did not save within {:g} s and are killed; their jobs go on from the last checkpoint",
                self.settings.stop_grace_seconds,
            )
            await self.supervisor.kill_all()
            with anyio.move_on_after(10):
                await self.desk.idle()

    def health(self) -> Health:
        """Return how the agent is."""
        jobs = self.desk.jobs.values()
        gpus = self.watch.inventory.gpus if self.watch.inventory else []
        first = gpus[0] if gpus else None
        return Health(
            status="ok",
            version=AGENT_VERSION,
            agent_id=self.settings.agent_id or "",
            link=self.link_state[0],
            link_detail=self.link_state[1],
            active_jobs=len(self.desk.held),
            queued_jobs=sum(job.state is JobState.QUEUED for job in jobs),
            gpu_available=bool(gpus),
            gpu_info={
                "name": first.name,
                "total_memory_gb": first.memory_total_gb,
                "cuda_version": first.cuda,
                "device_count": len(gpus),
            }
            if first
            else {},
            backlog=[records for records, _ in self.desk.ledger.backlog.values()],
            uptime_seconds=time.time() - self.started,
            draining=self.desk.draining,
        )
