"""A backend without our socket: the real agent against the hosted platform as it is, with its faults."""

import signal
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.platform import Platform
from tests.support.programs import Agent, fake_config, wait_until


def ended(platform: Platform, job_id: str, status: str = "completed") -> dict[str, Any]:
    """Wait until the platform says so, and everything sent; return the row."""
    row = platform.rows[job_id]
    wait_until(lambda: row["status"] == status, f"{job_id} to be {status}; it is {row['status']}")
    return row


def trained(platform: Platform, job_id: str) -> list[int]:
    """Return the steps of the curve in the order in which they were inserted."""
    return [point["step"] for point in platform.chart(job_id) if point["learning_rate"] is not None]


def has(platform: Platform, job_id: str, points: int) -> bool:
    return len(trained(platform, job_id)) >= points


def all_told(platform: Platform, agent: Agent, job_id: str, steps: int) -> None:
    """Wait for curve and log, have the agent leave, and see each step and each line once and in order."""
    own = (agent.home / "logs" / f"{job_id}.log").read_text().splitlines()

    def log() -> list[str]:
        return [line for line in platform.log.get(job_id, []) if not line.startswith("[agent]")]

    wait_until(lambda: len(trained(platform, job_id)) >= steps, f"{steps} points")
    wait_until(lambda: len(log()) >= len(own), f"{len(own)} lines")
    assert agent.stop() == 0
    assert trained(platform, job_id) == list(range(1, steps + 1))
    assert log() == own


def test_a_job_is_polled_claimed_trained_and_told_whatever_goes_wrong(tmp_path: Path) -> None:
    with Platform() as platform:
        platform.fault("claim", "lost")
        platform.fault("metrics", "lost", "gateway")
        platform.fault("logs", "gateway")
        platform.fault("status", "lost")
        platform.fault("jobs", "", "202", "lost")
        job = platform.submit(fake_config("step=0.03 shout_every=1", steps=150, eval_steps=40))
        agent = Agent(tmp_path / "agent", platform.url).start()
        try:
            row = ended(platform, job)
            all_told(platform, agent, job, 150)
            assert row["agent_id"] == (tmp_path / "agent" / "agent_id").read_text().strip()
            assert (row["total_steps"], row["progress"], row["error_message"]) == (150, 100, None)
            assert row["started_at"] and row["completed_at"] and row["max_learning_rate"]
            assert platform.pending_faults() == 0, platform.faulted
            assert platform.most_writers == 1 and platform.seen["put"] == 0
            assert len(platform.key_calls) < 60, "a key may be used 100 times a minute"
            told = platform.agents[row["agent_id"]]
            assert told["platform"] == "linux" and told["version"] and told["hostname"]
        finally:
            agent.stop(signal.SIGKILL)


def test_what_is_done_to_a_job_there_is_noticed(tmp_path: Path) -> None:
    with Platform() as platform:
        job = platform.submit(fake_config("step=0.1", steps=4000))
        agent = Agent(tmp_path / "agent", platform.url, POLL_INTERVAL_SECONDS="2").start()
        try:
            row = platform.rows[job]
            wait_until(lambda: platform.chart(job), "the first points")
            with agent.api() as api:

                def state() -> str:
                    return str(api.get(f"/api/training/status/{job}").json()["state"])

                row["status"] = "paused"
                wait_until(lambda: state() == "paused", "the pause to be obeyed")
                row["status"] = "running"
                wait_until(lambda: state() == "running", "the job to go on")
                polls = platform.seen["poll"]
                wait_until(lambda: platform.seen["poll"] > polls + 2, "polls while a job runs")
                other = platform.submit(fake_config(steps=5))
                row["status"] = "cancelled"
                wait_until(lambda: state() == "cancelled", "the cancel to be obeyed")
            ended(platform, other)
            all_told(platform, agent, other, 5)
            assert row["status"] == "cancelled"
            # What it was set to there was not undone on the way, and is not said again.
            assert job not in [one for one, _ in platform.patches]
        finally:
            agent.stop(signal.SIGKILL)


def test_an_agent_that_is_killed_doubles_nothing_and_loses_nothing(tmp_path: Path) -> None:
    with Platform() as platform:
        # Every batch is stored, and the agent hears of none for a while: each kill falls on something in doubt.
        platform.fault("metrics", *["lost", ""] * 6)
        platform.fault("logs", *["lost", ""] * 3)
        job = platform.submit(fake_config("step=0.04 shout_every=1", steps=200, save_steps=20))
        agent = Agent(tmp_path / "agent", platform.url)
        try:
            for part in (30, 80, 130):
                agent.start()
                enough = partial(has, platform, job, part)
                wait_until(enough, f"{part} points")
                agent.stop(signal.SIGKILL)
            polls = platform.seen["poll"]
            agent.start()
            ended(platform, job)
            wait_until(lambda: len(trained(platform, job)) >= 200, "the whole curve")
            wait_until(lambda: platform.seen["poll"] > polls + 3, "the agent to be up")
            assert agent.stop() == 0
            assert trained(platform, job) == list(range(1, 201))
            own = (agent.home / "logs" / f"{job}.log").read_text().splitlines()
            said = [line for line in platform.log[job] if not line.startswith("[agent]")]
            assert said == own[: len(said)], "lines doubled, lost or out of order"
            assert "failed" not in [status for _, status in platform.patches]
        finally:
            agent.stop(signal.SIGKILL)


def test_both_shapes_of_a_config_run_and_what_cannot_is_told_with_its_reason(tmp_path: Path) -> None:
    stored = "0b1c/private/2d3e.jsonl.gz"
    normalised = {
        "model": {"name": "models/none"},
        "tokenizer": {"name": "models/none"},
        "training": {
            "method": "sft",
            "num_epochs": 1,
            "max_steps": 6,
            "learning_rate": 2e-4,
            "max_length": 512,
        },
        "lora": {"r": 16, "alpha": 32, "dropout": 0.05, "target_modules": None, "bias": "none"},
        "data": {"strategy": "standard"},
        "output_dir": "/workspace/fine_tuned_model",
    }
    raw = fake_config(steps=6, use_lora=True, lora_r=32, evaluation_strategy="no")
    raw["training"]["lora_config"] = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]}
    with Platform(paused_allowed=False) as platform:
        cloud = platform.submit(
            fake_config(steps=3), started_at="2026-01-01T00:00:00Z", created_at="2026-01-01"
        )
        agent = Agent(tmp_path / "agent", platform.url, POLL_INTERVAL_SECONDS="2").start()
        try:
            wait_until(lambda: platform.seen["poll"] > 2, "polls")
            assert platform.seen["claim"] == 0
            bad = platform.submit(fake_config() | {"training": {"method": "alchemy"}}, job_token=None)
            row = ended(platform, bad, "failed")
            wait_until(lambda: row["error_message"], "the reason")
            assert "alchemy" in row["error_message"] and "alchemy" in row["config"]["error"]
            gone = platform.submit(raw, stored)
            row = ended(platform, gone, "failed")
            wait_until(lambda: row["error_message"], "the reason")
            assert "DATASET_MAP" in row["error_message"]
            folder = tmp_path / "agent" / "datasets"
            folder.mkdir()
            (folder / "2d3e.jsonl.gz").write_bytes(b"")
            for config in (raw, normalised):
                job = platform.submit(config, stored)
                ended(platform, job)
                wait_until(partial(has, platform, job, 1), "its points")
            # It waits in the same table, and began elsewhere; all others came past it.
            assert platform.rows[cloud]["status"] == "pending" and not platform.rows[cloud]["agent_id"]
            assert agent.stop() == 0
        finally:
            agent.stop(signal.SIGKILL)


def test_an_agent_that_is_stopped_says_so_where_it_only_polls(tmp_path: Path) -> None:
    with Platform() as platform:
        job = platform.submit(fake_config("step=0.1", steps=4000))
        agent = Agent(tmp_path / "agent", platform.url).start()
        try:
            wait_until(lambda: platform.chart(job), "the first points")
            assert agent.stop() == 0
            said = [line for line in platform.log[job] if line.startswith("[agent]")]
            assert any("is being stopped (SIGTERM)" in line and "does not know" in line for line in said), (
                said
            )
            assert platform.rows[job]["status"] == "paused"
        finally:
            agent.stop(signal.SIGKILL)
