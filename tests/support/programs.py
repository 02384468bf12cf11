"""Starts the real programs as processes, for tests and benchmarks: hub, agent, and what they need."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
KEY = "wak_" + "k" * 32
PATIENCE = 120.0
"""Seconds a test waits for what must happen; a safety net, never a measure."""


def clean_env(**more: str) -> dict[str, str]:
    """Return an environment without settings of whoever runs the tests."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name
        in ("PATH", "HOME", "LANG", "TMPDIR", "COVERAGE_PROCESS_START", "COVERAGE_FILE", "VIRTUAL_ENV")
    }
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **more}


def wait_until(what: Callable[[], Any], why: str, within: float = PATIENCE, every: float = 0.05) -> Any:
    """Return the first true value of ``what``; fail with ``why`` when there is none in time."""
    end = time.monotonic() + within
    while True:
        value = what()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {within:g} s in vain: {why}")
        time.sleep(every)


class Hub:
    """A hub in its own process, and its REST routes."""

    module = "agent.hub"
    """What is started; a benchmark starts the hub with a stopwatch."""

    def __init__(self, data: Path, *more: str, port: int = 0) -> None:
        self.data = data
        self.more = more
        self.port = port
        self.process: subprocess.Popen[str] | None = None
        self.url = ""
        self.http = httpx.Client()

    def start(self) -> "Hub":
        """Start it, on the port it had before if it had one."""
        self.http = httpx.Client(headers={"Authorization": f"Bearer {KEY}"}, timeout=30)
        command = [sys.executable, "-m", self.module, "--port", str(self.port), "--data-dir", str(self.data)]
        log = (self.data.parent / f"{self.data.name}.log").open("a")
        self.process = subprocess.Popen(
            [*command, "--api-key", KEY, "--json", *(self.more or ("--no-page",))],
            env=clean_env(),
            cwd=self.data.parent,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        log.close()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the hub said nothing; see {self.data}.log"
        self.url = json.loads(line)["url"].rstrip("/")
        self.port = int(self.url.rpartition(":")[2])
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it and return its exit code."""
        assert self.process is not None
        self.http.close()
        return end(self.process, number)

    def get(self, path: str) -> Any:
        answer = self.http.get(f"{self.url}{path}")
        answer.raise_for_status()
        return answer.json()

    def submit(
        self, config: dict[str, Any], dataset_path: str = "fake/data", job_id: str | None = None
    ) -> str:
        body = {"job_id": job_id, "config": config, "dataset_path": dataset_path, "status": "pending"}
        answer = self.http.post(f"{self.url}/api/training/local/jobs", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["job_id"])

    def control(self, job_id: str, action: str, **more: str) -> dict[str, Any]:
        answer = self.http.post(
            f"{self.url}/api/training/local/{job_id}/control", json={"action": action, **more}
        )
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def status(self, job_id: str) -> dict[str, Any]:
        return dict(self.get(f"/api/training/local/{job_id}/status"))

    def metrics(self, job_id: str) -> list[dict[str, Any]]:
        return list(self.get(f"/api/training/local/{job_id}/metrics")["metrics"])

    def logs(self, job_id: str) -> list[str]:
        return list(self.get(f"/api/training/local/{job_id}/logs?limit=10000&offset=0")["logs"])

    def wait_state(self, job_id: str, *states: str, within: float = PATIENCE) -> dict[str, Any]:
        """Wait until the job is in one of our states; a job that failed instead fails the test with its error."""
        seen: dict[str, Any] = {}

        def there() -> bool:
            seen.update(self.status(job_id))
            if seen["state"] == "failed" and "failed" not in states:
                raise AssertionError(f"the job failed: {seen.get('error')}")
            return seen["state"] in states

        try:
            wait_until(there, "", within)
        except AssertionError as error:
            raise AssertionError(f"{error}; wanted {states}, the job stands at {seen}") from None
        if seen["state"] == "completed" and "completed" in states:
            # A state goes ahead of the points before it.
            last = int(seen["current_step"] or 0)
            wait_until(lambda: self._has_point(job_id, last), f"the point of step {last}", 20)
        return seen

    def _has_point(self, job_id: str, step: int) -> bool:
        points = self.metrics(job_id)
        return step == 0 or (bool(points) and points[-1]["step"] >= step)

    def wait_step(self, job_id: str, step: int, within: float = PATIENCE) -> None:
        def there() -> bool:
            stands = self.status(job_id)
            assert stands["state"] != "failed", f"the job failed: {stands['error']}"
            return (stands["current_step"] or 0) >= step

        wait_until(there, f"step {step} of {job_id}", within)


class Agent:
    """An agent in its own process, with a home of its own."""

    def __init__(self, home: Path, backend_url: str, *, fake: bool = True, **settings: str) -> None:
        self.home = home
        self.fake = fake
        self.settings = {
            "AGENT_HOME": str(home),
            "BACKEND_URL": backend_url,
            "API_KEY": KEY,
            "PORT": "0",
            "LOG_LEVEL": "DEBUG",
            "GPU_MONITORING_INTERVAL_SECONDS": "1",
            "METRICS_REPORT_INTERVAL_STEPS": "1",
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Agent":
        module = "tests.support.agent_main" if self.fake else "agent"
        command = [sys.executable, "-m", module] + ([] if self.fake else ["start"])
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "out.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=clean_env(**self.settings), cwd=self.home, stdout=log, stderr=log
            )
        return self

    @property
    def output(self) -> str:
        return (self.home / "out.log").read_text(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        return end(self.process, number)

    def api(self) -> httpx.Client:
        """Return a client of the local API, once it is up."""
        address = self.home / "local_api"
        wait_until(lambda: address.exists() and address.read_text().strip(), "the local API")
        token = (self.home / "local_token").read_text().strip()
        return httpx.Client(
            base_url=address.read_text().strip(), headers={"Authorization": f"Bearer {token}"}, timeout=30
        )


def end(process: "subprocess.Popen[Any]", number: int = signal.SIGTERM) -> int:
    """Signal a process that we started, and return its exit code."""
    if process.poll() is None:
        process.send_signal(number)
    try:
        return process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError(f"{process.args} did not end within 60 s of signal {number}") from None
    finally:
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def together(folder: Path, *, fake: bool = True, **settings: str) -> Iterator[tuple[Hub, Agent]]:
    """Run a hub and an agent that dials it."""
    hub = Hub(folder / "hub").start()
    agent = Agent(folder / "agent", hub.url, fake=fake, **settings).start()
    try:
        yield hub, agent
    finally:
        for part in (agent, hub):
            if part.process is not None and part.process.poll() is None:
                part.stop()


def fake_config(words: str = "", steps: int = 20, **training: Any) -> dict[str, Any]:
    """Return a job for the fake trainer; see `agent.trainer.fake` for the words."""
    return {
        "name": f"fake {words}",
        "model": {"name": "models/none"},
        "training": {"method": "sft", "max_steps": steps, "logging_steps": 1, **training},
    }
