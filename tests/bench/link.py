"""The link's figures: durable points a second, bytes a point, a day's backlog, and how soon it is back."""

import asyncio
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import anyio
import httpx

from tests.bench.figures import DEFAULTS, Figure, at_least, at_most
from tests.bench.points import FIGURES
from tests.bench.watched_hub import WatchedHub
from tests.support.fleet import Fleet
from tests.support.network import BadNetwork
from tests.support.programs import Agent, Hub, clean_env, fake_config, wait_until

POINTS = 60_000
PUTS = 400
DAY = 86_400
ROUNDS = 3


class PointsAgent(Agent):
    """An agent whose trainer does nothing but report; see `tests.bench.points`."""

    def start(self) -> "PointsAgent":
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "out.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.points"],
                env=clean_env(**self.settings),
                cwd=self.home,
                stdout=log,
                stderr=log,
            )
        return self


@contextmanager
def pair(folder: Path, url: str = "", **settings: str) -> Iterator[tuple[Hub, PointsAgent]]:
    """Run a hub, and an agent that dials it (or ``url``, which leads to it)."""
    folder.mkdir(parents=True, exist_ok=True)
    hub = Hub(folder / "hub").start()
    agent = PointsAgent(
        folder / "agent", url or hub.url, **{**DEFAULTS, "METRICS_REPORT_INTERVAL_STEPS": "1", **settings}
    )
    try:
        yield hub, agent
    finally:
        for part in (agent, hub):
            if part.process is not None and part.process.poll() is None:
                part.stop()


def await_points(hub: Hub, job_id: str, last: int) -> float:
    """Return the moment at which the hub holds the point of step ``last``, and those before it."""
    wait_until(lambda: hub.status(job_id)["current_step"] == last, f"step {last}", 600, every=0.02)
    return time.time()


def ingest(folder: Path, points: int = POINTS, rounds: int = ROUNDS) -> dict[str, Figure]:
    """Return points a second from the trainer's queue to the hub's disk, and that against a durable PUT a point."""
    by_socket, by_rest = [], []
    with pair(folder) as (hub, agent):
        claimed = [_claimed(hub) for _ in range(rounds)]
        agent.start()
        for job in claimed:
            job_id = hub.submit(fake_config(steps=points))
            hub.wait_step(job_id, 1)
            stored = await_points(hub, job_id, points)
            made = _first_point(hub, job_id)
            by_socket.append(points / (stored - made))
            by_rest.append(_by_rest(hub, *job))
    rate = statistics.median(by_socket)
    return {
        "ingest": at_least(
            rate, "durable points/s", 30_000, figures=FIGURES, points=points, slowest=min(by_socket)
        ),
        "ingest_ratio": at_least(
            rate / statistics.median(by_rest),
            "times a durable PUT a point",
            40,
            puts_per_second=statistics.median(by_rest),
        ),
    }


def _first_point(hub: Hub, job_id: str) -> float:
    """Return when the first point was said, in Unix seconds."""
    from datetime import datetime

    rows = hub.get(f"/api/training/local/{job_id}/metrics?limit=1")["metrics"]
    first = min(rows, key=lambda row: row["step"])
    return datetime.fromisoformat(first["timestamp"].replace("Z", "+00:00")).timestamp()


def _point(step: int) -> dict[str, float]:
    return {"step": step, "epoch": 0.5} | dict.fromkeys(
        ["train_loss", *(f"figure_{number}" for number in range(1, FIGURES))], 1.0 / max(1, step)
    )


def _claimed(hub: Hub) -> tuple[str, str]:
    """Return a job that an agent without a socket holds, and its token."""
    body = {"config": fake_config(), "dataset_path": "fake/data", "status": "pending"}
    made = hub.http.post(f"{hub.url}/api/training/local/jobs", json=body).json()
    hub.http.post(
        f"{hub.url}/api/training/agent/claim/{made['job_id']}", headers={"X-Agent-ID": "agent_bench0001"}
    ).raise_for_status()
    return made["job_id"], made["job_token"]


def _by_rest(hub: Hub, job_id: str, token: str) -> float:
    """Return points a second when each is a PUT of its own, on a connection that is kept."""
    path = f"{hub.url}/api/training/local/{job_id}/metrics"
    with httpx.Client(headers={"Authorization": f"Bearer {token}"}) as client:
        began = time.perf_counter()
        for step in range(1, PUTS + 1):
            client.put(path, json=_point(step)).raise_for_status()
        return PUTS / (time.perf_counter() - began)


class Relay:
    """A proxy before a hub, in a thread of its own; see `tests.support.network`."""

    def __init__(self, port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self.network = BadNetwork("127.0.0.1", port)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.network.accept(), self._loop).result(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.network.port}"

    def cut(self) -> None:
        """End every connection that goes through here."""
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (self.network.cut(), done.set()))
        done.wait(10)


def wire(folder: Path, points: int = 600) -> dict[str, Figure]:
    """Return the bytes that a point takes on the wire, against a PUT of it with its headers.

    The socket carries points of a trainer of fifty steps a second, each sent by itself: no batch flatters it.
    """
    with pair(folder) as (hub, agent), Relay(hub.port) as relay:
        job, token = _claimed(hub)
        with httpx.Client(headers={"Authorization": f"Bearer {token}"}) as client:
            before = relay.network.bytes_up
            for step in range(1, 101):
                client.put(
                    f"{relay.url}/api/training/local/{job}/metrics", json=_point(step)
                ).raise_for_status()
            by_rest = (relay.network.bytes_up - before) / 100
        agent.settings["BACKEND_URL"] = relay.url
        agent.start()
        job_id = hub.submit({**fake_config(steps=points), "name": "slow"})
        hub.wait_step(job_id, 20)
        at, before = int(hub.status(job_id)["current_step"]), relay.network.bytes_up
        await_points(hub, job_id, points)
        by_socket = (relay.network.bytes_up - before) / (points - at)
    return {
        "wire": at_most(
            by_socket / by_rest, "of a PUT's bytes", 0.25, socket_bytes=by_socket, put_bytes=by_rest
        )
    }


def backlog(folder: Path, points: int = DAY) -> dict[str, Figure]:
    """Return how soon a day's points are at a hub that was away, the newest and all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    hub = WatchedHub(folder / "hub").start()
    # Without the turn that REST has after some dials in vain: it is the socket that is measured.
    settings = {**DEFAULTS, "METRICS_REPORT_INTERVAL_STEPS": "1", "BACKEND_TRANSPORT": "websocket"}
    agent = PointsAgent(folder / "agent", hub.url, **settings).start()
    try:
        job_id = hub.submit({**fake_config(steps=points), "name": "waits"})
        hub.wait_step(job_id, 1)
        hub.stop(signal.SIGKILL)
        with agent.api() as api:
            path = f"/api/training/status/{job_id}"
            wait_until(lambda: api.get(path).json()["current_step"] == points, "the last step without a hub")
        hub.start()
        newest = await_points(hub, job_id, points)
        opened = hub.seen("open")[-1][1]
        stored = hub.points(job_id, points)
        all_at = max(at for _, _, at in stored)
        assert len({step for step, _, _ in stored}) == points
    finally:
        for part in (agent, hub):
            if part.process is not None and part.process.poll() is None:
                part.stop()
    return {
        "backlog_newest": at_most(newest - opened, "s from the socket to the newest point", 1.0),
        "backlog_stored": at_most(all_at - opened, f"s until {points} points are stored", 10.0),
    }


def redial(folder: Path, agents: int = 60) -> dict[str, Figure]:
    """Return how soon agents are back after their connection was cut."""
    folder.mkdir(parents=True, exist_ok=True)
    hub = Hub(folder / "hub").start()
    try:
        with Relay(hub.port) as relay:
            gaps = anyio.run(Fleet(hub, agents, relay.url).cut_off, relay.cut)
    finally:
        hub.stop()
    return {
        "redial": at_most(
            statistics.median(gaps), "s from a cut to the next session", 1.0, agents=agents, slowest=max(gaps)
        )
    }
