"""A hub in a process of its own, and a client for its REST routes."""

import json
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import httpx

from protocol.records import JobStatus, Point, Schema
from tests.support.scripted_agent import ScriptedAgent

KEY = "wak_" + "k" * 32
CONFIG: dict[str, Any] = {"model": {"name": "tiny"}, "training": {"max_steps": 4}}


class HubProcess:
    """`python -m agent.hub`, killed or stopped at will, and started again on the same data."""

    def __init__(self, data_dir: Path, *options: str, key: str | None = KEY) -> None:
        self.data_dir = data_dir
        self.options = options
        self.key = key or ""
        self.url = ""
        self._given = ["--api-key", key] if key else []
        self._process: subprocess.Popen[str] | None = None
        self._port = 0

    def __enter__(self) -> "HubProcess":
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start and wait until it listens; the port stays the same from the second start on."""
        command = [
            sys.executable,
            "-m",
            "agent.hub",
            "--port",
            str(self._port),
            "--data-dir",
            str(self.data_dir),
        ]
        self.log = self.data_dir.with_suffix(".log")
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [*command, "--json", *self._given, *self.options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            raise RuntimeError(f"the hub did not start: {self.log.read_text()}")
        said = json.loads(line)
        self.url = said["url"]
        self._port = int(self.url.rsplit(":", 1)[1])
        self.key = said["api_key"] or self.key

    def signal(self, number: int) -> int:
        """Send a signal and return the exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        self._process.communicate(timeout=20)
        status = self._process.returncode
        self._process = None
        return status

    def kill(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)

    def client(self, key: str | None = None) -> httpx.Client:
        """Return a client that carries the API key."""
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=20)


def submit(client: httpx.Client, **fields: Any) -> tuple[str, str]:
    """Submit a job; return its id and token."""
    body = {"config": CONFIG, "dataset_path": "data.jsonl", "status": "pending", **fields}
    answer = client.post("/api/training/local/jobs", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["job_id"], answer.json()["job_token"]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def job_path(job_id: str, tail: str) -> str:
    return f"/api/training/local/{job_id}/{tail}"


NAMES = ["train_loss", "learning_rate", "eta_seconds"]


def an_agent(hub: HubProcess, **options: object) -> ScriptedAgent:
    """Return an agent of its own id that can run no method of other tests' jobs, unless it is told to."""
    return ScriptedAgent(hub.url, hub.key, f"agent_{secrets.token_hex(8)}", **options)  # type: ignore[arg-type]


def status_of(client: httpx.Client, job_id: str) -> dict[str, Any]:
    return client.get(job_path(job_id, "status")).json()  # type: ignore[no-any-return]


def curve_of(client: httpx.Client, job_id: str) -> list[dict[str, float]]:
    return client.get(job_path(job_id, "metrics")).json()["metrics"]  # type: ignore[no-any-return]


def logs_of(client: httpx.Client, job_id: str, **params: int) -> dict[str, Any]:
    return client.get(job_path(job_id, "logs"), params=params).json()  # type: ignore[no-any-return]


def seen_agent(client: httpx.Client, agent: ScriptedAgent) -> dict[str, Any]:
    return client.get(f"/api/training/agents/{agent.agent_id}").json()["agent"]  # type: ignore[no-any-return]


async def until_away(client: httpx.Client, agent: ScriptedAgent) -> dict[str, Any]:
    """Return the agent as the hub shows it once its connection has ended."""
    with anyio.fail_after(20):
        while True:
            seen = seen_agent(client, agent)
            if not seen["connected"]:
                return seen
            await anyio.sleep(0.02)


def control(client: httpx.Client, job_id: str, action: str) -> httpx.Response:
    return client.post(job_path(job_id, "control"), json={"action": action})


def adjust(client: httpx.Client, job_id: str, **values: float) -> httpx.Response:
    return client.patch(job_path(job_id, "update-params"), json=values)


def report(agent: ScriptedAgent, job_id: str, steps: range, attempt: int = 1, loss: float = 1.0) -> None:
    """Say what a run says: its states, names and points."""
    now = time.time()
    agent.add(JobStatus(now, attempt, "preparing"), job_id)
    agent.add(JobStatus(now, attempt, "running"), job_id)
    agent.add(Schema(1, NAMES), job_id)
    for step in steps:
        agent.add(
            Point(now + step, attempt, step, step / 10, 1, [loss / step, 1e-4, 5.0], "improving"), job_id
        )
