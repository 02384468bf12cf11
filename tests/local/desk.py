"""A second implementation of the desk, of plain data, and the local API on a real socket before it."""

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import anyio
import anyio.from_thread
import httpx
import msgspec

from agent.config import Settings, load
from agent.core.ports import CheckpointView, Health, JobView, LogPage, PointView
from agent.errors import BadJob, NotPossible, UnknownJob
from agent.local import ADDRESS_FILE
from agent.local.api import build
from agent.local.auth import local_token
from agent.local.server import serve
from protocol.failures import Evidence, FailureReason, failure
from protocol.lifecycle import JobState, Want, advance, cannot, pursue
from protocol.messages import CommandKind
from protocol.worker import Parameters


def job(job_id: str, state: JobState = JobState.RUNNING, **more: Any) -> JobView:
    known: dict[str, Any] = {
        "job_id": job_id,
        "name": f"Job {job_id}",
        "state": state,
        "want": Want.RUN,
        "by": "user",
        "detail": "",
        "phase": "",
        "attempt": 1,
        "model_name": "tiny",
        "dataset_path": "rows.jsonl",
        "method": "sft",
        "created_at": 1_700_000_000.0,
    }
    return JobView(**(known | more))


FAILED = failure(
    FailureReason.DATA,
    "Row 57 of rows.jsonl: text is null.",
    Evidence(
        traceback='Traceback:\n  File "/a/data.py", line 12, in read\n    row["text"]\nValueError: text is null'
    ),
)


class PlainDesk:
    """Jobs in a dict, and a list of what was asked."""

    def __init__(self, *jobs: JobView) -> None:
        self._jobs = {one.job_id: one for one in jobs}
        self.asked: list[tuple[Any, ...]] = []

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
        if "model" not in config:
            raise BadJob("model: is missing; name a model.")
        new = job_id or "made"
        self.asked.append(("submit", new, dataset_path, name, dataset_content, by))
        self._jobs.setdefault(new, job(new, JobState.QUEUED, queue_position=1))
        return new

    def job(self, job_id: str) -> JobView:
        if job_id not in self._jobs:
            raise UnknownJob(job_id)
        return self._jobs[job_id]

    def jobs(self) -> list[JobView]:
        return list(self._jobs.values())

    async def want(
        self,
        job_id: str,
        want: Want,
        *,
        checkpoint: str = "",
        accept_changes: bool = False,
        by: str = "owner",
    ) -> str:
        now = self.job(job_id)
        sentence = cannot(now.state, want)
        if sentence:
            raise NotPossible(sentence)
        self.asked.append(("want", job_id, want, checkpoint, by, *(["accept"] if accept_changes else [])))
        trigger = pursue(now.state, want)
        state = advance(now.state, trigger) if trigger else now.state
        self._jobs[job_id] = msgspec.structs.replace(now, want=want, state=state)
        return f"The job is {state}."

    async def retry(
        self, job_id: str, *, checkpoint: str = "", accept_changes: bool = False, by: str = "owner"
    ) -> str:
        if self.job(job_id).state is not JobState.FAILED:
            raise NotPossible("Only a failed job can be retried.")
        self.asked.append(("retry", job_id, checkpoint, by, *(["accept"] if accept_changes else [])))
        return "The job is queued again."

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
        self.asked.append(
            ("branch", self.job(job_id).job_id, checkpoint, dict(adjustments), new_id, name, by)
        )
        return new_id or "made"

    async def pin(self, job_id: str, checkpoint: str, pinned: bool) -> list[CheckpointView]:
        self.asked.append(("pin", self.job(job_id).job_id, checkpoint, pinned))
        return await self.checkpoints(job_id)

    async def move_to_front(self, job_id: str) -> int:
        self.asked.append(("front", self.job(job_id).job_id))
        return 1

    async def set_parameters(self, job_id: str, parameters: Parameters, *, by: str = "owner") -> str:
        self.asked.append(("parameters", self.job(job_id).job_id, parameters, by))
        return "They apply at the next step."

    async def command(self, job_id: str, kind: CommandKind, *, by: str = "owner") -> str:
        self.asked.append(("command", self.job(job_id).job_id, kind, by))
        return "Asked."

    async def logs(self, job_id: str, limit: int, offset: int) -> LogPage:
        lines = [f"line {number}" for number in range(5)]
        return LogPage(logs=lines[offset : offset + limit], total_lines=5, offset=offset, limit=limit)

    async def points(self, job_id: str, after_step: int = -1, limit: int = 1000) -> list[PointView]:
        values = {"train_loss": float("nan")}
        points = [
            PointView(step=step, epoch=0.1 * step, time=1e9, attempt=1, values=values) for step in range(4)
        ]
        return [point for point in points if point.step > after_step][:limit]

    async def checkpoints(self, job_id: str) -> list[CheckpointView]:
        shown = CheckpointView(
            path="/c/step-2",
            epoch=0.2,
            step=2,
            eval_loss=1.5,
            train_loss=None,
            size_bytes=10,
            created_at="2030-01-01T00:00:00+00:00",
            is_best=True,
            is_latest=True,
        )
        return [shown] if job_id == "run" else []

    def health(self) -> Health:
        return Health(
            status="ok",
            version="1.0.0",
            agent_id="agent_secretname",
            link="connected",
            link_detail="",
            active_jobs=1,
            queued_jobs=0,
            gpu_available=False,
            gpu_info={},
            backlog=[0, 3, 1],
            uptime_seconds=12.0,
            draining=False,
        )


class Api:
    """A running local API."""

    def __init__(self, url: str, token: str, settings: Settings, desk: PlainDesk) -> None:
        self.url = url
        self.token = token
        self.settings = settings
        self.desk = desk
        self.client = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, trust_env=False
        )
        self.stranger = httpx.Client(base_url=url, trust_env=False)

    def get(self, path: str, **params: Any) -> Any:
        answer = self.client.get(path, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: Any = None) -> Any:
        answer = self.client.post(path, content=json.dumps(body) if body is not None else b"")
        assert answer.status_code == 200, answer.text
        return answer.json()


@contextlib.asynccontextmanager
async def served(app: Any, home: Path, port: int = 0) -> AsyncIterator[str]:
    """Serve ``app``; yield its URL."""
    async with anyio.create_task_group() as group:
        group.start_soon(serve, app, "127.0.0.1", port, home / ADDRESS_FILE)
        with anyio.fail_after(20):
            while not (home / ADDRESS_FILE).exists():  # noqa: ASYNC110 - it is another program's file
                await anyio.sleep(0.01)
        yield (home / ADDRESS_FILE).read_text().strip()
        group.cancel_scope.cancel()


@contextmanager
def api(home: Path, *jobs: JobView, **settings: str) -> Iterator[Api]:
    """Serve the local API before a plain desk in a thread of its own."""
    chosen = load({"AGENT_HOME": str(home), "BACKEND_URL": "https://page.example", **settings})
    desk = PlainDesk(*jobs)
    token = local_token(home)
    found: list[str] = []
    stop: list[Callable[[], None]] = []

    async def main() -> None:
        async with served(build(desk, chosen, token), home) as url:
            ended = anyio.Event()
            loop = anyio.from_thread.BlockingPortal()
            async with loop:
                stop.append(lambda: loop.call(ended.set))
                found.append(url)
                await ended.wait()

    thread = Thread(target=anyio.run, args=(main,))
    thread.start()
    try:
        while not found:
            assert thread.is_alive(), "the local API did not start"
            thread.join(0.01)
        one = Api(found[0], token, chosen, desk)
        with one.client, one.stranger:
            yield one
    finally:
        if stop:
            stop[0]()
        thread.join(20)
