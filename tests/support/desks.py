"""A desk on a real journal, where nothing is started, and the uplink in front of it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from agent.config import Settings, load
from agent.core.job import Job
from agent.desk import JobDesk
from agent.ledger import Ledger
from agent.runtime.journal import Journal
from agent.runtime.supervisor import Fact, Supervisor
from agent.uplink import JournalUplink
from protocol.codec import decode_record
from protocol.lifecycle import JobState
from protocol.messages import Machine

EPOCH = 7


def settings(folder: Path, **more: str) -> Settings:
    return load({"AGENT_HOME": str(folder), "BACKEND_URL": "none", **more})


@asynccontextmanager
async def desk_in(
    folder: Path, *jobs: Job, outbox: int = 1 << 20, epoch: int = EPOCH
) -> AsyncIterator[JobDesk]:
    """A desk that has read its journal and has not begun: nothing is started."""
    journal = Journal.open(folder / "journal.sqlite")
    send, facts = anyio.create_memory_object_stream[list[Fact]](8)
    desk = JobDesk(Ledger(journal, outbox), Supervisor(facts=send), devices=["cpu"], at_once=1)
    try:
        with send, facts:
            async with anyio.create_task_group() as group:
                await desk.load(epoch, group)
                for job in jobs:
                    await desk.add(job)
                yield desk
                group.cancel_scope.cancel()
    finally:
        await journal.close()


def job(state: JobState, job_id: str = "j", **fields: Any) -> Job:
    return Job(job_id=job_id, config="{}", from_backend=True, attempt=1, state=state, **fields)


async def stored(desk: JobDesk, scope: str, lane: int = 0, epoch: int = EPOCH) -> list[Any]:
    """Return the records of a stream that are not acknowledged."""
    rows = await desk.ledger.journal.read(lambda rows: rows.records(epoch, scope, lane, 0, 100, 1 << 20))
    return [decode_record(body) for _, body in rows if body is not None]


def uplink_of(
    desk: JobDesk, send_log: Callable[[str, int], Awaitable[None]] | None = None, box: Machine | None = None
) -> JournalUplink:
    """Return an uplink that without ``box`` greets nobody; without ``send_log`` it sends no log either."""

    async def machine() -> Machine:
        assert box is not None, "nobody said hello"
        return box

    async def no_log(job_id: str, offset: int) -> None:
        raise AssertionError("nobody asked for a log")

    return JournalUplink(
        desk,
        agent_id="agent_0123456789abcdef",
        install_id="i",
        boot=1,
        machine=machine,
        send_log=send_log or no_log,
        keep_secret=lambda secret: None,
    )
