"""What the API key may do with jobs."""

import httpx
import pytest

from tests.hub.support import CONFIG, HubProcess, bearer, job_path, submit

JOBS = "/api/training/local/jobs"


def test_health_needs_no_key(hub: HubProcess) -> None:
    answer = httpx.get(f"{hub.url}/health", trust_env=False)
    assert answer.status_code == 200
    assert answer.json()["service"] == "finetunelab-hub"


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        ({}, "Missing authorization header"),
        ({"Authorization": "Bearer nonsense"}, "Invalid API key"),
        ({"X-API-Key": "wak_" + "z" * 32}, "Invalid API key"),
    ],
)
def test_every_read_needs_the_key(hub: HubProcess, headers: dict[str, str], sentence: str) -> None:
    for path in (JOBS, job_path("x", "status"), job_path("x", "logs"), "/api/training/agents"):
        answer = httpx.get(f"{hub.url}{path}", headers=headers, trust_env=False)
        assert (answer.status_code, answer.json()) == (401, {"error": sentence})


@pytest.mark.parametrize("header", ["X-API-Key", "X-Workspace-API-Key"])
def test_the_key_is_taken_from_the_platforms_headers(hub: HubProcess, header: str) -> None:
    assert httpx.get(f"{hub.url}{JOBS}", headers={header: hub.key}, trust_env=False).status_code == 200


def test_a_submitted_job_is_shown_as_it_was_submitted(client: httpx.Client) -> None:
    job_id, token = submit(client, job_id="job-shown", name="Shown")
    assert job_id == "job-shown"
    assert len(token) == 43
    status = client.get(job_path(job_id, "status")).json()
    expected = {
        "job_id": "job-shown",
        "status": "pending",
        "state": "queued",
        "job_name": "Shown",
        "model_name": "tiny",
        "dataset_path": "data.jsonl",
        "progress": 0,
        "current_step": 0,
        "agent_id": None,
        "error": None,
        "agent_connected": False,
    }
    assert {name: status[name] for name in expected} == expected
    listed = client.get(JOBS, params={"status": "pending", "limit": 100}).json()
    row = next(row for row in listed["jobs"] if row["id"] == job_id)
    assert (row["status"], row["progress"], row["loss"]) == ("pending", 0, None)
    assert listed["total"] >= 1


def test_submitting_again_is_harmless_unless_the_config_differs(client: httpx.Client) -> None:
    _, token = submit(client, job_id="job-twice")
    assert submit(client, job_id="job-twice") == ("job-twice", token)
    other = {"job_id": "job-twice", "config": {"model": {"name": "other"}}, "dataset_path": "data.jsonl"}
    answer = client.post(JOBS, json=other)
    assert answer.status_code == 409
    assert "job-twice" in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (
            {"config": {"model": {"name": "m"}, "trainning": {}}},
            400,
            'trainning: no such setting. Did you mean "training"?',
        ),
        ({"config": {"training": {}}}, 400, "model.name"),
        (
            {"config": {"model": {"name": "m"}, "training": {"method": "magic"}}},
            400,
            'unknown method "magic"',
        ),
        ({"config": CONFIG, "job_id": "../up"}, 400, "job_id"),
        ({"config": CONFIG, "status": "completed"}, 400, "status"),
        ({"config": CONFIG, "dataset_path": 7}, 400, "dataset_path"),
        ({"job_id": "never-seen", "total_steps": 5}, 400, "never-seen"),
        ({}, 400, "job_id is required"),
    ],
)
def test_a_bad_submission_says_what_is_wrong(
    client: httpx.Client, body: dict[str, object], status: int, words: str
) -> None:
    answer = client.post(JOBS, json=body)
    assert answer.status_code == status
    assert words in answer.json()["error"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_not_json_is_a_400(client: httpx.Client, content: bytes) -> None:
    answer = client.post(JOBS, content=content)
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_a_body_that_is_too_large_is_a_413(client: httpx.Client) -> None:
    def endless() -> object:
        for _ in range(9):
            yield b" " * 1024 * 1024

    assert client.post(JOBS, content=b" " * (8 * 1024 * 1024 + 1)).status_code == 413
    assert client.post(JOBS, content=endless()).status_code == 413  # type: ignore[arg-type]
    large = {"model": {"name": "m"}, "description": "x" * 200_000}
    assert client.post(JOBS, json={"config": large}).status_code == 413


def test_an_agent_may_set_the_totals_of_a_job_that_exists(client: httpx.Client) -> None:
    job_id, _ = submit(client)
    answer = client.post(JOBS, json={"job_id": job_id, "total_steps": 40, "train_samples": 9, "unknown": 1})
    assert answer.status_code == 200
    status = client.get(job_path(job_id, "status")).json()
    assert (status["total_steps"], status["train_samples"]) == (40, 9)
    assert client.post(JOBS, json={"job_id": job_id, "total_steps": "many"}).status_code == 400


def test_a_job_without_an_agent_is_controlled_at_once(client: httpx.Client) -> None:
    job_id, _ = submit(client)

    def act(action: str) -> httpx.Response:
        return client.post(job_path(job_id, "control"), json={"action": action})

    assert act("pause").json()["result"]["status"] == "paused"
    assert act("pause").json()["result"]["status"] == "paused"
    assert act("resume").json()["result"]["state"] == "queued"
    assert act("cancel").json()["result"]["status"] == "cancelled"
    assert act("cancel").status_code == 200
    refused = act("resume")
    assert refused.status_code == 409
    assert refused.json()["error"].startswith("The job is cancelled; it cannot be resumed.")
    assert act("retry").json()["result"]["status"] == "pending"
    assert act("retry").status_code == 409
    assert act("explode").status_code == 400
    assert client.post(job_path("none", "control"), json={"action": "pause"}).status_code == 404
    assert act("cancel").status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "Empty request body"),
        ({"learning_rate": None}, "No parameters specified"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"warmup_steps": 3}, "warmup_steps: this cannot be changed"),
    ],
)
def test_live_parameters_have_limits(client: httpx.Client, body: dict[str, object], words: str) -> None:
    job_id, _ = submit(client)
    answer = (
        client.patch(job_path(job_id, "update-params"), json=body)
        if body
        else client.patch(job_path(job_id, "update-params"))
    )
    assert answer.status_code == 400
    assert words in answer.json()["error"]


def test_live_parameters_add_up_until_the_job_has_ended(client: httpx.Client) -> None:
    job_id, token = submit(client)
    path = job_path(job_id, "update-params")
    assert client.patch(path, json={"learning_rate": 1e-5}).status_code == 200
    answer = client.patch(path, json={"batch_size": 4}).json()
    assert answer["parameters"] == {"learning_rate": 1e-5, "batch_size": 4}
    client.patch(job_path(job_id, "status"), json={"status": "failed"}, headers=bearer(token))
    refused = client.patch(path, json={"batch_size": 8})
    assert refused.status_code == 400
    assert refused.json()["current_status"] == "failed"


def test_an_unknown_job_is_a_404(client: httpx.Client) -> None:
    for tail in ("status", "metrics", "logs", "checkpoints"):
        assert client.get(job_path("none", tail)).status_code == 404
    assert client.get("/api/training/agents/agent_none").status_code == 404
