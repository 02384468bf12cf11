"""Builds every part and runs them in one task group. Two programs: the agent, and one job without a backend."""

import contextlib
import os
import secrets
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import msgspec
from loguru import logger

from agent.config import Settings
from agent.core.ports import JobView, PointView, Uplink
from agent.doors import view
from agent.errors import JobFailed, KeyRefused, NotPossible, Refused, UnknownJob
from agent.net.choice import Transport
from agent.net.client import RestClient
from agent.net.websocket import Link
from agent.program import USER_AGENT, Program
from agent.runtime.lock import HomeLock
from agent.runtime.redact import Redactor
from agent.uplink import JournalUplink
from protocol.lifecycle import TERMINAL, JobState, Want
from protocol.version import AGENT_VERSION
from protocol.worker import Metrics

BYE = (
    "The agent is being stopped ({name}). Its jobs are saved, and go on when it is started again; when that will be it "
    "does not know."
)
FLUSH_WITHIN = 5.0
"""Seconds a stopping agent gives its last records to reach the backend."""


async def run_agent(
    settings: Settings,
    *,
    on_ready: Callable[[], None] | None = None,
    module: str = "agent.trainer.entry",
    redactor: Redactor | None = None,
) -> int:
    """Run the agent until it is told to stop or refused for good; return the exit code."""
    settings.agent_home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with HomeLock(settings.agent_home):
        program = Program(settings, settings.agent_home, module, redactor)
        agent_id = settings.agent_id or kept(
            settings.agent_home / "agent_id", f"agent_{secrets.token_hex(8)}"
        )
        # Beside the journal, not in it: whoever loses the journal is still the same install.
        install_id = kept(settings.agent_home / "install_id", secrets.token_hex(16))
        counted = await program.journal.write(lambda tx: tx.next_boot())
        boot = await anyio.to_thread.run_sync(_next_boot, counted, settings.agent_home / "boot")
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
    return msgspec.structs.replace(settings, agent_id=agent_id)


def kept(path: Path, fresh: str) -> str:
    """Return what the file holds; ``fresh``, stored durably, where there is none."""
    with contextlib.suppress(FileNotFoundError):
        if known := path.read_text().strip():
            return known
    _store(path, fresh)
    return fresh


def _store(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _next_boot(counted: int, path: Path) -> int:
    """Return the number of this start; a journal that was lost does not count backwards."""
    before = kept(path, "0")
    boot = max(counted, int(before) + 1 if before.isdecimal() else 0)
    _store(path, str(boot))
    return boot


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
        at_once=settings.max_concurrent_jobs,
    )

    def note(state: str, detail: str) -> None:
        program.link_state = (state, detail)
        if state != "connecting" or program.link is None or program.link.dials > 0:
            program.watch.dialled.set()

    def key() -> str:
        return settings.api_key.reveal() if settings.api_key else ""

    def make_link(records: Uplink, on_state: Callable[[str, str], None]) -> Link:
        program.link = Link(
            records,
            backend_url=settings.backend_url,
            key=key,
            agent_id=agent_id,
            heartbeat=settings.heartbeat_interval_seconds,
            on_state=on_state,
            user_agent=USER_AGENT,
            on_sleep=program.explain_sleep,
        )
        program.watch.on_late_cards = program.link.greet_again
        return program.link

    transport = program.transport = Transport(
        uplink,
        RestClient(settings.backend_url, key=key, agent_id=agent_id, user_agent=USER_AGENT),
        setting=settings.backend_transport,
        poll_interval=settings.poll_interval_seconds,
        make_link=make_link,
        on_state=note,
    )
    uplink.before_hello = transport.socket_turn
    program.desk.ledger.on_append = transport.wake
    try:
        await transport.run()
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
                if program.transport is not None:
                    await program.transport.bye(BYE.format(name=name))
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
                    await program.supervisor.kill_all()
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
    accept_changes: bool = False,
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
        program = Program(settings, home, module, None)
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
                if stands.state in (JobState.FAILED, JobState.CANCELLED):
                    await program.doors.retry(job_id, accept_changes=accept_changes)
                elif stands.state is JobState.COMPLETED:
                    return stands
                else:
                    await program.doors.want(job_id, Want.RUN, accept_changes=accept_changes)
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
                try:
                    await program.doors.want(job_id, Want.PAUSE)
                except (NotPossible, UnknownJob) as error:
                    logger.info("{}", error)
            else:
                await program.supervisor.kill_all()
