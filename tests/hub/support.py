"""A hub in a process of its own, and a client for its REST routes."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

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
