"""The stand: a hub, an agent on a small disk where one can be had, and a bad network between them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.link import trainer
from tests.support.programs import ROOT, Agent, clean_env, end, wait_until
from tests.support.recording import RecordingHub

HEARTBEAT = 2.0
"""Seconds; a silent link is dead after 2.5 of them."""


class RecordingAgent(Agent):
    """Starts the agent of this package."""

    def start(self) -> "RecordingAgent":
        self.home.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.link.agent_main"],
                env=clean_env(**self.settings),
                cwd=self.home,
                stdout=log,
                stderr=log,
            )
        return self

    @property
    def log(self) -> Path:
        """What it prints lies beside its home: that disk fills up."""
        return self.home.parent / f"{self.home.name}.log"


class Network:
    """`tests.support.network` in a process of its own."""

    def __init__(self, target: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.network", "0", f"127.0.0.1:{target}"],
            env=clean_env(),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def __call__(self, words: str) -> None:
        """Have it do something."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n", f"the network did not {words}"

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        end(self.process)


class Stand:
    """All of it. ``disk``: the agent's home is a small file system of its own."""

    def __init__(self, folder: Path, *, disk: bool) -> None:
        self.folder = folder
        self.disk = disk
        self.hub = RecordingHub(folder / "hub").start()
        self.network = Network(self.hub.port)
        places = {
            name: str(folder / name.lower())
            for name in ("MODELS_DIR", "CHECKPOINTS_DIR", "LOGS_DIR", "DATASETS_DIR")
        }
        self.checkpoints = folder / "checkpoints_dir"
        self.logs = folder / "logs_dir"
        self.agent = RecordingAgent(
            folder / "home",
            f"http://127.0.0.1:{self.network.port}",
            LOG_LEVEL="INFO",
            HEARTBEAT_INTERVAL_SECONDS=f"{HEARTBEAT:g}",
            fake=True,
            **places,
        ).start()

    def stop(self) -> None:
        """End every process."""
        for part in (self.agent, self.hub):
            if part.process is not None and part.process.poll() is None:
                part.process.send_signal(signal.SIGCONT)
                part.stop()
        self.network.stop()

    def said(self, job: str) -> list[trainer.Said]:
        """Return the trainer's own record."""
        return list(trainer.read(self.checkpoints, job))

    def trainer_pid(self, job: str) -> int:
        """Return the process of the newest attempt."""
        return int(next(said for said in reversed(self.said(job)) if said.step == 0).values["pid"])

    def signal_agent(self, number: int) -> None:
        assert self.agent.process is not None
        os.kill(self.agent.process.pid, number)

    def kill_agent(self) -> None:
        """SIGKILL; its trainer notices and leaves."""
        self.agent.stop(signal.SIGKILL)

    def kill_trainer(self, job: str) -> bool:
        """SIGKILL; False where the newest attempt has left by itself."""
        try:
            os.kill(self.trainer_pid(job), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def fill(self) -> None:
        """Leave no byte on the agent's disk."""
        with (self.agent.home / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
            while True:
                ballast.write(b"\0" * 65536)
        with (self.agent.home / "ballast").open("ab", buffering=0) as ballast, suppress(OSError):
            while True:
                ballast.write(b"\0" * 512)

    def make_room(self) -> None:
        (self.agent.home / "ballast").unlink()

    def alive(self) -> None:
        """Fail where a program has ended that nobody has ended."""
        for part in (self.agent, self.hub):
            code = part.process.poll() if part.process is not None else None
            assert code is None, f"{type(part).__name__} ended with {code}; see {self.folder}"

    def wait_presence(self, word: str) -> None:
        """Wait until the hub sees the agent so: connected, polling."""
        wait_until(
            lambda: any(
                agent["presence"] == word for agent in self.hub.get("/api/training/agents")["agents"]
            ),
            f"an agent {word} at the hub",
        )


def pause(seconds: float) -> None:
    """Let a fault last."""
    time.sleep(seconds)
