"""Builds every part and runs them in one task group. Two programs: the agent, and one job without a backend."""

import contextlib
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
from loguru import logger

from agent.config import Settings, cut_own
from agent.core.ports import Health, JobView, PointView
from agent.desk import JobDesk
from agent.doors import Doors, view
from agent.errors import Exit, JobFailed, KeyRefused, Refused, UnknownJob
from agent.launch import Launching
from agent.ledger import Ledger
from agent.net.websocket import Link
from agent.runtime.environment import cut_own_environment, make_undumpable
from agent.runtime.journal import Journal
from agent.runtime.lock import HomeLock
from agent.runtime.redact import Redactor
from agent.runtime.supervisor import Fact, Supervisor
from agent.uplink import JournalUplink
from agent.watch import Watch
from protocol.lifecycle import TERMINAL, JobState, Want
from protocol.version import AGENT_VERSION
from protocol.worker import Metrics

FACTS_BUFFER = 4096
"""Facts of trainers that may wait for the desk; beyond, the trainers' own buffers fill."""
FLUSH_WITHIN = 5.0
"""Seconds a stopping agent gives its last records to reach the backend."""
USER_AGENT = f"finetunelab-training-agent/{AGENT_VERSION}"


class Program:
    """The parts that both programs have: journal, supervisor, desk, launching, watching."""

    def __init__(self, settings: Settings, home: Path, module: str) -> None:
        self.settings = settings
        self.home = home
        self.started = time.time()
        self.exit_code: int = Exit.OK
        self.link: Link | None = None
        self.link_state = ("off", "no backend is set")
        keys = [settings.api_key.reveal()] if settings.api_key else []
        self.redactor = Redactor(
            [*keys, *(value.reveal() for value in settings.trainer_environment.values())]
        )
        # Read before the environment is cut: what the owner passes on goes to trainers alone.
        self._base_env = cut_own(cut_own_environment) | {
            name: value.reveal() for name, value in settings.trainer_environment.items()
        }
        make_undumpable()
        self.journal = Journal.open(home / "journal.sqlite")
        self._send, self._facts = anyio.create_memory_object_stream[Fact](FACTS_BUFFER)
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
        self.desk.on_change = lambda job, _: self.watch.printing(job)
        self.doors = Doors(
            self.desk,
            health=self.health,
            read_log=self.watch.read_log,
            list_checkpoints=self.launching.list_checkpoints,
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
                await group.start(self.supervisor.run)
                group.start_soon(self.desk.run, self._facts)
                yield group
                group.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self.journal.close()

    async def begin(self, group: anyio.abc.TaskGroup) -> None:
        """Look at the machine, bury what an earlier agent left, and let jobs start."""
        await self.watch.look()
        self.desk.devices = self.watch.devices()
        await self.desk.begin()
        for job_id in self.desk.orphans:
            self.watch.printing(self.desk.job(job_id))
            group.start_soon(self.launching.take_over, job_id)
        group.start_soon(self.watch.follow_logs)
        if self.settings.warm_trainer:
            group.start_soon(self.launching.keep_warm)

    async def stop(self, why: str) -> None:
        """Have every job save and leave; past the grace their trainers are killed."""
        logger.info("stopping: {}", why)
        await self.desk.drain()
        with anyio.move_on_after(self.settings.stop_grace_seconds) as waited:
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


async def run_agent(
    settings: Settings, *, on_ready: Callable[[], None] | None = None, module: str = "agent.trainer.entry"
) -> int:
    """Run the agent until it is told to stop or refused for good; return the exit code."""
    settings.agent_home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with HomeLock(settings.agent_home):
        program = Program(settings, settings.agent_home, module)
        boot, agent_id, install_id = await program.journal.write(
            lambda tx: (tx.next_boot(), _kept_id(settings), _install_id(tx))
        )
        program.settings = settings = _with_id(settings, agent_id)
        logger.info("agent {} version {}, home {}", agent_id, AGENT_VERSION, settings.agent_home)
        async with program.running() as group:
            ended = anyio.Event()
            group.start_soon(_signals, program, ended)
            if settings.backend_url:
                group.start_soon(_run_link, program, agent_id, install_id, boot, ended)
            group.start_soon(_begin, program, group, on_ready)
            group.start_soon(program.watch.send_figures)
            await ended.wait()
        return program.exit_code


def _with_id(settings: Settings, agent_id: str) -> Settings:
    import msgspec

    return msgspec.structs.replace(settings, agent_id=agent_id)


def _kept_id(settings: Settings) -> str:
    """Return AGENT_ID, else the id in AGENT_HOME/agent_id, which is made once."""
    if settings.agent_id:
        return settings.agent_id
    path = settings.agent_home / "agent_id"
    with contextlib.suppress(FileNotFoundError):
        kept = path.read_text().strip()
        if kept:
            return kept
    made = f"agent_{secrets.token_hex(8)}"
    part = path.with_suffix(".part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(made + "\n")
    part.replace(path)
    return made


def _install_id(tx: Any) -> str:
    known = tx.get_meta("install_id")
    if known is None:
        known = secrets.token_hex(16)
        tx.set_meta("install_id", known)
    return str(known)


async def _begin(program: Program, group: anyio.abc.TaskGroup, on_ready: Callable[[], None] | None) -> None:
    """Start what need not come before the first dial."""
    settings = program.settings
    if program.link is not None:
        with anyio.move_on_after(2.0):
            await program.watch.dialled.wait()
    await program.begin(group)
    if settings.local_api:
        # Start-up cost: Starlette and uvicorn take a third of a second, and the socket comes first.
        from agent.local import ADDRESS_FILE
        from agent.local.api import build
        from agent.local.auth import local_token
        from agent.local.server import serve

        token = await anyio.to_thread.run_sync(local_token, settings.agent_home)
        api = build(program.doors, settings, token)
        group.start_soon(serve, api, settings.host, settings.port, settings.agent_home / ADDRESS_FILE)
    if on_ready is not None:
        on_ready()


async def _run_link(program: Program, agent_id: str, install_id: str, boot: int, ended: anyio.Event) -> None:
    settings = program.settings
    uplink = JournalUplink(
        program.desk,
        agent_id=agent_id,
        install_id=install_id,
        boot=boot,
        machine=program.watch.machine,
        send_log=program.watch.send_log_from,
        keep_secret=program.redactor.add,
    )

    def note(state: str, detail: str) -> None:
        program.link_state = (state, detail)
        if state != "connecting" or program.link is None or program.link.dials > 0:
            program.watch.dialled.set()

    program.link = Link(
        uplink,
        backend_url=settings.backend_url,
        key=lambda: settings.api_key.reveal() if settings.api_key else "",
        agent_id=agent_id,
        heartbeat=settings.heartbeat_interval_seconds,
        on_state=note,
        user_agent=USER_AGENT,
    )
    program.desk.ledger.on_append = program.link.wake
    try:
        await program.link.run()
    except Refused as refused:
        logger.error("{}", refused)
        program.exit_code = refused.exit_code
        program.desk.draining = True
        if program.desk.held:
            logger.warning(
                "running jobs go on to their end; then the agent leaves with code {}", refused.exit_code
            )
            await program.desk.idle()
        if isinstance(refused, KeyRefused) and settings.bad_key_sleep:
            logger.error(
                "sleeping {:g} s before leaving, so that restarts do not hammer the backend",
                settings.bad_key_sleep,
            )
            await anyio.sleep(settings.bad_key_sleep)
        ended.set()


async def _signals(program: Program, ended: anyio.Event) -> None:
    """First signal: save and leave. Second: kill."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with anyio.create_task_group() as group:

            async def leave(name: str) -> None:
                if program.link is not None:
                    program.link.bye(f"The agent was stopped ({name}); its jobs are saved and wait.")
                await program.stop(name)
                await _flush(program)
                ended.set()

            count = 0
            async for number in signals:
                count += 1
                if count == 1:
                    group.start_soon(leave, number.name)
                else:
                    logger.error("second {}: killing what is left", number.name)
                    program.exit_code = 130
                    ended.set()


async def _flush(program: Program) -> None:
    """Give the last records a moment to arrive; what does not is in the journal."""
    if program.link is None or program.link_state[0] != "connected":
        return
    with anyio.move_on_after(FLUSH_WITHIN):
        while any(records for records, _ in program.desk.ledger.backlog.values()):
            program.desk.ledger.drained = anyio.Event()
            await program.desk.ledger.drained.wait()


async def run_job(
    settings: Settings,
    config: Mapping[str, Any],
    *,
    job_id: str,
    dataset_path: str = "",
    name: str = "",
    on_update: Callable[[JobView, PointView | None], None],
    module: str = "agent.trainer.entry",
) -> JobView:
    """Run one job with no backend; return how it stands at the end.

    Ctrl-C pauses it exactly, and the same call later resumes it; a second Ctrl-C kills. Raises BadJob,
    and JobFailed never: a failed job is returned as it is.
    """
    home = settings.agent_home / "run" / job_id
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with HomeLock(home):
        program = Program(settings, home, module)
        final = anyio.Event()
        async with program.running() as group:

            def changed(job: Any, metrics: Metrics | None) -> None:
                point = None
                if metrics is not None:
                    point = PointView(
                        step=metrics.step,
                        epoch=metrics.epoch,
                        time=metrics.time,
                        attempt=job.attempt,
                        values=metrics.values,
                        trend=metrics.trend,
                    )
                on_update(view(job, program.desk), point)
                if job.state in TERMINAL or (job.state is JobState.PAUSED and not job.held):
                    final.set()

            program.desk.on_change = changed
            group.start_soon(_job_signals, program, job_id)
            await program.begin(group)
            try:
                stands = program.doors.job(job_id)
            except UnknownJob:
                await program.doors.submit(config, job_id=job_id, dataset_path=dataset_path, name=name)
            else:
                final = anyio.Event()
                if stands.state is JobState.PAUSED:
                    await program.doors.want(job_id, Want.RUN)
                elif stands.state in (JobState.FAILED, JobState.CANCELLED):
                    await program.doors.retry(job_id)
                elif stands.state is JobState.COMPLETED:
                    return stands
            await final.wait()
            await program.desk.idle()
            return program.doors.job(job_id)
    raise JobFailed("The job's program ended without a result.")


async def _job_signals(program: Program, job_id: str) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        count = 0
        async for number in signals:
            count += 1
            if count == 1:
                logger.info("{}: pausing; the same command resumes", number.name)
                await program.doors.want(job_id, Want.PAUSE)
            else:
                await program.supervisor.kill_all()
