"""Trainers for tests: a supervisor with its facts noted, hostile children, and an agent that can be killed.

A child started with this module does what the name in its environment, BEHAVIOUR, asks for. Run as a program
(``python -m tests.support.children FOLDER NAME STEPS``) it is a small agent with one fake job.
"""

import atexit
import contextlib
import ctypes
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio

from agent.runtime.bytequeue import ByteQueue
from agent.runtime.supervisor import Exited, Fact, Heard, Misbehaved, Supervisor
from protocol.jobspec import JobSpec, ModelSpec, TrainingSpec
from protocol.worker import (
    AnyEvent,
    AnyOrder,
    Committed,
    Left,
    Limits,
    Metrics,
    Note,
    Numbered,
    Start,
    Workspace,
    encoder,
    order_decoder,
)

FAKE = "agent.trainer.fake"
HOSTILE = "tests.support.children"
DEADLINE = 60.0
"""Seconds after which a test that waits for a process has failed; none of them needs more than a few."""


def clean_env(**more: str) -> dict[str, str]:
    """An environment with which Python starts and this repository is found."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    kept |= {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    return kept | more


def start_order(folder: Path, name: str = "", *, attempt: int = 1, **training: Any) -> Start:
    """A job for the fake with its folders under ``folder``."""
    spec = JobSpec(job_id="job", name=name, model=ModelSpec(name="none"), training=TrainingSpec(**training))
    return Start(
        spec=spec,
        attempt=attempt,
        workspace=Workspace(
            checkpoints=str(folder / "checkpoints"),
            output=str(folder / "model"),
            cache=str(folder / "cache"),
            model="",
            data="",
        ),
        limits=Limits(logging_steps=1, save_steps=1000),
    )


class Watch:
    """A running supervisor and every fact it told so far."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.facts: list[Fact] = []
        self._news = anyio.Event()

    async def until(self, wanted: Callable[[Fact], bool], limit: float = DEADLINE) -> Fact:
        """Wait for a fact; those that have come count."""
        seen = 0
        with anyio.fail_after(limit):
            while True:
                for fact in self.facts[seen:]:
                    if wanted(fact):
                        return fact
                seen = len(self.facts)
                await self._news.wait()

    async def heard(self, kind: type[AnyEvent], wanted: Callable[[Any], bool] = lambda event: True) -> Any:
        """Wait for an event of a kind and return it."""
        fact = await self.until(
            lambda fact: (
                isinstance(fact, Heard)
                and isinstance(fact.numbered.event, kind)
                and wanted(fact.numbered.event)
            )
        )
        assert isinstance(fact, Heard)
        return fact.numbered.event

    async def exited(self, attempt: int = 1, limit: float = DEADLINE) -> Exited:
        """Wait for the end of an attempt."""
        fact = await self.until(lambda fact: isinstance(fact, Exited) and fact.attempt == attempt, limit)
        assert isinstance(fact, Exited)
        return fact

    def events(self, kind: Any = object, attempt: int | None = None) -> list[Any]:
        """Return what was heard, in order."""
        return [
            fact.numbered.event
            for fact in self.facts
            if isinstance(fact, Heard)
            and isinstance(fact.numbered.event, kind)
            and attempt in (None, fact.attempt)
        ]

    def faults(self) -> list[str]:
        """Return what trainers were blamed for."""
        return [fact.sentence for fact in self.facts if isinstance(fact, Misbehaved)]

    def note(self, fact: Fact) -> None:
        """Add a fact and wake those who wait."""
        self.facts.append(fact)
        self._news.set()
        self._news = anyio.Event()


@contextlib.asynccontextmanager
async def supervised(
    module: str = FAKE, *, commit: bool = True, kill: bool = True, **options: Any
) -> AsyncIterator[Watch]:
    """Run a supervisor whose events are committed as they come; with ``kill`` every child is dead at the end."""
    send, receive = anyio.create_memory_object_stream[list[Fact]](8)
    watch = Watch(Supervisor(facts=send, module=module, **options))
    watch.supervisor.kill_on_exit = kill

    async def listen() -> None:
        async for facts in receive:
            for fact in facts:
                if isinstance(fact, Heard) and commit:
                    watch.supervisor.ask(fact.job_id, Committed(fact.numbered.number))
                watch.note(fact)

    with send, receive:
        async with anyio.create_task_group() as tasks:
            await tasks.start(watch.supervisor.run)
            tasks.start_soon(listen)
            try:
                yield watch
            finally:
                tasks.cancel_scope.cancel()


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.path, "w"))


class _Lingering:
    """Something of a library whose end takes its time."""

    def __del__(self) -> None:
        print("taken apart")


def main(orders: ByteQueue, events: ByteQueue) -> int:
    """Be the child that BEHAVIOUR names. It knows its job's attempt to be 1."""
    kind, _, argument = os.environ["BEHAVIOUR"].partition(" ")
    fd = events.writer_fileno()

    def say(number: int, event: AnyEvent) -> None:
        events.put(encoder.encode(Numbered(1, number, event)))

    match kind:
        case "bomb":
            events.put(pickle.dumps(Bomb(argument)))
        case "deep":
            events.put(b"\x93\x01\x01\x94\x0a\xa1a\xa1b" + b"\x91" * 100_000 + b"\x01")
        case "garbage":
            os.write(fd, bytes(range(255, 0, -1)) * 50)
        case "oversize":
            os.write(fd, struct.pack("!i", 2 << 20) + bytes(1 << 16))
        case "endless":
            os.write(fd, struct.pack("!iQ", -1, 1 << 40))
        case "half":
            say(1, Note("info", "whole"))
            os.write(fd, struct.pack("!i", 500) + b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        case "gap":
            say(1, Note("info", "one"))
            say(3, Note("info", "three"))
        case "flood":
            for number in range(1, 1_000_000_000):
                say(number, Note("info", "x" * 1000))
        case "burst":
            for number in range(1, int(argument) + 1):
                say(number, Note("info", str(number)))
            os.kill(os.getpid(), signal.SIGKILL)
        case "stay":
            say(1, Left("paused", 5))
        case "close":
            events.close_writer()
        case "prints":
            print("from Python")
            ctypes.CDLL(None).puts(b"from C")
            ctypes.CDLL(None).fflush(None)
            os.write(1, b"from the descriptor\n")
            subprocess.run([sys.executable, "-S", "-c", "print('from a grandchild')"], check=True)
            print("to stderr", file=sys.stderr)
            os._exit(3)
        case "tells":
            first: AnyOrder = order_decoder.decode(orders.get())
            facts = {
                "env": dict(os.environ),
                "order": type(first).__name__,
                "pid": os.getpid(),
                "session": os.getsid(0),
                "main": [getattr(sys.modules["__main__"], "__file__", None), sys.argv[1:]],
                "sigint": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
                "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
                "fds": _descriptors(),
                "modules": sorted(sys.modules),
            }
            say(1, Note("info", json.dumps(facts)))
            return 0
        case "lingers":
            # Python would take this apart, and only after the callbacks.
            globals()["_kept"] = _Lingering()
            atexit.register(print, "callback")
            sys.stdout.write("no newline, ")
            return 0
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case _:
            raise ValueError(kind)
    time.sleep(600)
    return 0


def _descriptors() -> list[str]:
    """What this process has open, apart from the folder that is read to know it."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(link.readlink()))
    return sorted(found)


async def agent(folder: Path, name: str, steps: int) -> None:
    """Be an agent with one fake job: print its identity, then "training", and leave its points in a file.

    SIGTERM makes it break down, as a defect of its own would.
    """

    async def break_down() -> None:
        with anyio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                raise RuntimeError("a defect")

    async with supervised(kill=False) as watch, anyio.create_task_group() as tasks:
        tasks.start_soon(break_down)
        identity = await watch.supervisor.start(
            "job", start_order(folder, name, max_steps=steps), env=clean_env(), log=folder / "job.log"
        )
        print(json.dumps([identity.pid, identity.create_time]), flush=True)
        await watch.heard(Metrics)
        print("training", flush=True)
        end = await watch.exited(limit=600)
        points = [[point.step, point.time] for point in watch.events(Metrics)]
        text = json.dumps({"sentence": end.sentence, "faults": watch.faults(), "points": points})
        (folder / "agent.json").write_text(text)
        tasks.cancel_scope.cancel()


if __name__ == "__main__":
    anyio.run(agent, Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
