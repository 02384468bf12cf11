"""Resumes that are checked, changed inputs that are not gone over, and branches: with a real trainer."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_training import config
from tests.support.programs import Agent, Hub, together, wait_until
from tests.trainer.conftest import build_model, build_tokenizer, chat_rows, write_jsonl


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Agent, Path]]:
    folder = tmp_path_factory.mktemp("rules")
    tokenizer = build_tokenizer()
    build_model(folder / "agent" / "models" / "tiny", len(tokenizer))
    tokenizer.save_pretrained(str(folder / "agent" / "models" / "tiny"))
    with together(folder, fake=False, WARM_TRAINER="true", VERIFY_RESUME="2") as (hub, agent):
        yield hub, agent, folder / "agent" / "datasets"


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
