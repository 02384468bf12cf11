"""What a job's own token may do, and that nothing is stored twice."""

import hashlib
import sqlite3

import httpx
import msgspec
import pytest

from protocol.codec import encode_record
from protocol.records import JobStatus, LogChunk, Notice, Point, Schema
from protocol.rest import METRIC_NAMES
from tests.hub.support import HubProcess, bearer, job_path, submit

METRICS = "/api/training/local/metrics"
AGENT = {"X-Agent-ID": "agent_rest0001"}


def claimed(client: httpx.Client) -> tuple[str, dict[str, str]]:
    """Return a job that a polling agent holds, and its token's header."""
    job_id, token = submit(client)
    assert client.post(f"/api/training/agent/claim/{job_id}", headers=AGENT).status_code == 200
    return job_id, bearer(token)


def curve(client: httpx.Client, job_id: str) -> list[dict[str, object]]:
    return client.get(job_path(job_id, "metrics")).json()["metrics"]  # type: ignore[no-any-return]


def test_a_token_opens_its_own_job_alone(client: httpx.Client) -> None:
    mine, other = claimed(client), claimed(client)
    point = {"step": 1, "epoch": 0}
    calls: list[tuple[str, str, dict[str, object]]] = [
        ("PUT", "metrics", point),
        ("PATCH", "status", {"status": "running"}),
        ("POST", "logs", {"logs": ["a"]}),
    ]
    for method, tail, body in calls:
        path = job_path(other[0], tail)
        wrong = client.request(method, path, json=body, headers=mine[1])
        assert (wrong.status_code, wrong.json()["error"]) == (401, "Unauthorized: Invalid token")
        assert client.request(method, path, json=body).status_code == 401
        none = client.request(method, path, json=body, headers={"Authorization": ""})
        assert (none.status_code, none.json()["error"]) == (401, "Unauthorized: Bearer token required")
        gone = client.request(method, job_path("none", tail), json=body, headers=mine[1])
        assert (gone.status_code, gone.json()["error"]) == (404, "Job not found")
    assert client.get(job_path(other[0], "dataset"), headers=mine[1]).status_code == 401
    assert client.get(job_path(mine[0], "status"), headers=mine[1]).status_code == 401
    assert curve(client, other[0]) == []


def test_a_point_that_comes_twice_is_stored_once_and_step_0_counts(
    hub: HubProcess, client: httpx.Client
) -> None:
    job_id, token = claimed(client)
    path = job_path(job_id, "metrics")
    first = {"step": 0, "epoch": 0, "train_loss": 3.0, "loss_trend": "improving", "nonsense": 1}
    for _ in range(3):
        answer = client.put(path, json=first, headers=token)
        assert answer.status_code == 200
        assert answer.json()["success"] is True
    client.put(path, json={"step": 0, "epoch": 0, "eval_loss": 2.5}, headers=token)
    batch = [
        {"step": 5, "epoch": 1, "train_loss": 1.0, "timestamp": "2026-01-02T03:04:05Z"},
        {"step": 2, "epoch": 0.5, "train_loss": 2.0},
    ]
    for _ in range(2):
        answer = client.post(METRICS, json={"job_id": job_id, "metrics": batch}, headers=token)
        assert (answer.status_code, answer.json()["count"]) == (200, 2)
    db = sqlite3.connect(hub.data_dir / "hub.sqlite3")
    rows = db.execute("SELECT count(*) FROM points WHERE job=(SELECT seq FROM jobs WHERE id=?)", (job_id,))
    assert rows.fetchone() == (4,)
    db.close()
    points = curve(client, job_id)
    assert [(point["step"], point["train_loss"], point["eval_loss"]) for point in points] == [
        (0, 3.0, 2.5),
        (2, 2.0, None),
        (5, 1.0, None),
    ]
    assert points[2]["timestamp"] == "2026-01-02T03:04:05.000Z"
    assert set(METRIC_NAMES) < set(points[0])
    status = client.get(job_path(job_id, "status")).json()
    assert (status["status"], status["current_step"], status["loss"], status["eval_loss"]) == (
        "running",
        5,
        1.0,
        2.5,
    )
    page = client.get(METRICS, params={"job_id": job_id, "limit": 1, "offset": 1}).json()
    assert ([point["step"] for point in page["metrics"]], page["total"]) == ([2], 3)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"metrics": [{"step": 1}]}, "job_id is required"),
        ({"job_id": "JOB", "metrics": []}, "metrics array is required"),
        ({"job_id": "JOB", "metrics": [{"step": 1}, {"step": "x"}]}, "metrics[1].step"),
        ({"job_id": "JOB", "metrics": [{"step": 1, "train_loss": "low"}]}, "metrics[0].train_loss"),
        ({"job_id": "JOB", "metrics": [{"step": 2**70}]}, "metrics[0].step"),
    ],
)
def test_a_bad_batch_is_refused_as_a_whole(client: httpx.Client, body: dict[str, object], words: str) -> None:
    job_id, token = claimed(client)
    body = {key: job_id if value == "JOB" else value for key, value in body.items()}
    answer = client.post(METRICS, json=body, headers=token)
    assert answer.status_code == 400
    assert words in answer.json()["error"]
    assert curve(client, job_id) == []


def test_numbered_appends_are_applied_once_and_say_how_far(client: httpx.Client) -> None:
    job_id, token = claimed(client)

    def send(lo: int, hi: int) -> httpx.Response:
        points = [{"step": step, "epoch": 0, "train_loss": float(step)} for step in range(lo, hi + 1)]
        headers = token | {"X-Stream": "77/1", "X-Range": f"{lo}-{hi}"}
        return client.post(METRICS, json={"job_id": job_id, "metrics": points}, headers=headers)

    first = send(1, 3).json()
    assert first["ack"] == 3
    assert (first["want"], first["desired_version"]) == ("run", 1)
    assert send(1, 3).json()["ack"] == 3
    assert send(2, 5).json()["ack"] == 5
    gap = send(8, 9)
    assert (gap.status_code, gap.json()["ack"]) == (409, 5)
    assert [point["step"] for point in curve(client, job_id)] == [1, 2, 3, 4, 5]
    logs = token | {"X-Stream": "77/2", "X-Range": "1-1"}
    for _ in range(2):
        answer = client.post(job_path(job_id, "logs"), json={"logs": ["a", "b"]}, headers=logs)
        assert (answer.status_code, answer.json()["ack"]) == (200, 1)
    assert client.get(job_path(job_id, "logs")).json()["total_lines"] == 2
    bad = client.post(job_path(job_id, "logs"), json={"logs": ["a"]}, headers=token | {"X-Stream": "77/2"})
    assert bad.status_code == 400


def test_records_as_on_the_socket_can_come_by_rest(client: httpx.Client) -> None:
    job_id, token = claimed(client)
    kind = token | {"Content-Type": "application/msgpack"}

    def send(method: str, tail: str, lane: int, *records: object) -> httpx.Response:
        body = msgspec.msgpack.encode([msgspec.Raw(encode_record(record)) for record in records])  # type: ignore[arg-type]
        headers = kind | {"X-Stream": f"5/{lane}", "X-Range": f"1-{len(records)}"}
        return client.request(method, job_path(job_id, tail), content=body, headers=headers)

    for _ in range(2):
        states = send("PATCH", "status", 0, JobStatus(1.0, 1, "running"), Schema(1, ["train_loss"]))
        assert (states.status_code, states.json()["ack"]) == (200, 2)
        points = send("PUT", "metrics", 1, Point(1.0, 1, 1, 0.1, 1, [0.5]), Point(1.0, 1, 2, 0.1, 1, [0.25]))
        assert points.json()["ack"] == 2
        assert send("POST", "logs", 2, LogChunk(1.0, 1, 0, ["x", "y"])).json()["ack"] == 1
    assert [point["train_loss"] for point in curve(client, job_id)] == [0.5, 0.25]
    assert client.get(job_path(job_id, "logs")).json()["logs"] == ["x", "y"]
    assert client.get(job_path(job_id, "status")).json()["state"] == "running"
    point = msgspec.msgpack.encode([msgspec.Raw(encode_record(Point(1.0, 1, 9, 0.1, 1, [0.5])))])
    path = job_path(job_id, "metrics")
    gap = client.put(path, content=point, headers=kind | {"X-Stream": "5/1", "X-Range": "9-9"})
    assert (gap.status_code, gap.json()["ack"]) == (409, 2)
    miscounted = client.put(path, content=point, headers=kind | {"X-Stream": "5/1", "X-Range": "3-4"})
    assert miscounted.status_code == 400
    assert client.put(path, content=b"\xc1", headers=kind).status_code == 400


@pytest.mark.parametrize(
    ("status", "following"),
    [
        ("pending", {"running", "paused", "failed", "cancelled"}),
        ("running", {"completed", "failed", "cancelled", "paused"}),
        ("paused", {"running", "failed", "cancelled"}),
        ("completed", set()),
        ("failed", set()),
        ("cancelled", set()),
    ],
)
def test_each_status_has_those_that_can_follow(
    status: str, following: set[str], client: httpx.Client
) -> None:
    taken = set()
    for wanted in {"running", "completed", "failed", "cancelled", "paused"} - {status}:
        job_id, token = submit(client)
        for one in {"pending": [], "completed": ["running", "completed"]}.get(status, [status]):
            path = job_path(job_id, "status")
            assert client.patch(path, json={"status": one}, headers=bearer(token)).status_code == 200
        answer = client.patch(job_path(job_id, "status"), json={"status": wanted}, headers=bearer(token))
        assert answer.status_code in (200, 409)
        if answer.status_code == 200:
            taken.add(wanted)
    assert taken == following


def test_only_legal_transitions_are_taken(client: httpx.Client) -> None:
    job_id, token = submit(client)

    def patch(status: str, **more: str) -> httpx.Response:
        return client.patch(
            job_path(job_id, "status"), json={"status": status, **more}, headers=bearer(token)
        )

    early = patch("completed")
    assert early.status_code == 409
    assert early.json()["error"] == "The job is pending; it cannot become completed from there."
    for status in ("running", "running", "paused", "running"):
        assert patch(status).json()["status"] == status
    assert patch("sleeping").status_code == 400
    assert patch("failed", error="row 57: text is null").status_code == 200
    assert patch("failed").status_code == 200
    late = patch("running")
    assert late.status_code == 409
    assert "that is its end" in late.json()["error"]
    status = client.get(job_path(job_id, "status")).json()
    assert (status["status"], status["error"]) == ("failed", "row 57: text is null")
    assert status["started_at"] is not None
    assert status["completed_at"] is not None


def test_logs_are_paged_and_counted_from_the_end(client: httpx.Client) -> None:
    job_id, token = claimed(client)
    path = job_path(job_id, "logs")
    for start in (0, 4, 8):
        answer = client.post(
            path, json={"logs": [f"line {n}" for n in range(start, start + 4)]}, headers=token
        )
        assert (answer.json()["logs_appended"], answer.json()["total_logs"]) == (4, start + 4)
    assert client.post(path, json={"logs": []}, headers=token).json()["message"] == "No logs to append"
    assert client.post(path, json={"logs": "x"}, headers=token).status_code == 400
    assert client.post(path, json={"logs": [1]}, headers=token).status_code == 400

    def read(**params: int) -> object:
        return client.get(path, params=params).json()["logs"]

    assert read(limit=3, offset=3) == ["line 3", "line 4", "line 5"]
    assert read(limit=5, offset=-2) == ["line 10", "line 11"]
    assert read(limit=5, offset=50) == []
    assert client.get(path, params={"limit": "many"}).status_code == 400


def test_poll_and_claim_are_safe_to_repeat(client: httpx.Client) -> None:
    for row in client.get("/api/training/local/jobs", params={"limit": 100, "status": "pending"}).json()[
        "jobs"
    ]:
        client.post(job_path(row["id"], "control"), json={"action": "cancel"})
    assert client.get("/api/training/agent/poll").status_code == 400
    assert client.get("/api/training/agent/poll", headers={"X-Agent-ID": "me"}).status_code == 400
    headers = AGENT | {"X-Agent-Hostname": "pollbox", "X-Agent-Platform": "linux"}
    none = client.get("/api/training/agent/poll", headers=headers).json()
    assert none.pop("records") == "finetunelab.agent.v1.msgpack" and none.pop("commands") == []
    assert none == {"job": None, "poll_interval_seconds": 10, "message": "No pending jobs available"}
    job_id, token = submit(client)
    offered = client.get("/api/training/agent/poll", headers=headers).json()["job"]
    assert (offered["id"], offered["config"]["model"]["name"]) == (job_id, "tiny")
    path = f"/api/training/agent/claim/{job_id}"
    for _ in range(2):
        answer = client.post(path, headers=headers)
        assert (answer.status_code, answer.json()["job_token"]) == (200, token)
    taken = client.post(path, headers={"X-Agent-ID": "agent_other1"})
    assert (taken.status_code, taken.json()["code"]) == (409, "ALREADY_CLAIMED")
    assert client.post("/api/training/agent/claim/none", headers=headers).json()["code"] == "JOB_NOT_FOUND"
    agent = client.get("/api/training/agents/agent_rest0001").json()["agent"]
    assert (agent["hostname"], agent["is_online"], agent["presence"]) == ("pollbox", True, "polling")
    rows = client.get("/api/training/agents").json()
    assert rows["online_threshold_seconds"] == 60
    assert client.delete("/api/training/agents/agent_rest0001").json()["success"] is True
    assert client.get("/api/training/agents/agent_rest0001").status_code == 404


def test_an_uploaded_data_set_reaches_the_agent_in_ranges(hub: HubProcess, client: httpx.Client) -> None:
    content = b'{"text": "a row"}\n' * 5000
    sha256 = hashlib.sha256(content).hexdigest()
    form = client.post("/api/training/dataset", files={"file": ("../../evil name.jsonl", content)})
    raw = client.post("/api/training/dataset", content=content, params={"name": "raw.jsonl"})
    for answer, name in ((form, "evil_name.jsonl"), (raw, "raw.jsonl")):
        assert answer.status_code == 201, answer.text
        said = answer.json()
        assert (said["sha256"], said["size"], said["name"]) == (sha256, len(content), name)
    assert httpx.post(f"{hub.url}/api/training/dataset", content=b"x", trust_env=False).status_code == 401
    assert client.post("/api/training/dataset", content=b"").status_code == 400
    assert client.post("/api/training/dataset", files={"wrong": ("a", b"x")}).status_code == 400
    job_id, token = submit(client, dataset_path=form.json()["storage_path"])
    path = job_path(job_id, "dataset")
    assert client.get(path).status_code == 401
    whole = client.get(path, headers=bearer(token))
    assert whole.content == content
    assert whole.headers["x-content-sha256"] == sha256
    etag = whole.headers["etag"]

    def part(span: str, **headers: str) -> httpx.Response:
        return client.get(path, headers=bearer(token) | {"Range": span} | headers)

    tail = part("bytes=100-", **{"If-Range": etag})
    assert (tail.status_code, tail.content) == (206, content[100:])
    assert tail.headers["content-range"] == f"bytes 100-{len(content) - 1}/{len(content)}"
    assert part("bytes=10-19").content == content[10:20]
    assert part("bytes=0-9", **{"If-Range": '"another file"'}).content == content
    assert part(f"bytes={len(content)}-").status_code == 416
    plain, other = submit(client)
    assert client.get(job_path(plain, "dataset"), headers=bearer(other)).status_code == 404


def test_an_agents_own_records_need_its_id_and_their_numbers(client: httpx.Client) -> None:
    body = msgspec.msgpack.encode([msgspec.Raw(encode_record(Notice(1.0, "info", "here")))])
    numbered = {"X-Stream": "9/0", "X-Range": "1-1"}
    path = "/api/training/agent/records"
    for headers, said in (
        (numbered, "Missing X-Agent-ID header"),
        (numbered | {"X-Agent-ID": "somebody"}, "Invalid X-Agent-ID format. Expected: agent_xxxxx"),
        (AGENT, "X-Stream and X-Range must number exactly the records sent."),
        (AGENT | numbered | {"X-Range": "1-2"}, "X-Stream and X-Range must number exactly the records sent."),
    ):
        answer = client.post(path, content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (400, said)
    assert client.post(path, content=b"\xc1", headers=AGENT | numbered).status_code == 400
    assert client.post(path, content=body, headers=AGENT | numbered).json() == {"success": True, "ack": 1}
