"""Bad moments: races at a start, a damaged or full journal, a lost token, secrets in what a trainer says."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.hearing import cleaned
from agent.runtime.redact import Redactor
from protocol.failures import Evidence, FailureReason, failure
from protocol.worker import Failed, Finished, Note
from tests.support.mounts import needs_mounts
from tests.support.programs import ROOT, Agent, Hub, clean_env, fake_config, together, wait_until

Pair = tuple[Hub, Agent]


@pytest.mark.parametrize("delay", [0.0, 0.03, 0.06, 0.1, 0.15, 0.2])
def test_a_pause_at_any_moment_of_a_start_leaves_no_trainer_that_nobody_knows(
    pair: Pair, delay: float
) -> None:
    hub, agent = pair
    job = hub.submit(fake_config("step=0.02 prepare=0.1", steps=15))
    time.sleep(delay)
    hub.control(job, "pause")
    hub.wait_state(job, "paused")
    with agent.api() as api:
        assert api.get("/health").json()["active_jobs"] == 0
    hub.control(job, "resume")
    hub.wait_state(job, "completed")
    assert [point["step"] for point in hub.metrics(job)] == list(range(1, 16))


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.15])
def test_a_cancel_at_any_moment_of_a_start_ends_it(pair: Pair, delay: float) -> None:
    hub, agent = pair
    job = hub.submit(fake_config("step=0.02 prepare=0.1", steps=1500))
    time.sleep(delay)
    hub.control(job, "cancel")
    hub.wait_state(job, "cancelled")
    with agent.api() as api:
        assert api.get("/health").json()["active_jobs"] == 0


def test_a_job_whose_log_cannot_be_written_fails_and_the_agent_lives_on(pair: Pair) -> None:
    hub, agent = pair
    (agent.home / "logs" / "logless.log").mkdir(parents=True)
    assert (
        "cannot be started"
        in hub.wait_state(hub.submit(fake_config(steps=3), job_id="logless"), "failed")["error"]
    )
    assert hub.wait_state(hub.submit(fake_config(steps=3)), "completed")


def test_a_retry_fetches_the_data_that_could_not_be_fetched(pair: Pair) -> None:
    hub, _ = pair
    answer = hub.http.post(
        f"{hub.url}/api/training/dataset?name=rows.jsonl", content=b'{"text": "one"}\n' * 100
    )
    upload = answer.json()
    (stored,) = [
        path for path in hub.data.rglob("*") if path.is_file() and path.stat().st_size == upload["size"]
    ]
    whole = stored.read_bytes()
    stored.write_bytes(whole.replace(b"one", b"two"))
    job = hub.submit(fake_config(steps=3), upload["storage_path"])
    assert "sha256" in hub.wait_state(job, "failed")["error"]
    stored.write_bytes(whole)
    hub.control(job, "retry")
    wait_until(lambda: hub.status(job)["state"] == "completed", "the retried job's end")


def test_data_that_come_with_a_job_touch_no_file_of_the_owner(pair: Pair) -> None:
    _, agent = pair
    owners = agent.home / "datasets" / "chat.jsonl"
    owners.parent.mkdir(exist_ok=True)
    owners.write_text("mine\n")
    with agent.api() as api:
        for config in ({"training": {"method": "alchemy"}}, fake_config(steps=2)):
            body = {"config": config, "execution_id": "chat", "dataset_content": '{"text": "theirs"}\n'}
            api.post("/api/training/execute", json=body)
        wait_until(
            lambda: api.get("/api/training/status/chat").json()["status"] == "completed", "the job's end"
        )
    assert owners.read_text() == "mine\n"


def test_a_damaged_journal_costs_no_job_and_tells_no_lie(tmp_path: Path) -> None:
    with together(tmp_path) as (hub, agent):
        job = hub.submit(fake_config("step=0.02", steps=80, save_steps=5))
        hub.wait_step(job, 12)
        hub.control(job, "pause")
        hub.wait_state(job, "paused")
        agent.stop()
        journal = agent.home / "journal.sqlite"
        journal.write_bytes(b"\0" * journal.stat().st_size)
        agent.start()
        wait_until(lambda: "the journal was damaged" in agent.output, "the news of the damage")
        hub.control(job, "resume")
        done = hub.wait_state(job, "completed")
        assert done["attempt"] > 1 and done["current_step"] == 80
        assert [point["step"] for point in hub.metrics(job)] == list(range(1, 81))
        assert (agent.home / "agent_id").read_text().strip() == done["agent_id"]


def test_a_full_disk_under_the_journal_pauses_jobs_and_blocks_nobody(tmp_path: Path) -> None:
    """In a mount namespace, where the kernel lets us make one: AGENT_HOME on 8 MiB."""
    command = [*needs_mounts(), sys.executable, "-m", "tests.support.small_home", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_env(), capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["cancelled"] == "cancelled"
    assert said["steps"] == list(range(1, said["total"] + 1))
    assert said["left with"] == 0 and said["disk"], said


def test_no_secret_leaves_with_what_a_trainer_says() -> None:
    redactor = Redactor(["hf_" + "s" * 20])
    token = "hf_" + "s" * 20
    evidence = Evidence(traceback=f"File x\n{token}", log_tail=[token])
    events = [
        Failed(failure(FailureReason.DATA, f"no access with {token}", evidence)),
        Note("warning", f"used {token}"),
        Finished("/m", "", "", 3, {}, [{"prompt": token, "log_likelihood_before": -1.0}]),
    ]
    for event in events:
        assert token not in repr(cleaned(event, redactor, True)), event
    kept = cleaned(events[0], redactor, False)
    assert isinstance(kept, Failed) and kept.failure.evidence == Evidence()
