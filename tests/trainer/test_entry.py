"""The trainer as a process: warm, killed, resumed; and the sentence for each way it can end."""

import errno
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agent.runtime import boot
from agent.runtime.bytequeue import ByteQueue, make_queue
from agent.trainer import entry
from agent.trainer.errors import TrainerError
from protocol.failures import FailureReason
from protocol.jobspec import LoraSpec
from protocol.worker import (
    Committed,
    Failed,
    Finished,
    Left,
    Metrics,
    Note,
    Numbered,
    Preparing,
    Ready,
    Warm,
    encoder,
    event_decoder,
)
from tests.support.children import clean_env
from tests.trainer.conftest import Jobs, RecordingLine, curve

DEADLINE = 60.0


class Trainer:
    """A trainer process, and an agent's end that commits whatever comes."""

    def __init__(self, log: Path) -> None:
        ctx = multiprocessing.get_context("spawn")
        self.orders, self._events = make_queue(ctx), make_queue(ctx)
        threads = str(torch.get_num_threads())  # sums in another order are other sums
        plan = boot.Plan(module="agent.trainer.entry", log=str(log), env=clean_env(OMP_NUM_THREADS=threads))
        self.process = ctx.Process(
            target=boot.main, args=(plan, self.orders.reading_end(), self._events.writing_end())
        )
        self.process.start()
        self.orders.close_reader()
        self._events.close_writer()
        self.heard: list[Numbered] = []

    def order(self, order: Any) -> None:
        self.orders.put(encoder.encode(order))

    def hear(self, until: Callable[[Any], bool] = lambda event: False) -> None:
        """Read events up to one that is waited for, or to the end."""
        while True:
            try:
                numbered = event_decoder.decode(self._events.get())
            except EOFError:
                return
            self.heard.append(numbered)
            if numbered.number:
                self.order(Committed(numbered.number))
            if until(numbered.event):
                return

    @property
    def line(self) -> RecordingLine:
        line = RecordingLine({})
        line.events = [numbered.event for numbered in self.heard]
        return line

    def close(self) -> None:
        self.orders.close()
        self.process.join(DEADLINE)
        self._events.close()


@pytest.fixture
def trainers(tmp_path: Path) -> Iterator[Callable[[], Trainer]]:
    started: list[Trainer] = []

    def start() -> Trainer:
        started.append(Trainer(tmp_path / f"trainer-{len(started)}.log"))
        return started[-1]

    yield start
    for trainer in started:
        if trainer.process.is_alive():
            trainer.process.kill()
        trainer.close()


def test_a_killed_trainer_is_followed_by_one_that_ends_as_if_nothing_had_been(
    trainers: Callable[[], Trainer], jobs: Jobs
) -> None:
    wanted: dict[str, Any] = {
        "lora": LoraSpec(r=4, dropout=0.1),
        "eval_fraction": 0.25,
        "training": {"max_steps": 90, "save_steps": 15, "eval_strategy": "steps", "eval_steps": 40},
    }
    # Both are started at once: a warm one costs nothing until its job comes.
    killed, again = trainers(), trainers()
    untouched = jobs.run("untouched", **wanted)
    killed.hear(lambda event: isinstance(event, Warm))
    assert [numbered.number for numbered in killed.heard] == [0]
    killed.order(jobs.start("job", **wanted))
    killed.hear(lambda event: isinstance(event, Metrics) and event.step == 50)
    killed.process.kill()
    killed.process.join(DEADLINE)

    again.hear(lambda event: isinstance(event, Warm))
    again.order(jobs.start("job", attempt=2, first_event=1, **wanted))
    again.hear()
    again.process.join(DEADLINE)
    assert again.process.exitcode == 0
    (ready,) = again.line.of(Ready)
    assert 30 <= ready.start_step < 90
    assert isinstance(again.line.last, Finished)
    assert again.line.last.weights_hash == untouched.last.weights_hash
    assert curve(killed.line, again.line) == curve(untouched)
    numbers = [(numbered.attempt, numbered.number) for numbered in again.heard if numbered.number]
    assert numbers == [(2, number + 1) for number in range(len(numbers))]


def run_here(*orders: Any) -> tuple[int, list[Any]]:
    """Run the trainer's main in this process, as a cold one that finds its orders on the queue."""
    ctx = multiprocessing.get_context("spawn")
    ordered, events = make_queue(ctx), make_queue(ctx)
    for order in orders:
        ordered.put(encoder.encode(order))
    heard: list[Any] = []

    def agent(end: ByteQueue) -> None:
        while True:
            try:
                numbered = event_decoder.decode(end.get())
            except EOFError:
                return
            heard.append(numbered.event)
            if numbered.number:
                ordered.put(encoder.encode(Committed(numbered.number)))

    listener = threading.Thread(target=agent, args=(events.reading_end(),))
    listener.start()
    if not orders:
        ordered.close_writer()
    code = entry.main(ordered.reading_end(), events)
    events.close_writer()
    listener.join(DEADLINE)
    if orders:
        ordered.close_writer()
    events.close_reader()
    return code, heard


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in entry.QUIET.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("quiet")
def test_a_job_that_cannot_start_fails_with_a_sentence(jobs: Jobs) -> None:
    code, heard = run_here(jobs.start("job", base="/nowhere/model"))
    assert code == entry.FAILED
    assert [type(event) for event in heard] == [Warm, Failed]
    failure = heard[-1].failure
    assert failure.reason is FailureReason.MODEL
    assert failure.sentence.startswith("There is no model folder /nowhere/model.")
    assert failure.advice
    assert "TrainerError" in failure.evidence.traceback


@pytest.mark.usefixtures("quiet")
def test_a_whole_job_over_real_queues(jobs: Jobs) -> None:
    code, heard = run_here(jobs.start("job", training={"max_steps": 2}))
    assert code == 0
    assert isinstance(heard[0], Warm)
    assert heard[0].pid == os.getpid()
    assert isinstance(heard[1], Preparing)
    assert isinstance(heard[-1], Finished)


@pytest.mark.usefixtures("quiet")
def test_a_warm_trainer_whose_agent_goes_leaves(jobs: Jobs) -> None:
    assert run_here()[0] == 0


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


@pytest.mark.parametrize(
    ("error", "reason", "words"),
    [
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "device_memory",
            "Tried to allocate 2 GiB",
        ),
        (RuntimeError("CUDA out of memory."), "device_memory", "training.batch_size"),
        (MemoryError(), "host_memory", "machine's memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "host_memory", "max_length"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x/y"),
            "disk_full",
            "The disk is full (/data/x)",
        ),
        (RuntimeError("CUDA error: an illegal memory access\nmore"), "driver", "an illegal memory access"),
        (KeyError("text"), "internal", "KeyError: 'text'"),
        (ValueError(), "internal", "no further words"),
    ],
)
def test_every_error_becomes_a_sentence(error: Exception, reason: str, words: str) -> None:
    failure = entry.failure_of(error)
    assert failure.reason == reason
    assert words in failure.sentence
    assert "\n" not in failure.sentence
    assert failure.evidence is not None
    assert type(error).__name__ in failure.evidence.traceback


def test_our_own_errors_keep_their_rows_and_step() -> None:
    failure = entry.failure_of(TrainerError(FailureReason.DATA, "Row 57 is empty.", rows=[57], step=3))
    assert failure.sentence == "Row 57 is empty."
    assert failure.evidence is not None
    assert (failure.evidence.rows, failure.evidence.step) == ([57], 3)


@pytest.mark.usefixtures("quiet")
def test_a_full_disk_met_anywhere_is_no_failure(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    start = jobs.start("job", training={"max_steps": 2})

    def full(order: Any, line: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/x")

    monkeypatch.setattr("agent.trainer.run.train", full)
    code, heard = run_here(start)
    assert code == entry.FAILED
    assert [type(event) for event in heard] == [Warm, Note, Left]
    assert "The disk is full (/cache)" in heard[1].text and heard[2].why == "disk_full"


def test_advice_that_an_error_brings_is_told() -> None:
    told = entry.failure_of(
        TrainerError(FailureReason.DEVICE_MEMORY, "Full.", advice="512 tokens save 3.1 GB.")
    )
    assert told.advice == "512 tokens save 3.1 GB."
    assert told.evidence is not None and told.evidence.host_memory_gb


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("single", [False, True])
def test_a_job_without_enough_memory_is_told_what_would_save_how_much(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, single: bool
) -> None:
    start = jobs.start("job", training={"max_steps": 2, "batch_size": 8, "max_length": 512})

    def out_of_memory(order: Any, line: Any) -> int:
        if single:
            raise TrainerError(FailureReason.HOST_MEMORY, "A single row did not fit.", step=1)
        raise MemoryError

    monkeypatch.setattr("agent.trainer.run.train", out_of_memory)
    _, heard = run_here(start)
    failure = heard[-1].failure
    assert failure.reason is FailureReason.HOST_MEMORY
    assert "saves about" in failure.advice
    assert ("training.batch_size 4" in failure.advice) is not single, "no smaller batch than single rows"


def test_the_compiler_is_not_loaded_before_a_job_asks_for_it() -> None:
    program = """
import os, sys
from agent.trainer import entry

class Silent:
    def get(self): raise EOFError
    def put(self, frame): pass
    def try_put(self, frame): return True

assert entry.main(Silent(), Silent()) == 0
assert "peft" in sys.modules
assert "torch._inductor.graph" not in sys.modules
assert "TORCHDYNAMO_DISABLE" not in os.environ
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
