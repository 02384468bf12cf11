"""Points that are made in a thread of their own while the next step runs."""

import threading

import pytest

from agent.trainer.errors import TrainerError
from agent.trainer.reporter import Reporter
from protocol.failures import FailureReason
from protocol.jobspec import LoraSpec
from protocol.worker import Cancel, Finished, Left, Metrics
from tests.trainer.conftest import Jobs, curve


def test_work_is_done_in_order_and_waited_for() -> None:
    reporter, done, gate = Reporter(), list[int](), threading.Event()
    reporter.give(lambda: (gate.wait(5), done.append(0))[1])
    for number in range(1, 50):
        reporter.give(lambda number=number: done.append(number))
    assert done == []
    gate.set()
    reporter.flush()
    assert done == list(range(50))
    reporter.flush()


def test_what_fails_is_raised_once_and_ends_the_rest() -> None:
    reporter, done = Reporter(), list[int]()

    def fail() -> None:
        raise ValueError("bad step")

    reporter.give(fail)
    reporter.give(lambda: done.append(1))
    with pytest.raises(ValueError, match="bad step"):
        reporter.flush()
    assert done == []
    assert not reporter.failed
    reporter.give(lambda: done.append(2))
    reporter.flush()
    assert done == [2]


def test_work_is_taken_up_whether_the_thread_naps_or_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.trainer.reporter.NAP", 0.001)
    reporter, rang = Reporter(), threading.Event()
    for number in range(200):
        if number % 4 == 3:  # long enough to fall asleep
            threading.Event().wait(0.005)
        rang.clear()
        reporter.give(rang.set)
        assert rang.wait(30), f"piece {number} was left lying"


def test_flush_waits_for_what_the_thread_is_doing() -> None:
    reporter, done = Reporter(), list[int]()
    begun, gate = threading.Event(), threading.Event()
    reporter.give(lambda: (begun.set(), gate.wait(5), done.append(0))[2])
    reporter.give(lambda: done.append(1))
    assert begun.wait(30)
    threading.Timer(0.05, gate.set).start()
    reporter.flush()
    assert done == [0, 1]


def test_points_made_beside_training_are_the_same(jobs: Jobs) -> None:
    wanted = {
        "lora": LoraSpec(r=4, dropout=0.2),
        "training": {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 4, "max_steps": 22},
        "eval_fraction": 0.25,
    }
    plain = jobs.run("plain", **wanted)
    beside = jobs.run("beside", beside=True, **wanted)
    assert curve(beside) == curve(plain)
    assert [event.step for event in beside.of(Metrics)] == [event.step for event in plain.of(Metrics)]
    assert isinstance(beside.last, Finished)
    assert beside.last.weights_hash == plain.last.weights_hash


def test_a_bad_step_is_found_beside_training_too(jobs: Jobs) -> None:
    training = {"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 30}
    with pytest.raises(TrainerError) as caught:
        jobs.run("job", beside=True, training=training)
    assert caught.value.reason is FailureReason.NON_FINITE_LOSS
    assert caught.value.step == 2
    # Not much is trained after it, and nothing is told.
    assert [event.step for event in jobs.line.of(Metrics)] == [1, 2]


def test_nothing_is_said_after_the_last_word(jobs: Jobs) -> None:
    line = jobs.run("job", {3: [Cancel()]}, beside=True, training={"max_steps": 30})
    assert isinstance(line.last, Left)
    assert line.last.why == "cancelled"
