"""What survives: a hub killed in the middle of everything loses nothing and doubles nothing."""

import asyncio
import random
import shutil
import signal
import sqlite3
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from agent.hub.errors import StoreFailed
from agent.hub.store import RECORDS_IN_A_COMMIT, Db, Store
from protocol.messages import JobSeen
from protocol.records import JobStatus, LogChunk, Point, Schema
from protocol.rest import CLAIM, HEADER_AGENT
from tests.hub.support import HubProcess, job_path, submit
from tests.support.scripted_agent import ScriptedAgent

ROUNDS = 4
PER_ROUND = 3000


def test_a_killed_hub_loses_nothing_and_doubles_nothing(tmp_path: Path) -> None:
    chance = random.Random(7)

    async def one_round(agent: ScriptedAgent, hub: HubProcess, job_id: str, start: int) -> None:
        async with agent.connected():
            await agent.until_wanted(job_id)
            for step in range(start, start + PER_ROUND):
                agent.add(Point(1.0, 1, step, 0.0, 1, [float(step)]), job_id)
                if step % 100 == 0:
                    agent.add(LogChunk(1.0, 1, step, [f"line {step}"]), job_id)
            before = dict(agent.ackeds)
            await agent.until(lambda: agent.ackeds != before)
            await anyio.sleep(chance.random() * 0.05)
            hub.kill()

    async def main(hub: HubProcess) -> None:
        with hub.client() as client:
            job_id, _ = submit(client)
        agent = ScriptedAgent(hub.url, hub.key)
        agent.add(JobStatus(1.0, 1, "running"), job_id)
        agent.add(Schema(1, ["train_loss"]), job_id)
        for number in range(ROUNDS):
            await one_round(agent, hub, job_id, 1 + number * PER_ROUND)
            hub.start()
            if number == 1:
                agent.reborn()
        async with agent.connected():
            await agent.until_acked()
        with hub.client() as client:
            points = client.get(job_path(job_id, "metrics")).json()["metrics"]
            assert [point["step"] for point in points] == list(range(1, ROUNDS * PER_ROUND + 1))
            assert all(point["train_loss"] == point["step"] for point in points)
            logs = client.get(job_path(job_id, "logs"), params={"limit": 1000}).json()["logs"]
            assert sorted(logs) == sorted({f"line {n}" for n in range(100, ROUNDS * PER_ROUND + 1, 100)})
            assert client.get(job_path(job_id, "status")).json()["status"] == "running"

    with HubProcess(tmp_path / "hub", "--no-page") as hub:
        anyio.run(main, hub)
        hub.kill()
    db = sqlite3.connect(tmp_path / "hub" / "hub.sqlite3")
    assert db.execute("SELECT count(*) FROM points").fetchone() == (ROUNDS * PER_ROUND,)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_a_stopped_hub_says_goodbye_and_leaves_with_0(tmp_path: Path) -> None:
    async def main(hub: HubProcess) -> None:
        agent = ScriptedAgent(hub.url, hub.key)
        async with agent.connected():
            assert await anyio.to_thread.run_sync(hub.signal, signal.SIGTERM) == 0
            code, reason = await agent.until_closed()
            assert (code, reason) == (4000, "the hub is shutting down")
            assert agent.goaways[0].retry_after_s > 0

    with HubProcess(tmp_path / "hub", "--no-page") as hub:
        anyio.run(main, hub)


def test_a_key_is_made_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    with HubProcess(tmp_path / "hub", "--no-page", key=None) as hub:
        key = hub.key
        assert len(key) == 36
        hub.kill()
        assert all(
            key.encode() not in file.read_bytes() for file in (tmp_path / "hub").iterdir() if file.is_file()
        )
        hub.start()
        with hub.client() as client:
            assert client.get("/api/training/agents").status_code == 200


def test_two_hubs_do_not_share_a_folder(tmp_path: Path) -> None:
    with HubProcess(tmp_path / "hub", "--no-page"), pytest.raises(RuntimeError) as refused:
        HubProcess(tmp_path / "hub", "--no-page").start()
    assert "another hub already uses" in str(refused.value)


def test_a_write_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    async def main() -> None:
        store = Store(tmp_path / "db")

        def add(name: str) -> None:
            store._db.execute("INSERT INTO agents VALUES (?, ?)", (name, b""))

        def bad(db: sqlite3.Connection) -> None:
            add("half")
            raise ValueError("no")

        try:
            futures = [
                store.submit(lambda db: add("one")),
                store.submit(bad),
                store.submit(lambda db: add("two")),
            ]
            await futures[0]
            with pytest.raises(ValueError, match="no"):
                await futures[1]
            await futures[2]
            names = await store.read(lambda db: db.execute("SELECT id FROM agents ORDER BY id").fetchall())
            assert names == [("one",), ("two",)]
        finally:
            store.close()

    anyio.run(main)


def test_a_full_disk_fails_the_write_and_not_the_store(tmp_path: Path) -> None:
    async def main() -> None:
        store = Store(tmp_path / "db")
        try:
            pages = store._db.execute("PRAGMA page_count").fetchone()[0]
            store._db.execute(f"PRAGMA max_page_count={pages + 4}")
            with pytest.raises(StoreFailed, match="could not be written"):
                await store.write(
                    lambda db: db.execute("INSERT INTO agents VALUES ('big', zeroblob(1000000))").fetchall()
                )
            store._db.execute("PRAGMA max_page_count=1000000")
            await store.write(lambda db: db.execute("INSERT INTO agents VALUES ('small', x'')").fetchall())
            assert await store.read(lambda db: db.execute("SELECT id FROM agents").fetchall()) == [("small",)]
        finally:
            store.close()

    anyio.run(main)


def test_a_commit_that_fails_leaves_the_store_usable(tmp_path: Path) -> None:
    async def main() -> None:
        store = Store(tmp_path / "db")

        def orphan(db: sqlite3.Connection) -> None:
            db.execute("CREATE TABLE a (id INTEGER PRIMARY KEY)")
            db.execute("CREATE TABLE b (a INTEGER REFERENCES a DEFERRABLE INITIALLY DEFERRED)")
            db.execute("INSERT INTO b VALUES (1)")

        try:
            store._db.execute("PRAGMA foreign_keys=ON")
            with pytest.raises(StoreFailed, match="FOREIGN KEY"):
                await store.write(orphan)
            with pytest.raises(StoreFailed, match="NOT NULL"):
                await store.write(lambda db: db.execute("INSERT INTO agents VALUES ('x', NULL)").fetchall())
            await store.write(lambda db: db.execute("INSERT INTO agents VALUES ('y', x'')").fetchall())
            assert await store.read(lambda db: db.execute("SELECT id FROM agents").fetchall()) == [("y",)]
        finally:
            store.close()

    anyio.run(main)


def test_many_writes_share_a_commit(tmp_path: Path) -> None:
    async def main() -> None:
        store = Store(tmp_path / "db")
        try:
            before = store.commits
            slow = store.submit(lambda db: time.sleep(0.05))
            rest = [store.submit(lambda db: None) for _ in range(200)]
            await slow
            for future in rest:
                await future
            assert store.commits - before <= 3
        finally:
            store.close()

    anyio.run(main)


def test_a_hub_that_comes_from_a_backup_is_heard(tmp_path: Path) -> None:
    agent_id = "agent_backup1"

    async def retried() -> tuple[str, int]:
        """Let the job fail and be retried; return the command's id and the version after it."""
        agent = ScriptedAgent(hub.url, hub.key, agent_id)
        agent.boot, agent.jobs = int(time.monotonic() * 1000), [JobSeen(job_id, 1, "running", seen)]
        async with agent.connected():
            await agent.until_wanted(job_id)
            agent.add(JobStatus(time.time(), 1, "running"), job_id)
            agent.add(JobStatus(time.time(), 1, "failed"), job_id)
            await agent.until_acked()
            with hub.client() as client:
                client.post(job_path(job_id, "control"), json={"action": "retry"})
            await agent.until(lambda: bool(agent.commands))
            version = (await agent.until_wanted(job_id, version=seen + 1)).version
        return agent.commands[0].command_id, version

    seen = 0
    with HubProcess(tmp_path / "hub") as hub, hub.client() as client:
        job_id, _ = submit(client)
        taken = client.post(CLAIM.format(job_id=job_id), headers={HEADER_AGENT: agent_id})
        assert taken.status_code == 200
        hub.kill()
        shutil.copytree(tmp_path / "hub", tmp_path / "backup")
        hub.start()
        first, seen = anyio.run(retried)
        hub.kill()
        shutil.rmtree(tmp_path / "hub")
        shutil.copytree(tmp_path / "backup", tmp_path / "hub")
        hub.start()
        again, version = anyio.run(retried)
    assert again != first
    assert version == seen + 1


def in_order(folder: Path, *phases: list[dict[str, Any]]) -> list[str]:
    """Ask for writes, by what `Store.submit` takes beside ``name``, and return how they were done.

    The last of each phase but the final one is still being done when the next phase is asked for.
    """
    order: list[str] = []

    async def main() -> None:
        store = Store(folder / "hub.sqlite")
        waits: list[asyncio.Future[None]] = []
        gate = threading.Event()
        for phase in phases:
            begun, before, gate = threading.Event(), gate, threading.Event()

            def last(db: Db, name: str, begun: threading.Event = begun, gate: threading.Event = gate) -> None:
                order.append(f"{name} in commit {store.commits}")
                begun.set()
                gate.wait(10)

            for write in phase:
                name, given = write["name"], {key: write[key] for key in write if key != "name"}
                if write is phase[-1] and phase is not phases[-1]:
                    waits.append(store.submit(partial(last, name=name), **given))
                else:
                    text = f"{name} in commit"
                    waits.append(
                        store.submit(lambda db, text=text: order.append(f"{text} {store.commits}"), **given)
                    )
            before.set()
            if phase is not phases[-1]:
                assert await anyio.to_thread.run_sync(begun.wait, 10)
        for future in waits:
            await future
        store.close()

    anyio.run(main)
    return order


MANY = {"behind": True, "records": RECORDS_IN_A_COMMIT}


def test_what_is_urgent_overtakes_what_waits_and_starves_nothing(tmp_path: Path) -> None:
    points = [{"name": "points 1", **MANY}, {"name": "points 2", **MANY}]
    states = [{"name": "state 1"}, {"name": "state 2"}]
    assert in_order(tmp_path, [{"name": "first", **MANY}], points + states) == [
        "first in commit 0",
        "state 1 in commit 1",
        "state 2 in commit 1",
        "points 1 in commit 2",
        "points 2 in commit 3",
    ]


def test_nothing_overtakes_an_urgent_write_that_was_asked_for_before(tmp_path: Path) -> None:
    asked = [{"name": "state"}, {"name": "greeting", "behind": True}]
    before = [{"name": "points", "behind": True}, {"name": "word"}]
    assert in_order(tmp_path, [{"name": "first", **MANY}], before, asked) == [
        "first in commit 0",
        "word in commit 1",
        "points in commit 2",
        "state in commit 3",
        "greeting in commit 4",
    ]


def test_points_get_every_second_commit_whatever_is_urgent(tmp_path: Path) -> None:
    order: list[str] = []

    async def main() -> None:
        store = Store(tmp_path / "hub.sqlite")
        done = threading.Event()

        def again(db: Db) -> None:
            order.append("state")
            if not done.is_set() and len(order) < 50:
                loop.call_soon_threadsafe(lambda: store.submit(again))
                # The next is queued before this commit ends.
                while not store._urgent and len(order) < 50:
                    time.sleep(0.001)

        loop = asyncio.get_running_loop()
        store.submit(again)
        await store.write(lambda db: (order.append("points"), done.set()), behind=True)
        await anyio.to_thread.run_sync(store.close)

    anyio.run(main)
    assert order.index("points") <= 2
