"""Resumes that are checked, changed inputs that are not gone over, and branches: with a real trainer."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_training import config
from tests.support.programs import Agent, Hub, fake_config, together, wait_until
from tests.trainer.conftest import build_model, build_tokenizer, chat_rows, write_jsonl


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Agent, Path]]:
    folder = tmp_path_factory.mktemp("rules")
    tokenizer = build_tokenizer()
    build_model(folder / "agent" / "models" / "tiny", len(tokenizer))
    tokenizer.save_pretrained(str(folder / "agent" / "models" / "tiny"))
    with together(folder, fake=False, WARM_TRAINER="true", VERIFY_RESUME="2") as (hub, agent):
        yield hub, agent, folder / "agent" / "datasets"


def test_the_users_word_reaches_the_trainer_and_is_spent(pair: tuple[Hub, Agent]) -> None:
    hub, agent = pair
    job = hub.submit(fake_config("step=0.02", steps=5000, save_steps=2))
    accepted = []
    for word in (True, False):
        hub.wait_step(job, (hub.status(job)["current_step"] or 0) + 3)
        hub.control(job, "pause")
        hub.wait_state(job, "paused")
        hub.http.post(
            f"{hub.url}/api/training/local/{job}/control", json={"action": "resume", "accept_changes": word}
        )
        hub.wait_state(job, "running")
        accepted.append(hub.status(job)["facts"]["accept_changes"])
    assert accepted == ["True", "False"]
    with agent.api() as api:
        assert api.post(f"/api/training/cancel/{job}").status_code == 200
    hub.wait_state(job, "cancelled")
    with agent.api() as api:
        # What has no checkpoint of the real trainer's cannot be branched from, and says so when it starts.
        twig = api.post(f"/api/training/branch/{job}", json={"job_id": f"{job}-twig"}).json()["job_id"]
        wait_until(lambda: api.get(f"/api/training/status/{twig}").json()["state"] == "failed", "its end")
        failed = api.get(f"/api/training/status/{twig}").json()
        assert failed["failure"]["reason"] == "checkpoint"
        assert f"The job {job} has no checkpoint on this machine" in failed["error"]


def test_changed_rows_are_refused_a_resume_is_checked_and_a_branch_goes_its_own_way(
    real: tuple[Hub, Agent, Path],
) -> None:
    hub, agent, data = real
    write_jsonl(data / "mine.jsonl", chat_rows(48))
    job = hub.submit(config(save_steps=2, lora=True), "mine.jsonl")
    hub.wait_step(job, 5)
    hub.control(job, "pause")
    hub.wait_state(job, "paused")

    write_jsonl(data / "mine.jsonl", chat_rows(48, seed=1))
    hub.control(job, "resume")
    wait_until(lambda: hub.status(job)["state"] == "failed", "the refusal")
    refused = hub.status(job)
    assert refused["failure"]["reason"] == "checkpoint"
    assert "the data set has other rows" in refused["error"]
    assert "--accept-changes" in refused["error"]

    write_jsonl(data / "mine.jsonl", chat_rows(48))
    hub.control(job, "retry")
    done = hub.wait_state(job, "completed")
    check = done["resume_check"]
    assert check["equal"], check
    assert (check["attempt"], check["difference"]) == (3, 0.0)
    assert check["last"] - check["first"] >= 1
    with agent.api() as api:
        assert api.get(f"/api/training/status/{job}").json()["resume_check"]["equal"]

    write_jsonl(data / "mine.jsonl", chat_rows(48, seed=1))
    wish = {"config_adjustments": {"training": {"learning_rate": 1e-3, "max_steps": 18}}}
    answer = hub.http.post(f"{hub.url}/api/training/local/{job}/branch", json=wish)
    assert answer.status_code == 200, answer.text
    twig = answer.json()["job_id"]
    branched = hub.wait_state(twig, "completed")
    assert branched["resumed_from_job_id"] == job
    assert branched["facts"]["branched_from"] == f"{job} step-14"
    assert [point["step"] for point in hub.metrics(twig)] == [15, 16, 17, 18]
    notes = [note["text"] for note in branched["notes"]]
    assert any(note.startswith("The data set has other rows: accepted; ") for note in notes)
