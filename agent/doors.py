"""What the local API and the command line ask: the `Desk` port, on the job desk."""

import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec

from agent.core import agenda
from agent.core.control import change, new_job, order_for, parsed, retried, wanted
from agent.core.job import Job, settle
from agent.core.ports import CheckpointView, Health, JobView, LogPage, PointView
from agent.desk import JobDesk
from agent.errors import BadJob, NotPossible
from protocol.branching import branched
from protocol.jobspec import BadSpec, JobId
from protocol.lifecycle import HAS_WORKER, JobState, Want
from protocol.messages import CommandKind
from protocol.worker import Metrics, Parameters

_metrics: msgspec.msgpack.Decoder[Metrics] = msgspec.msgpack.Decoder(Metrics)
SUBMITTED = ".submitted"
"""Folder in DATASETS_DIR for data sets that came with their job."""


class Doors:
    """Implements `agent.core.ports.Desk`."""

    def __init__(
        self,
        desk: JobDesk,
        *,
        health: Callable[[], Health],
        read_log: Callable[[str, int, int], Awaitable[LogPage]],
        list_checkpoints: Callable[[str], Awaitable[list[CheckpointView]]],
        pin: Callable[[str, str, bool], Awaitable[None]],
        datasets_dir: Path,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._desk = desk
        self._health = health
        self._read_log = read_log
        self._list_checkpoints = list_checkpoints
        self._pin = pin
        self._datasets = datasets_dir
        self._clock = clock

    async def submit(
        self,
        config: Mapping[str, Any],
        *,
        job_id: str = "",
        dataset_path: str = "",
        name: str = "",
        dataset_content: str | None = None,
        by: str = "owner",
    ) -> str:
        """Take a job in the platform's TrainingConfig; return its id. The same id again changes nothing."""
        job_id = job_id or f"job-{secrets.token_hex(6)}"
        try:
            msgspec.convert(job_id, JobId)
        except msgspec.ValidationError:
            raise BadJob(
                f'"{job_id[:80]}" cannot be a job id: letters, digits, "_", "." and "-" only, 128 at most.'
            ) from None
        if job_id in self._desk.jobs:
            return job_id
        if dataset_content is not None:
            dataset_path = f"{SUBMITTED}/{job_id}.jsonl"
        try:
            text = json.dumps(config, allow_nan=False)
            job = new_job(
                job_id,
                text,
                dataset_path=dataset_path,
                name=name,
                order=self._desk.next_order(),
                now=self._clock(),
            )
        except (BadSpec, ValueError, TypeError) as error:
            raise BadJob(str(error)) from None
        if dataset_content is not None:
            await anyio.to_thread.run_sync(self._keep_content, dataset_path, dataset_content)
        await self._desk.add(msgspec.structs.replace(job, by=by, want_by=by))
        return job_id

    def _keep_content(self, place: str, content: str) -> None:
        """Store a data set that came with its job, in a folder of its own: never over one of the owner's."""
        path = self._datasets / place
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = path.with_suffix(".part")
        part.write_text(content, encoding="utf-8")
        part.replace(path)

    def job(self, job_id: str) -> JobView:
        """Return the job as it is shown; raises UnknownJob."""
        return view(self._desk.job(job_id), self._desk)

    def jobs(self) -> list[JobView]:
        """Return all jobs, oldest first."""
        return [view(job, self._desk) for job in sorted(self._desk.jobs.values(), key=lambda job: job.order)]

    async def branch(
        self,
        job_id: str,
        *,
        checkpoint: str = "",
        adjustments: Mapping[str, Any],
        new_id: str = "",
        name: str = "",
        by: str = "owner",
    ) -> str:
        """Take a new job that begins with a checkpoint of this one; return its id."""
        job = self._desk.job(job_id)
        if job.dataset_sha256:
            raise NotPossible(
                "The backend serves this job's data set; branch it there, so that it can be had."
            )
        try:
            config = branched(parsed(job.config), adjustments, job_id, checkpoint)
        except BadSpec as error:
            raise BadJob(str(error)) from None
        new_id = new_id or f"{job_id[:100]}-{secrets.token_hex(3)}"
        if new_id in self._desk.jobs:
            raise BadJob(f"There is already a job {new_id}; choose another id for the branch.")
        return await self.submit(config, job_id=new_id, dataset_path=job.dataset_path, name=name, by=by)

    async def pin(self, job_id: str, checkpoint: str, pinned: bool) -> list[CheckpointView]:
        """Keep a checkpoint from being deleted, or no more; return all of them as they are now."""
        self._desk.job(job_id)
        await self._pin(job_id, checkpoint, pinned)
        return await self._list_checkpoints(job_id)

    async def want(
        self,
        job_id: str,
        want: Want,
        *,
        checkpoint: str = "",
        accept_changes: bool = False,
        by: str = "owner",
    ) -> str:
        """Write what is wanted of a job; return a sentence on what happens now."""
        now = self._clock()
        job = await self._desk.change(
            job_id,
            lambda job: wanted(
                job, want, by=by, now=now, checkpoint=checkpoint, accept_changes=accept_changes
            ),
        )
        return f"The job is {job.state}" + ("." if _reached(job, want) else f"; {want} was asked for.")

    async def retry(
        self, job_id: str, *, checkpoint: str = "", accept_changes: bool = False, by: str = "owner"
    ) -> str:
        """Queue a failed or cancelled job again."""
        now = self._clock()
        job = await self._desk.change(
            job_id,
            lambda job: retried(job, by=by, now=now, checkpoint=checkpoint, accept_changes=accept_changes),
        )
        return f"The job is {job.state}; it goes on from its last good checkpoint."

    async def move_to_front(self, job_id: str) -> int:
        """Put a queued job first (a failed or cancelled one is queued again); return its queue position."""
        job = self._desk.job(job_id)
        if job.state in (JobState.FAILED, JobState.CANCELLED):
            await self.retry(job_id)
        elif job.state is not JobState.QUEUED:
            raise NotPossible(f"The job is {job.state}; only a waiting job can be put first.")
        first = min((one.order for one in self._desk.jobs.values()), default=0) - 1
        now = self._clock()
        job = await self._desk.change(
            job_id, lambda job: settle(msgspec.structs.replace(job, order=first), now=now)
        )
        return position(job, self._desk) or 0

    async def set_parameters(self, job_id: str, parameters: Parameters, *, by: str = "owner") -> str:
        """Change live parameters at the next step boundary."""
        job = await self._desk.change(job_id, lambda job: change(job, parameters))
        if job.state in HAS_WORKER:
            return "The parameters change at the next optimizer step."
        return f"The job is {job.state}; the parameters are used when it runs."

    async def command(self, job_id: str, kind: CommandKind, *, by: str = "owner") -> str:
        """Have the trainer do something once."""
        await self._desk.change(job_id, lambda job: (job, [order_for(kind, "", job)]))
        return f"{kind} was passed to the trainer."

    async def logs(self, job_id: str, limit: int, offset: int) -> LogPage:
        """Return lines of the job's log."""
        self._desk.job(job_id)
        return await self._read_log(job_id, limit, offset)

    async def points(self, job_id: str, after_step: int = -1, limit: int = 1000) -> list[PointView]:
        """Return points of the current curve, for each step those of its newest attempt, merged."""
        self._desk.job(job_id)
        rows = await self._desk.ledger.journal.read(lambda journal: journal.points(job_id, after_step, limit))
        merged: dict[int, PointView] = {}
        for row in rows:
            metrics = _metrics.decode(row.body)
            before = merged.get(row.step)
            merged[row.step] = PointView(
                step=row.step,
                epoch=metrics.epoch,
                time=metrics.time,
                attempt=row.attempt,
                values={**(before.values if before else {}), **metrics.values},
                trend=metrics.trend,
            )
        return list(merged.values())

    async def checkpoints(self, job_id: str) -> list[CheckpointView]:
        """Return the job's checkpoints on disk."""
        self._desk.job(job_id)
        return await self._list_checkpoints(job_id)

    def health(self) -> Health:
        """Return how the agent is."""
        return self._health()


def _reached(job: Job, want: Want) -> bool:
    return {
        Want.PAUSE: JobState.PAUSED,
        Want.CANCEL: JobState.CANCELLED,
        Want.STOP: JobState.COMPLETED,
        Want.RUN: JobState.RUNNING,
    }[want] is job.state


def position(job: Job, desk: JobDesk) -> int | None:
    """Return the job's place among those that wait, from 1."""
    waiting = [one.job_id for one in agenda.queue(desk.jobs.values())]
    return waiting.index(job.job_id) + 1 if job.job_id in waiting else None


def view(job: Job, desk: JobDesk) -> JobView:
    """Return the job as it is shown."""
    shared = {name: getattr(job, name) for name in JobView.__struct_fields__ if name in _SHARED}
    return JobView(**shared, queue_position=position(job, desk))


_SHARED = frozenset(JobView.__struct_fields__) & frozenset(Job.__struct_fields__)
