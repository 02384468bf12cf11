"""Gets a job's next attempt going: data fetched, paths resolved, limits set, process started."""

import errno
import itertools
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
from loguru import logger

from agent.config import Settings
from agent.core.control import parsed
from agent.core.effects import Effect
from agent.core.job import CANCEL_GRACE, Job, report
from agent.core.ports import CheckpointView
from agent.desk import JobDesk
from agent.errors import NotPossible
from agent.net.datasets import find_dataset, kept_name
from agent.net.download import DownloadFailed, fetch_dataset
from agent.runtime import branch
from agent.runtime import workspace as places
from agent.runtime.environment import child_env
from agent.runtime.leftovers import BadLeftovers, forget_leftovers, read_leftovers
from agent.runtime.redact import Redactor
from agent.runtime.supervisor import Heard
from agent.runtime.tree import Identity, orphan_alive, orphan_gone, sweep
from protocol.failures import FailureReason
from protocol.jobspec import BadSpec, JobSpec
from protocol.lifecycle import JobState, Want
from protocol.trainingconfig import job_spec
from protocol.worker import Cancel, Limits, Pause, Phase, SetParameters, Start, Stop, Workspace

WARM_EVERY = 2.0
"""Seconds between looks whether a trainer stands by."""
ORPHAN_WITHIN = 600.0
"""Seconds that a trainer of an earlier agent is given to save before it is killed."""
SWEEP_WITHIN = 30.0
FETCHED = ".fetched"
"""Folder in DATASETS_DIR for data sets that the backend served."""


class LaunchFailed(Exception):
    """A job cannot be started; the sentence is for the user."""

    def __init__(self, reason: FailureReason, sentence: str) -> None:
        super().__init__(reason, sentence)
        self.reason = reason
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class Launching:
    """Turns queued jobs into processes; see `agent.desk.Launcher`."""

    def __init__(
        self,
        desk: JobDesk,
        settings: Settings,
        home: Path,
        base_env: Mapping[str, str],
        redactor: Redactor,
        user_agent: str,
    ) -> None:
        self._desk = desk
        self._settings = settings
        self._home = home
        self._base_env = base_env
        self._redactor = redactor
        self._user_agent = user_agent
        self._preparing: dict[str, anyio.CancelScope] = {}
        self.look_at_device: Callable[[Job], Awaitable[None]] = _no_look
        """Warns of a device that others use already; see `agent.guard`."""
        self.bury: Callable[[str, str], Awaitable[None]]
        """Takes in what the trainer of an earlier agent left; see `agent.hearing`."""

    async def run(self, job: Job) -> None:
        """Start the job's process, or tell the desk why not."""
        try:
            order: Start | None = None
            with anyio.CancelScope() as scope:
                self._preparing[job.job_id] = scope
                try:
                    order = await self._prepare(job)
                finally:
                    # From here on it can no longer be called off: there will be a process to ask.
                    del self._preparing[job.job_id]
            if order is None:
                await self._desk.not_started(job.job_id, None, "")
                return
            await self._start(job.job_id, order)
        except LaunchFailed as error:
            await self._desk.not_started(job.job_id, error.reason, self._redactor.redact(str(error)))
        except Exception as error:  # noqa: BLE001  # the edge where an effect fails: this job's end, not the agent's
            logger.exception("job {} could not be started", job.job_id)
            sentence = f"The trainer cannot be started ({type(error).__name__}: {error})."
            await self._desk.not_started(job.job_id, FailureReason.INTERNAL, self._redactor.redact(sentence))

    def call_off(self, job_id: str) -> bool:
        """Stop a start that has no process yet; False where there is none."""
        scope = self._preparing.get(job_id)
        if scope is not None:
            scope.cancel()
        return scope is not None

    async def _prepare(self, job: Job) -> Start:
        """Fetch, resolve and check all that a process will need."""
        try:
            spec = job_spec(job.job_id, parsed(job.config), job.dataset_path, job.name)
            limits = self.limits(spec)
            data = await self._data(job, spec)
            space = await anyio.to_thread.run_sync(self._workspace, spec, data)
            start_at = await anyio.to_thread.run_sync(self._resume_from, job)
        except BadSpec as error:
            raise LaunchFailed(FailureReason.SPEC, str(error)) from None
        except DownloadFailed as error:
            reason = FailureReason.DISK_FULL if error.disk_full else FailureReason.DATA
            raise LaunchFailed(reason, str(error)) from None
        except places.WorkspaceError as error:
            raise LaunchFailed(error.reason, str(error)) from None
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = FailureReason.DISK_FULL if full else FailureReason.PERMISSION
            raise LaunchFailed(
                reason,
                f"The job's folders cannot be made or written to: {error.strerror} ({error.filename}).",
            ) from None
        await self.look_at_device(job)
        job = self._desk.job(job.job_id)
        return Start(
            spec,
            job.attempt,
            space,
            limits,
            start_at,
            stop_at_once=job.want is Want.STOP,
            parameters=job.parameters,
            accept_changes=job.accept_changes,
            applied=job.applied,
        )

    async def _start(self, job_id: str, order: Start) -> None:
        log = self._settings.logs_dir / f"{job_id}.log"
        env = self.env(self._desk.job(job_id).device)
        try:
            identity = await self._desk.supervisor.start(job_id, order, env=env, log=log)
        except OSError as error:
            raise LaunchFailed(FailureReason.INTERNAL, f"The trainer cannot be started: {error}.") from None
        self._catch_up(job_id, order)

        def remember(job: Job) -> tuple[Job, list[Effect]]:
            if job.attempt != order.attempt:
                return job, []
            return msgspec.structs.replace(
                job, worker_pid=identity.pid, worker_created=identity.create_time
            ), []

        await self._desk.insist(lambda: self._desk.change(job_id, remember))

    def _catch_up(self, job_id: str, order: Start) -> None:
        """Tell the worker what was wanted while it was being started, and had nobody to be told."""
        job = self._desk.job(job_id)
        ask = self._desk.supervisor.ask
        if job.parameters != order.parameters:
            ask(job_id, SetParameters(job.parameters))
        if job.state is JobState.PAUSING:
            ask(job_id, Pause())
        elif job.state is JobState.CANCELLING:
            ask(job_id, Cancel())
            self._desk.end_soon(job_id, CANCEL_GRACE)
        elif job.want is Want.STOP and not order.stop_at_once:
            ask(job_id, Stop())

    async def _data(self, job: Job, spec: JobSpec) -> str:
        """Return where the job's data lie: fetched from the backend, local, or a Hub name."""
        settings = self._settings
        if not job.dataset_sha256:
            found = await find_dataset(spec.data.path, job.job_id, settings, self._user_agent)
            if found is not None:
                return found
            return await anyio.to_thread.run_sync(
                lambda: places.data_source(spec.data.path, settings.datasets_dir, hub=settings.allow_hub)
            )
        await self._desk.change(
            job.job_id,
            lambda now: _in_phase(now, Phase.DOWNLOAD, f"fetching {job.dataset_size} bytes of data"),
        )
        token = await self._desk.ledger.journal.read(lambda rows: rows.get_secret(job.job_id, "job_token"))
        path = await fetch_dataset(
            settings.backend_url,
            job.job_id,
            token or "",
            sha256=job.dataset_sha256,
            size=job.dataset_size,
            folder=settings.datasets_dir / FETCHED,
            user_agent=self._user_agent,
        )
        return str(path)

    def _workspace(self, spec: JobSpec, data: str) -> Workspace:
        settings = self._settings
        folders = places.prepare(
            spec.job_id,
            models_dir=settings.models_dir,
            checkpoints_dir=settings.checkpoints_dir,
            logs_dir=settings.logs_dir,
            cache_dir=self._home / "cache",
        )
        evaluation = (
            places.data_source(spec.data.eval_path, settings.datasets_dir, hub=settings.allow_hub)
            if spec.data.eval_path
            else ""
        )
        tokenizer = (
            places.model_source(spec.tokenizer.name, settings.models_dir, hub=settings.allow_hub)
            if spec.tokenizer.name and spec.tokenizer.name != spec.model.name
            else ""
        )
        return Workspace(
            checkpoints=str(folders.checkpoints),
            output=str(folders.output),
            cache=str(folders.cache),
            model=places.model_source(spec.model.name, settings.models_dir, hub=settings.allow_hub),
            data=data,
            eval_data=evaluation,
            tokenizer=tokenizer,
            branch=str(branch.take(spec.branch, settings.checkpoints_dir, spec.job_id))
            if spec.branch
            else "",
        )

    def _resume_from(self, job: Job) -> str:
        """Return the folder of the checkpoint that was asked for; "" where the newest good one will do."""
        if not job.checkpoint:
            return ""
        folder = self._settings.checkpoints_dir / job.job_id
        if job.checkpoint == "best":
            best = [one for one in places.checkpoints_of(folder) if one["is_best"]]
            if not best:
                raise LaunchFailed(
                    FailureReason.CHECKPOINT, f"Job {job.job_id} has no best checkpoint to resume from."
                )
            return best[0]["path"]
        return str(places.resolve_under(folder, job.checkpoint, "checkpoint"))

    def limits(self, spec: JobSpec) -> Limits:
        """Return what the owner allows a job."""
        settings = self._settings
        return Limits(
            gpu_memory_fraction=settings.gpu_memory_fraction,
            mixed_precision=settings.enable_mixed_precision,
            remote_code=spec.model.name in settings.allow_remote_code,
            tokenizer_code=spec.tokenizer.name in settings.allow_remote_code,
            logging_steps=settings.metrics_report_interval_steps,
            save_steps=settings.checkpoint_interval_steps,
            hub=settings.allow_hub,
            verify_resume=settings.verify_resume,
            background_saves=settings.background_saves,
            compress_checkpoints=settings.compress_checkpoints,
        )

    def env(self, device: str) -> dict[str, str]:
        """Return the environment of a trainer on ``device``."""
        temporary = self._home / "tmp"
        temporary.mkdir(parents=True, exist_ok=True, mode=0o700)
        return child_env(
            self._base_env,
            devices="" if device == "cpu" else device,
            workspace=str(temporary),
            passed=self._settings.pass_to_trainer,
            threads=self._threads(device),
        )

    @property
    def visible(self) -> str | None:
        """The owner's CUDA_VISIBLE_DEVICES."""
        return self._base_env.get("CUDA_VISIBLE_DEVICES")

    def _threads(self, device: str) -> int | None:
        if self._settings.trainer_threads or "OMP_NUM_THREADS" in self._base_env or device != "cpu":
            return self._settings.trainer_threads or None
        # Threads that wait for a busy core spin: with every core taken a step lasts twice as long and more.
        return max(1, (os.cpu_count() or 2) - 1)

    async def keep_warm(self) -> None:
        """Keep a trainer with its imports done standing by, for ever."""
        for old in self._home.glob("warm-*.log"):
            old.unlink(missing_ok=True)
        for number in itertools.count(1):
            device = next(iter(self._free()), self._desk.devices[0])
            # One that is being handed a job still holds its own: each needs a name of its own.
            log = self._home / f"warm-{number}.log"
            try:
                await self._desk.supervisor.keep_warm(self.env(device), log)
            except OSError as error:
                logger.warning("no trainer stands by: {}", error)
            await anyio.sleep(WARM_EVERY)

    def _free(self) -> list[str]:
        return [one for one in self._desk.devices if one == "cpu" or one not in self._desk.held.values()]

    async def list_checkpoints(self, job_id: str) -> list[CheckpointView]:
        """Return the job's checkpoints on disk."""
        folder = self._settings.checkpoints_dir / job_id
        found = await anyio.to_thread.run_sync(places.checkpoints_of, folder)
        return [msgspec.convert(one, CheckpointView) for one in found]

    async def pin(self, job_id: str, checkpoint: str, pinned: bool) -> None:
        """Keep a checkpoint from being deleted, or no more. Raises NotPossible."""
        folder = self._settings.checkpoints_dir / job_id
        act = places.pin if pinned else places.unpin
        try:
            await anyio.to_thread.run_sync(act, folder, checkpoint)
        except places.WorkspaceError as error:
            raise NotPossible(str(error)) from None

    def prune(self) -> None:
        """Delete fetched data sets that no job can still need."""
        jobs = self._desk.jobs.values()
        needed = {job.dataset_sha256 for job in jobs if job.state is not JobState.COMPLETED}
        needed |= {Path(kept_name(job.job_id)).stem for job in jobs if job.state is not JobState.COMPLETED}
        for path in (self._settings.datasets_dir / FETCHED).glob("*"):
            if path.suffix in (".data", ".rows") and path.stem not in needed:
                path.unlink(missing_ok=True)

    # After a restart

    async def take_over(self, job_id: str) -> None:
        """Bury a trainer that an earlier agent left: wait until it has saved, and take in what it wrote."""
        job = self._desk.job(job_id)
        if job.worker_pid and orphan_alive(job.worker_pid, job.worker_created):
            logger.info("job {}: its trainer ({}) is still saving; waiting for it", job_id, job.worker_pid)
            if not await orphan_gone(job.worker_pid, job.worker_created, ORPHAN_WITHIN):
                logger.error("job {}: its trainer {} does not end by itself", job_id, job.worker_pid)
                await sweep(job.worker_pid, [Identity(job.worker_pid, job.worker_created)], SWEEP_WITHIN)
        await self.bury(job_id, "The agent was restarted.")

    async def left_behind(self, job_id: str) -> list[Heard]:
        """Return what the job's trainer wrote to disk because nobody committed it."""
        try:
            events = await anyio.to_thread.run_sync(read_leftovers, self._settings.checkpoints_dir / job_id)
        except BadLeftovers as error:
            logger.warning("{}", error)
            return []
        return [Heard(job_id, numbered.attempt, numbered) for numbered, _ in events]

    async def forget(self, job_id: str) -> None:
        """Remove that file: all of it is committed."""
        await anyio.to_thread.run_sync(forget_leftovers, self._settings.checkpoints_dir / job_id)


async def _no_look(job: Job) -> None:
    """Stand in where nobody looks at devices."""


def _in_phase(job: Job, phase: Phase, detail: str) -> tuple[Job, list[Effect]]:
    job = msgspec.structs.replace(job, phase=phase, detail=detail)
    return job, [report(job, time.time())]
