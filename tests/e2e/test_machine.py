"""The machine runs short, or a trainer stands still or is killed: what becomes of the job, and what is said of it."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.programs import Agent, Hub, fake_config, together, wait_until

Pair = tuple[Hub, Agent]
GB = 1 << 30
QUICK = {"STALL_MIN_SECONDS": "1", "STALL_FACTOR": "5"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A hub and an agent that calls it standing still when nothing was heard for a second."""
    with together(tmp_path_factory.mktemp("quick"), **QUICK) as both:
        yield both


def notes(agent: Agent, job: str) -> list[str]:
    with agent.api() as api:
        return [str(note) for note in api.get(f"/api/training/status/{job}").json().get("notes", [])]


def wait_steps(hub: Hub, job: str, last: int) -> None:
    """Wait for every step once; the curve may come a moment after the state."""
    wait_until(lambda: [point["step"] for point in hub.metrics(job)] == list(range(1, last + 1)), "the curve")


def evidence(failed: dict[str, Any]) -> dict[str, Any]:
    return dict(failed["failure"]["evidence"])


@pytest.mark.parametrize("at", [8, 99], ids=["while it trains", "while the model is written"])
def test_a_full_disk_pauses_the_job_and_it_goes_on_by_itself(quick: Pair, at: int) -> None:
    hub, _ = quick
    job = hub.submit(fake_config(f"disk_at={at} until_attempt=1 need_mb=1", steps=20, save_steps=5))
    done = hub.wait_state(job, "completed")
    assert done["attempt"] == 2
    wait_steps(hub, job, 20)


def test_a_full_disk_that_stays_full_waits_and_can_be_tried_at_once(quick: Pair) -> None:
    hub, agent = quick
    petabyte = 1 << 30
    job = hub.submit(fake_config(f"disk_at=8 until_attempt=2 need_mb={petabyte}", steps=20, save_steps=5))
    paused = hub.wait_state(job, "paused")
    assert paused["by"] == "disk"
    assert f"{petabyte} MB are needed" in paused["detail"]
    assert "goes on by itself" in paused["detail"] and "resume it" in paused["detail"]
    assert "2 steps back" in paused["detail"]
    hub.control(job, "resume")
    wait_until(lambda: hub.status(job)["attempt"] == 2 and hub.status(job)["state"] == "paused", "the second")
    # A restart of the agent is no reason to try again either.
    agent.stop()
    agent.start()
    wait_until(lambda: (agent.home / "local_api").exists(), "the agent")
    assert hub.status(job)["state"] == "paused"
    hub.control(job, "resume")
    assert hub.wait_state(job, "completed")["attempt"] == 3


def test_a_fresh_process_goes_on_at_once_and_counts_for_nothing(quick: Pair) -> None:
    hub, agent = quick
    job = hub.submit(fake_config("fresh_at=7 until_attempt=1", steps=20))
    done = hub.wait_state(job, "completed")
    assert done["attempt"] == 2
    wait_steps(hub, job, 20)
    assert any("fresh process" in note for note in notes(agent, job))


def test_a_trainer_that_stands_still_is_ended_and_started_again(quick: Pair) -> None:
    hub, agent = quick
    job = hub.submit(fake_config("step=0.01 stall_at=12 until_attempt=1", steps=30, save_steps=5))
    done = hub.wait_state(job, "completed")
    assert done["attempt"] == 2
    wait_steps(hub, job, 30)
    assert "Training stood still after step 11" in agent.output


def test_a_trainer_that_stands_still_twice_has_failed_and_shows_where(quick: Pair) -> None:
    hub, _ = quick
    job = hub.submit(fake_config("step=0.01 stall_at=12", steps=30, save_steps=5))
    failed = hub.wait_state(job, "failed")
    assert failed["failure"]["reason"] == "stalled" and failed["attempt"] == 2
    assert "stood still twice" in failed["error"] and "a step usually takes" in failed["error"]
    assert "misbehave" in evidence(failed)["traceback"]


def test_a_trainer_that_somebody_stopped_is_replaced(quick: Pair) -> None:
    hub, agent = quick
    job = hub.submit(fake_config("step=0.01 stop_at=12 until_attempt=1", steps=30, save_steps=5))
    assert hub.wait_state(job, "completed")["attempt"] == 2
    assert "SIGSTOP" in agent.output


@pytest.mark.parametrize(
    ("name", "words"), [("SIGSEGV", "memory that is not its own"), ("SIGILL", "processor")]
)
def test_a_signal_is_named(quick: Pair, name: str, words: str) -> None:
    hub, _ = quick
    job = hub.submit(fake_config(f"signal_at=4 signal={name}", steps=10))
    failed = hub.wait_state(job, "failed")
    assert failed["failure"]["reason"] == "signal"
    assert name in failed["error"] and words in failed["error"]
    seen = evidence(failed)
    assert len(seen["exits"]) == 3 and seen["host_free_gb"] > 0
    # faulthandler's own words, which are the last of the log.
    assert any("Fatal Python error" in line for line in seen["log_tail"])


def test_a_failure_carries_the_end_of_the_log_and_the_memory_at_the_time(quick: Pair) -> None:
    hub, _ = quick
    job = hub.submit(
        fake_config("fail_at=4 shout_every=1 reason=non_finite_loss", steps=10, learning_rate=3e-4)
    )
    failed = hub.wait_state(job, "failed")
    assert failed["failure"]["reason"] == "non_finite_loss"
    assert "0.0003" in failed["failure"]["advice"] and "0.00015" in failed["failure"]["advice"]
    assert "step 3 of 10" in evidence(failed)["log_tail"]


def test_a_job_that_fills_the_memory_is_paused_before_the_kernel_ends_it(tmp_path: Path) -> None:
    # The reserve is set so high that 1.5 GB, and not this machine's all, are in the trainer's reach.
    reserve = (psutil.virtual_memory().available - 3 * GB // 2) >> 20
    if reserve <= 0:
        pytest.skip("this machine has no 1.5 GB to spare")
    with together(tmp_path, HOST_MEMORY_RESERVE_MB=str(reserve)) as (hub, _):
        words = "step=0.03 eat_mb=16 eat_most_mb=3000 until_attempt=1"
        job = hub.submit(fake_config(words, steps=200, save_steps=50))
        paused = hub.wait_state(job, "paused")
        assert paused["by"] == "memory"
        assert "nearly full" in paused["detail"] and f"HOST_MEMORY_RESERVE_MB ({reserve})" in paused["detail"]
        reached = paused["current_step"]
        assert 10 < reached < 200
        hub.control(job, "resume")
        done = hub.wait_state(job, "completed")
        assert done["attempt"] == 2
        wait_steps(hub, job, 200)


def test_a_kill_by_somebody_is_called_a_signal(quick: Pair) -> None:
    hub, _ = quick
    job = hub.submit(fake_config(f"signal_at=4 signal={signal.SIGKILL.name}", steps=10))
    failed = hub.wait_state(job, "failed")
    assert failed["failure"]["reason"] == "signal" and "SIGKILL" in failed["error"]
