"""A drain whose journal lies on a full disk; run in a mount namespace of its own, with the folder and hub or platform.

Prints one JSON line: how often the journal was full, and the steps and lines that the backend holds in the end.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import anyio
from loguru import logger

from agent.core.job import Job
from agent.desk import JobDesk
from agent.ledger import Ledger
from agent.net.client import RestClient
from agent.net.drain import Drain
from agent.net.platform import PlatformDrain
from agent.net.rest import HubDrain
from agent.runtime.journal import Journal, JournalFull
from agent.runtime.supervisor import Fact, Supervisor
from agent.uplink import JournalUplink
from protocol.lifecycle import JobState
from protocol.messages import Lane, Machine
from protocol.records import LogChunk, Point, Schema
from tests.hub.support import HubProcess, job_path, logs_of, submit
from tests.support.platform import KEY, Platform

AGENT = "agent_0123456789abcdef"
STEPS = 40
Held = tuple[list[int], list[str]]


def _take_all(hog: FileIO) -> None:
    """Fill what is left of the disk."""
    for size in (1 << 16, 1 << 9, 1):
        try:
            while True:
                hog.write(os.urandom(size))
        except OSError:
            continue


async def _until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not condition():  # noqa: ASYNC110 - what it waits for tells nobody
            await anyio.sleep(0.01)


async def _deliver(
    home: Path, job_id: str, token: str, url: str, key: str, kind: type[HubDrain | PlatformDrain]
) -> int:
    journal = Journal.open(home / "journal.sqlite")
    send, facts = anyio.create_memory_object_stream[list[Fact]](8)
    desk = JobDesk(Ledger(journal, 1 << 20), Supervisor(facts=send), devices=["cpu"], at_once=1)
    full = 0

    def count(message: object) -> None:
        nonlocal full
        full += "no space left" in str(message)

    async def machine() -> Machine:
        raise AssertionError("nobody said hello")

    async def send_log(job_id: str, offset: int) -> None:
        raise AssertionError("nobody asked for a log")

    logger.add(count, format="{message}")
    with send, facts:
        async with anyio.create_task_group() as group:
            await desk.load(7, group)
            uplink = JournalUplink(
                desk,
                agent_id=AGENT,
                install_id="i",
                boot=1,
                machine=machine,
                send_log=send_log,
                keep_secret=lambda secret: None,
            )
            job = Job(job_id=job_id, config="{}", from_backend=True, attempt=1, state=JobState.RUNNING)
            await desk.add(job, secrets={"job_token": token})
            await desk.append(job_id, Lane.CONTROL, [Schema(1, ["train_loss"])])
            points = [Point(time.time(), 1, step, step / 10, 1, [1.0]) for step in range(1, STEPS + 1)]
            await desk.append(job_id, Lane.METRICS, points)
            lines = [LogChunk(time.time(), 1, at, [f"line {at}"]) for at in range(STEPS)]
            await desk.append(job_id, Lane.LOGS, lines)
            with (home / "hog").open("wb", buffering=0) as hog:
                try:
                    while True:
                        _take_all(hog)
                        await journal.write(lambda tx: tx.set_meta("any", "x" * 100))
                except JournalFull:
                    # The ballast went to the hog: not even a delete finds room now.
                    assert journal.full
                _take_all(hog)
                rest = RestClient(url, key=lambda: key, agent_id=AGENT, user_agent="test", answer_within=5.0)
                drain: Drain = (
                    HubDrain(rest, uplink) if kind is HubDrain else PlatformDrain(rest, uplink, settle=0.0)
                )
                drain.aside = (0.02, 0.05)
                drain.hurry()
                desk.ledger.on_append = drain.wake
                group.start_soon(drain.run)
                await _until(lambda: full >= 10)
                before = full
                hog.truncate(0)
                await _until(lambda: not any(records for records, _ in desk.ledger.backlog.values()))
            group.cancel_scope.cancel()
    await rest.close()
    await journal.close()
    return before


def by_hub(folder: Path, disk: Path) -> tuple[int, Held]:
    with HubProcess(folder / "hub", "--no-page") as hub, hub.client() as client:
        job_id, token = submit(client)
        client.post(f"/api/training/agent/claim/{job_id}", headers={"X-Agent-ID": AGENT}).raise_for_status()
        full = anyio.run(_deliver, disk, job_id, token, hub.url, hub.key, HubDrain)
        points = client.get(job_path(job_id, "metrics")).json()["metrics"]
        return full, ([point["step"] for point in points], logs_of(client, job_id)["logs"])


def by_platform(folder: Path, disk: Path) -> tuple[int, Held]:
    with Platform() as platform:
        job_id = platform.submit({"model": {"name": "m"}}, status="running", agent_id=AGENT)
        token = str(platform.rows[job_id]["job_token"])
        full = anyio.run(_deliver, disk, job_id, token, platform.url, KEY, PlatformDrain)
        return full, ([point["step"] for point in platform.chart(job_id)], platform.log[job_id])


def main(folder: Path, kind: str) -> None:
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], check=True)
    full, (steps, lines) = (by_hub if kind == "hub" else by_platform)(folder, disk)
    print(json.dumps({"full": full, "steps": steps, "lines": lines}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
