"""Looks at the machine and at the logs of running jobs, and reports what it sees."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
from loguru import logger

from agent.config import Settings
from agent.core.job import Job
from agent.core.outbox import chunks
from agent.core.ports import LogPage
from agent.desk import JobDesk
from agent.errors import NotPossible
from agent.ledger import scrub_told
from agent.runtime import devices
from agent.runtime.journal import JournalFull, JournalRefused, Tx
from agent.runtime.logs import Chunk, LogTail, read_lines
from agent.runtime.redact import Redactor
from agent.runtime.workspace import NotThere, OutsideFolder, resolve_under
from protocol.fields import Values
from protocol.jobspec import RUNNABLE
from protocol.lifecycle import HAS_WORKER, TERMINAL
from protocol.messages import Lane, Machine
from protocol.records import Figures, LogChunk
from protocol.version import AGENT_VERSION

PLACE = "log:"
"""Begins the name under which the journal has the byte up to which a job's log was sent."""
LOG_EVERY = 1.0
"""Seconds between looks at the logs of running jobs."""
HELLO_WAITS = 3.0
"""Seconds that HELLO waits for the GPU driver: less than a backend waits for HELLO, more than a sound driver takes."""
GPU_FREE_WITHIN = 15.0
"""Seconds in which a dead process's memory must have left the device."""
NOT_STORED = (JournalFull, JournalRefused)
"""What is no reason to end: where the disk is broken for good, what a trainer says next meets it, and ends the agent."""


class Watch:
    """What the agent sees of its machine."""

    def __init__(self, desk: JobDesk, settings: Settings, redactor: Redactor) -> None:
        self.inventory: devices.Inventory | None = None
        self.figures: dict[str, float] = {}
        self.dialled = anyio.Event()
        """Set once the first dial has come to something: what may wait for it goes on."""
        self.on_late_cards: Callable[[], None] = _nobody_hears
        """Told when GPUs are found after a HELLO has named none."""
        self._greeted_without = False
        self._desk = desk
        self._settings = settings
        self._redactor = redactor
        self._tails: dict[str, LogTail] = {}
        self._reading: defaultdict[str, anyio.Lock] = defaultdict(anyio.Lock)
        """Held while a job's log is read and sent: a tail has one reader, and a wish of the backend is another."""
        self._looking = anyio.Lock()
        self._paths = [settings.checkpoints_dir, settings.models_dir, settings.agent_home]

    async def look(self) -> devices.Inventory:
        """Take stock of the machine, once."""
        async with self._looking:
            if self.inventory is None:
                # Not in a worker thread: the process would wait for that at its end.
                while not devices.driver_settled():  # noqa: ASYNC110 - a thread of its own opens it
                    await anyio.sleep(0.01)
                self.inventory = await anyio.to_thread.run_sync(devices.inventory, self._paths)
                if self.inventory.gpu_problem:
                    logger.warning("{}", self.inventory.gpu_problem)
                if self._greeted_without and self.inventory.gpus:
                    self.on_late_cards()
            return self.inventory

    def devices(self, visible: str | None) -> list[str]:
        """Return the devices that jobs may use: numbers or UUIDs of GPUs, or "cpu" where there is none.

        ``visible`` is the owner's CUDA_VISIBLE_DEVICES, which counts where DEVICES is not set.
        """
        chosen = list(self._settings.devices)
        if not chosen and visible is not None:
            chosen = [one.strip() for one in visible.split(",") if one.strip()] or ["cpu"]
        gpus = self.inventory.gpus if self.inventory else []
        return chosen or [str(gpu.index) for gpu in gpus] or ["cpu"]

    async def machine(self) -> Machine:
        """Return what HELLO tells of the machine; the owner may keep its name back.

        A driver that is slow or hangs is not waited for: the link comes first, and another HELLO names the GPUs.
        """
        seen: devices.Inventory | None = None
        with anyio.move_on_after(HELLO_WAITS):
            seen = await self.look()
        if seen is None:
            self._greeted_without = True
            logger.warning("the GPU driver is slow to answer; the backend is greeted without its cards")
            known = partial(devices.inventory, self._paths, within=0.0)
            seen = await anyio.to_thread.run_sync(known, abandon_on_cancel=True)
        return Machine(
            hostname=seen.hostname if self._settings.share_hostname else "",
            platform=seen.platform,
            os=seen.os,
            python=seen.python,
            version=AGENT_VERSION,
            cpu=seen.cpu,
            cpu_cores=seen.cpu_cores,
            ram_gb=seen.ram_gb,
            disk_total_gb=seen.disk_total_gb,
            disk_free_gb=seen.disk_free_gb,
            gpus=seen.gpus,
            methods=[str(method) for method in RUNNABLE],
            network=dict(seen.network),
            max_concurrent_jobs=self._settings.max_concurrent_jobs,
        )

    async def gpu_released(self, pids: frozenset[int]) -> bool:
        """Tell whether the driver says that none of these processes holds memory of a GPU; waits a while for it."""
        seen = await self.look()
        if not seen.gpus:
            return True
        with anyio.move_on_after(GPU_FREE_WITHIN):
            # The driver tells nobody when a process has left a device: it has to be asked.
            while True:
                holding = await anyio.to_thread.run_sync(devices.gpu_pids)
                if holding is not None and not holding & pids:
                    return True
                await anyio.sleep(0.1)
        return False

    async def send_figures(self) -> None:
        """Report GPU, CPU, memory, disk and network at their own interval, for ever."""
        await self.look()
        sampler = await anyio.to_thread.run_sync(devices.Sampler, self._paths)
        while True:
            await anyio.sleep(self._settings.gpu_monitoring_interval_seconds)
            try:
                self.figures = await anyio.to_thread.run_sync(sampler.sample)
                if self._settings.backend_url:
                    values: Values = {**self.figures}
                    await self._desk.append("", Lane.METRICS, [Figures(time.time(), values)])
            except (OSError, *NOT_STORED) as error:
                # A disk that was unplugged, a full one, or one that refuses writes: figures are the least of it.
                logger.warning("no figures of the machine this time: {}", error)

    # Logs

    def printing(self, job: Job) -> None:
        """Note that a job has a process: its log is read, however short it lives."""
        if job.state in HAS_WORKER:
            self._desk.ledger.open_logs.add(job.job_id)

    async def follow_logs(self) -> None:
        """Send what running jobs print, for ever; what a job printed last is sent after its end."""
        try:
            await self.reopen()
        except NOT_STORED as error:
            logger.warning("what an earlier agent left of logs and tokens has to wait for a start: {}", error)
        while True:
            await self.look_at_logs()
            await anyio.sleep(LOG_EVERY)

    async def look_at_logs(self) -> None:
        """Send what jobs have printed since the last look."""
        open_logs = self._desk.ledger.open_logs
        for job_id in list(open_logs):
            ended = job_id not in self._desk.held
            try:
                await self._send_new(job_id, ended=ended)
                if ended and job_id not in self._desk.held:
                    open_logs.discard(job_id)
                    await self._forget_token(job_id)
            except (OSError, *NOT_STORED, NotPossible) as error:
                # Read again from where the journal says it was sent up to.
                logger.warning("the log of job {} cannot be sent now: {}", job_id, error)
                self._tails.pop(job_id, None)
                if isinstance(error, NOT_STORED):
                    open_logs.add(job_id)
                else:
                    open_logs.discard(job_id)

    async def reopen(self) -> None:
        """Read on where an agent was killed after a job's end and before that of its log."""
        ledger = self._desk.ledger
        places = await ledger.journal.read(lambda rows: rows.metas(PLACE))
        ended = [job for job in self._desk.jobs.values() if job.from_backend and job.state in TERMINAL]
        for job in ended:
            place = int(places.get(job.job_id) or 0)
            # What never had a place printed nothing that was seen, or its owner kept it.
            if ledger.left_out(job.job_id) or (
                place and await anyio.to_thread.run_sync(self._size, job) > place
            ):
                ledger.open_logs.add(job.job_id)
        told = [job.job_id for job in ended if job.job_id not in ledger.open_logs]
        await ledger.journal.write(lambda tx: scrub_told(tx, told))

    def _size(self, job: Job) -> int:
        with contextlib.suppress(OSError, NotPossible):
            return self._path(job.job_id).stat().st_size
        return 0

    async def _forget_token(self, job_id: str) -> None:
        job = self._desk.jobs.get(job_id)
        if job is not None and job.from_backend and job.state in TERMINAL:
            # Nothing may be left to be acknowledged, which is when it goes otherwise.
            await self._desk.ledger.journal.write(lambda tx: scrub_told(tx, [job_id]))

    async def _send_new(self, job_id: str, *, ended: bool = False, since: int | None = None) -> None:
        """Send what a job printed, from byte ``since`` on where that is given."""
        job = self._desk.jobs.get(job_id)
        if job is None or not job.from_backend or not self._settings.share_logs:
            return
        async with self._reading[job_id]:
            tail = self._tails.get(job_id) if since is None else None
            if tail is None:
                if since is None:
                    since = int(
                        await self._desk.ledger.journal.read(lambda rows: rows.get_meta(PLACE + job_id)) or 0
                    )
                tail = self._tails[job_id] = LogTail(self._path(job_id), self._redactor.redact, offset=since)
            while (chunk := await anyio.to_thread.run_sync(tail.read_new)) is not None:
                await self._ship(job, chunk, tail.offset)
            if ended:
                if (last := await anyio.to_thread.run_sync(tail.finish)) is not None:
                    await self._ship(job, last, tail.offset)
                self._tails.pop(job_id, None)
                if self._desk.ledger.left_out(job_id):
                    await self._ship(job, Chunk(tail.offset, []), tail.offset)

    async def _ship(self, job: Job, chunk: Chunk, offset: int) -> None:
        whole = LogChunk(time.time(), job.attempt, chunk.offset, chunk.lines)

        def keep_place(tx: Tx) -> None:
            tx.set_meta(PLACE + job.job_id, str(offset))

        await self._desk.append(job.job_id, Lane.LOGS, chunks(whole), also=keep_place)

    async def send_log_from(self, job_id: str, offset: int) -> None:
        """Send the job's log again from byte ``offset`` on. Raises NotPossible where the owner keeps logs."""
        self._desk.job(job_id)
        if not self._settings.share_logs:
            raise NotPossible("The owner of the machine keeps the logs of jobs there (SHARE_LOGS).")
        await self._send_new(job_id, ended=job_id not in self._desk.held, since=offset)

    async def read_log(self, job_id: str, limit: int, offset: int) -> LogPage:
        """Return lines of the job's log file, redacted."""
        path, redact = self._path(job_id), self._redactor.redact
        lines, total = await anyio.to_thread.run_sync(read_lines, path, offset, limit, redact)
        return LogPage(logs=lines, total_lines=total, offset=offset, limit=limit)

    def _path(self, job_id: str) -> Path:
        """Return where the job's log lies, or will lie. Raises NotPossible: whoever made up the id or put a link
        there must not have another file sent, or cut."""
        folder, name = self._settings.logs_dir, f"{job_id}.log"
        try:
            return resolve_under(folder, name, "log")
        except NotThere:
            return folder / name
        except OutsideFolder as error:
            raise NotPossible(str(error)) from None


def _nobody_hears() -> None:
    """Stand in where there is no link."""
