"""The hub is away for long, the outbox has a quota, the agent sleeps: what the hub holds in the end."""

import math
import os
import signal
import time
from pathlib import Path

from tests.support.programs import fake_config, together, wait_until


def test_over_its_quota_the_curve_goes_in_merged_points_and_nothing_is_hidden(tmp_path: Path) -> None:
    steps = 20_000
    with together(tmp_path, OUTBOX_MAX_MB="1") as (hub, agent):
        job = hub.submit(fake_config("step=0.0003", steps=steps), job_id="long")
        hub.wait_step(job, 5)
        hub.stop(signal.SIGKILL)
        with agent.api() as api:
            wait_until(
                lambda: api.get("/api/training/status/long").json()["status"] == "completed",
                "the job's end without a hub",
            )
        hub.start()
        hub.wait_state(job, "completed")
        points = wait_until(
            lambda: (found := hub.metrics(job)) and found[-1]["step"] == steps and found, "the last point"
        )
        merged = [point for point in points if "merged.points" in point]
        assert merged, "the quota was never reached"
        # Each step is in one point: as itself, or in the count of a merged one.
        assert sum(int(point.get("merged.points") or 1) for point in points) == steps
        assert [point["step"] for point in points] == sorted({point["step"] for point in points})
        last = merged[0]
        assert last["train_loss.min"] <= last["train_loss"] <= last["train_loss.max"]
        assert math.isclose(last["merged.first_step"] + last["merged.points"] - 1, last["step"])
        told = [note["text"] for note in hub.status(job)["notes"]]
        assert any("OUTBOX_MAX_MB" in text for text in told)


def test_an_agent_that_was_stopped_says_for_how_long(tmp_path: Path) -> None:
    with together(tmp_path) as (hub, agent):
        job = hub.submit(fake_config("step=0.02", steps=1000))
        hub.wait_step(job, 10)
        assert agent.process is not None
        os.kill(agent.process.pid, signal.SIGSTOP)
        time.sleep(12.5)  # more than `agent.net.sleep.LATE`
        os.kill(agent.process.pid, signal.SIGCONT)
        hub.wait_state(job, "completed")
        assert [point["step"] for point in hub.metrics(job)] == list(range(1, 1001))
        told = [note["text"] for note in hub.status(job)["notes"]]
        assert any("This machine slept, or its agent was stopped, for 1" in text for text in told), told


def test_the_newest_figures_of_a_job_that_ended_meanwhile_come_before_its_history(tmp_path: Path) -> None:
    steps = 3_000
    with together(tmp_path) as (hub, agent):
        job = hub.submit(fake_config("step=0.0005", steps=steps), job_id="ended")
        hub.wait_step(job, 5)
        hub.stop(signal.SIGKILL)
        with agent.api() as api:
            wait_until(
                lambda: api.get("/api/training/status/ended").json()["status"] == "completed", "the job's end"
            )
        hub.start()
        hub.wait_state(job, "completed")
        assert hub.status(job)["current_step"] == steps
        wait_until(lambda: len(hub.metrics(job)) == steps, "its history")
