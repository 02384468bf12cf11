"""Every route of the local API, over a real socket."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.lifecycle import JobState, Want
from protocol.messages import CommandKind
from protocol.worker import Estimate, Parameters, Verified
from tests.local.desk import FAILED, Api, api, job

CONFIG = {"model": {"name": "tiny"}, "training": {"method": "sft"}}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    jobs = [
        job(
            "run",
            step=25,
            total_steps=100,
            values={"train_loss": 2.5, "eta_seconds": 30.0, "eval_loss": float("inf")},
            trend="improving",
        ),
        job("wait", JobState.QUEUED, queue_position=2),
        job("soon", JobState.QUEUED, queue_position=1),
        job("done", JobState.COMPLETED, model_path="/m/done"),
        job(
            "bad",
            JobState.FAILED,
            failure=FAILED,
            completed_at=1_700_000_100.0,
            branched_from="run",
            estimate=Estimate(device="cpu", host_gb=3.5, disk_gb=1.0, free_host_gb=9.0, free_disk_gb=9.0),
            resume_check=Verified(5, 6, False, 0.25, "Bad luck."),
        ),
    ]
    with api(tmp_path_factory.mktemp("home"), *jobs) as one:
        yield one


@pytest.fixture
def door(shared: Api) -> Api:
    shared.desk.asked.clear()
    return shared


def test_health_has_the_fields_of_both_older_agents(door: Api) -> None:
    found = door.get("/health")
    assert found["status"] == "ok" and found["service"] and found["version"] == "1.0.0"
    assert found["gpu_available"] is False and found["gpu_info"] == {} and found["active_jobs"] == 1
    assert "agent_secretname" not in str(found)
    assert door.get("/api/training/agent")["agent_id"] == "agent_secretname"


def test_a_job_is_shown_in_the_platforms_words(door: Api) -> None:
    found = door.get("/api/training/status/run")
    assert (found["status"], found["state"], found["progress"]) == ("running", "running", 25.0)
    assert (found["loss"], found["train_loss"], found["remaining_seconds"]) == (2.5, 2.5, 30.0)
    assert found["eval_loss"] is None, "what is not finite is null in JSON"
    assert found["loss_trend"] == "improving"
    assert found["created_at"] == "2023-11-14T22:13:20+00:00"
    assert door.get("/api/training/status/done")["progress"] == 100.0
    failed = door.get("/api/training/status/bad")
    assert failed["error"] == "Row 57 of rows.jsonl: text is null."
    assert failed["failure"]["advice"].startswith("Mend the data set")


def test_jobs_and_queue(door: Api) -> None:
    assert {one["job_id"] for one in door.get("/api/training/jobs")["jobs"]} >= {
        "run",
        "wait",
        "soon",
        "done",
    }
    assert [one["job_id"] for one in door.get("/api/training/queue")["queue"]][:2] == ["soon", "wait"]


def test_execute_takes_what_the_platform_sends(door: Api) -> None:
    body = {
        "config": CONFIG,
        "dataset_path": "rows.jsonl",
        "execution_id": "e1",
        "name": "N",
        "user_id": "u",
        "access_token": "",
        "job_token": "t",
        "unknown": 1,
    }
    answer = door.post("/api/training/execute", body)
    assert answer == {"job_id": "e1", "status": "queued", "message": "Job e1 is queued."}
    assert door.desk.asked == [("submit", "e1", "rows.jsonl", "N", None, "owner")]


def test_execute_needs_no_more_than_a_config(door: Api) -> None:
    assert door.post("/api/training/execute", {"config": CONFIG, "dataset_content": "x"})["job_id"] == "made"
    assert door.desk.asked[0][4] == "x"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{}", "missing required field `config`"),
        (b"not json", "The body is not what this takes"),
        (b'{"config": 1}', "$.config"),
        (b'{"config": {}}', "model: is missing; name a model."),
        (b"[" * 5000, "The body is not what this takes"),
        (b"\xff", "The body is not what this takes"),
    ],
)
def test_a_job_that_cannot_be_accepted_is_400_with_a_sentence(door: Api, body: bytes, said: str) -> None:
    answer = door.client.post("/api/training/execute", content=body)
    assert answer.status_code == 400
    assert said in answer.json()["error"]
    assert door.desk.asked == []


def test_wants(door: Api) -> None:
    answer = door.post("/api/training/pause/run")
    assert answer["success"] is True and answer["state"] == "pausing" and answer["message"]
    door.post("/api/training/resume/run?checkpoint_path=/c/step-2")
    door.post("/api/training/resume/run", {"checkpoint_path": "/c/step-1"})
    door.post("/api/training/resume/run", {"resume_from_best": True})
    door.post("/api/training/resume/run?checkpoint_path=best")
    door.post("/api/training/stop/run")
    door.post("/api/training/cancel/run")
    assert [entry[2:] for entry in door.desk.asked] == [
        (Want.PAUSE, "", "owner"),
        (Want.RUN, "/c/step-2", "owner"),
        (Want.RUN, "/c/step-1", "owner"),
        (Want.RUN, "best", "owner"),
        (Want.RUN, "best", "owner"),
        (Want.STOP, "", "owner"),
        (Want.CANCEL, "", "owner"),
    ]


def test_the_users_word_comes_in_the_body_or_in_the_query(door: Api) -> None:
    door.post("/api/training/resume/run", {"accept_changes": True})
    door.post("/api/training/resume/run?accept_changes=true")
    door.post("/api/training/retry/bad", {"accept_changes": True, "checkpoint_path": "step-2"})
    assert door.desk.asked == [
        ("want", "run", Want.RUN, "", "owner", "accept"),
        ("want", "run", Want.RUN, "", "owner", "accept"),
        ("retry", "bad", "step-2", "owner", "accept"),
    ]


def test_a_branch_is_a_new_job(door: Api) -> None:
    changes = {"training": {"learning_rate": 1e-4}}
    wish = {"checkpoint": "step-2", "config_adjustments": changes, "job_id": "twig", "name": "Twig"}
    answer = door.post("/api/training/branch/run", wish)
    assert answer == {"job_id": "twig", "message": "Job twig begins with checkpoint step-2 of run."}
    assert door.desk.asked == [("branch", "run", "step-2", changes, "twig", "Twig", "owner")]
    assert door.client.post("/api/training/branch/none").status_code == 404
    assert door.client.post("/api/training/branch/run", json={"config": {}}).status_code == 400


def test_a_checkpoint_is_pinned(door: Api) -> None:
    door.post("/api/training/checkpoints/run", {"checkpoint": "step-2"})
    found = door.post("/api/training/checkpoints/run", {"checkpoint": "step-2", "pinned": False})
    assert found["best_checkpoint"]["step"] == 2
    assert door.desk.asked == [("pin", "run", "step-2", True), ("pin", "run", "step-2", False)]
    assert door.client.post("/api/training/checkpoints/run", json={"name": "x"}).status_code == 400


def test_what_was_estimated_and_checked_is_shown(door: Api) -> None:
    found = door.get("/api/training/status/bad")
    assert found["resumed_from_job_id"] == "run"
    assert found["estimate"]["host_gb"] == 3.5
    assert found["resume_check"]["text"] == "steps 5 to 6 replayed: they differ by 0.25. Bad luck."
    assert door.get("/api/training/status/run")["resume_check"] is None


def test_what_a_state_does_not_allow_is_409(door: Api) -> None:
    answer = door.client.post("/api/training/pause/done")
    assert (answer.status_code, answer.json()["error"]) == (409, "The job is completed; it cannot be paused.")
    assert door.client.post("/api/training/retry/run").status_code == 409


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "status/none"),
        ("GET", "logs/none"),
        ("GET", "metrics/none"),
        ("GET", "checkpoints/none"),
        ("GET", "none/errors"),
        ("POST", "pause/none"),
        ("POST", "retry/none"),
        ("POST", "none/force-start"),
        ("POST", "none/save-now"),
        ("PATCH", "none/update-params"),
    ],
)
def test_an_unknown_job_is_404_with_its_id(door: Api, method: str, path: str) -> None:
    answer = door.client.request(method, f"/api/training/{path}", content=b'{"batch_size": 1}')
    assert answer.status_code == 404
    assert answer.json()["error"] == 'There is no job "none" on this agent.'


def test_retry_force_start_and_commands(door: Api) -> None:
    door.post("/api/training/retry/bad", {"checkpoint_path": "/c/x"})
    assert door.post("/api/training/wait/force-start") == {
        "success": True,
        "job_id": "wait",
        "queue_position": 1,
    }
    door.post("/api/training/run/save-now")
    door.post("/api/training/run/evaluate-now")
    assert door.desk.asked == [
        ("retry", "bad", "/c/x", "owner"),
        ("front", "wait"),
        ("command", "run", CommandKind.SAVE_NOW, "owner"),
        ("command", "run", CommandKind.EVALUATE_NOW, "owner"),
    ]


def test_logs_by_page(door: Api) -> None:
    found = door.get("/api/training/logs/run", limit=2, offset=1)
    assert found == {"logs": ["line 1", "line 2"], "total_lines": 5, "offset": 1, "limit": 2}
    assert door.get("/api/training/logs/run")["limit"] == 100
    assert door.get("/api/training/logs/run", limit=99999)["limit"] == 1000
    for query in ("limit=x", "limit=0", "offset=-1"):
        answer = door.client.get(f"/api/training/logs/run?{query}")
        assert answer.status_code == 400 and query.split("=")[0] in answer.json()["error"]


def test_metrics_after_a_step(door: Api) -> None:
    found = door.get("/api/training/metrics/run", after_step=1)
    assert [point["step"] for point in found["metrics"]] == [2, 3]
    assert found["metrics"][0]["train_loss"] is None


def test_checkpoints(door: Api) -> None:
    found = door.get("/api/training/checkpoints/run")
    assert found["checkpoints"][0]["path"] == found["best_checkpoint"]["path"] == "/c/step-2"
    assert door.get("/api/training/checkpoints/wait")["message"] == "This job has no checkpoint yet."


def test_errors_in_the_shape_of_the_page(door: Api) -> None:
    found = door.get("/api/training/bad/errors")
    assert found["error_summary"] == "Row 57 of rows.jsonl: text is null."
    assert found["errors"][0]["dedupe_key"] == "data" and found["error_count"] == 1
    frame = {"file": "/a/data.py", "line": 12, "function": "read", "code": 'row["text"]'}
    assert found["traceback"]["frames"] == [frame]
    assert (found["traceback"]["exception_type"], found["traceback"]["exception_message"]) == (
        "ValueError",
        "text is null",
    )
    assert door.get("/api/training/run/errors")["error_count"] == 0


def test_live_parameters(door: Api) -> None:
    def patch(body: bytes) -> tuple[int, dict[str, str]]:
        answer = door.client.patch("/api/training/run/update-params", content=body)
        return answer.status_code, answer.json()

    assert patch(b'{"learning_rate": 1e-5, "batch_size": 2}')[0] == 200
    assert door.desk.asked == [("parameters", "run", Parameters(learning_rate=1e-5, batch_size=2), "owner")]
    assert "allowed_params" in patch(b"{}")[1]
    for body in (
        b'{"learning_rate": "fast"}',
        b'{"batch_size": 0}',
        b'{"learning_rat": 1}',
        b'{"batch_size": 1.5}',
        b'{"early_stopping_patience": 0}',
        b'{"learning_rate": 1e300}',
    ):
        status, said = patch(body)
        assert status == 400 and said["error"]
    assert (
        "learning_rate must be above 0 and at most 100, not 101"
        in patch(b'{"learning_rate": 101}')[1]["error"]
    )
    assert len(door.desk.asked) == 1


def test_a_body_is_bounded(door: Api) -> None:
    answer = door.client.post("/api/training/pause/run", content=b" " * 70_000)
    assert answer.status_code == 413 and "65536" in answer.json()["error"]


def test_an_unknown_path_and_a_wrong_method_are_sentences(door: Api) -> None:
    answer = door.client.get("/api/training/nothing")
    assert (answer.status_code, answer.json()["error"]) == (404, "There is nothing at /api/training/nothing.")
    assert door.client.get("/api/training/pause/run").status_code == 405


def test_prometheus(door: Api) -> None:
    text = door.client.get("/metrics").text
    assert "finetunelab_agent_connected 1.0" in text
    assert 'finetunelab_agent_backlog_records{lane="metrics"} 3.0' in text
    assert 'finetunelab_agent_job_value{job_id="run",metric="train_loss"} 2.5' in text
    assert 'job_id="done"' not in text
    assert door.client.get("/metrics").text == text, "a second scrape works too"


def test_a_defect_is_500_and_the_api_lives_on(tmp_path: Path) -> None:
    with api(tmp_path, job("run")) as door:
        door.desk._jobs["run"] = None  # type: ignore[assignment]
        answer = door.client.get("/api/training/status/run")
        assert (answer.status_code, answer.json()["error"]) == (
            500,
            "A defect of the agent; its log has the details.",
        )
        assert door.get("/health")["status"] == "ok"
