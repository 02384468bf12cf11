"""Bad input gets a clear sentence, loses nothing, and the agent lives on."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.server import ServerConnection, serve

from protocol.codec import Codec
from protocol.messages import SUBPROTOCOL_MSGPACK, Desired, Offer, Welcome
from tests.support.mounts import needs_mounts
from tests.support.programs import ROOT, Agent, Hub, clean_env, end, fake_config, together, wait_until
from tests.trainer.conftest import build_model, build_tokenizer, chat_rows, write_jsonl


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Agent]]:
    folder = tmp_path_factory.mktemp("bad")
    models, data = folder / "agent" / "models", folder / "agent" / "datasets"
    tokenizer = build_tokenizer()
    build_model(models / "tiny", len(tokenizer))
    build_model(models / "small", len(tokenizer) - 40)
    for name in ("tiny", "small"):
        tokenizer.save_pretrained(str(models / name))
    rows = chat_rows(80)
    write_jsonl(data / "chat.jsonl", rows)
    rows[56]["messages"][1]["content"] = None
    write_jsonl(data / "null.jsonl", rows)
    write_jsonl(data / "columns.jsonl", [{"foo": 1, "bar": 2}] * 3)
    (data / "empty.jsonl").write_text("")
    with together(folder, fake=False, WARM_TRAINER="true", ALLOW_HUB="false") as both:
        yield both


def config(model: str = "tiny", **training: Any) -> dict[str, Any]:
    shared = {"method": "sft", "max_steps": 3, "batch_size": 2, "learning_rate": 1e-3, "max_length": 64}
    return {"model": {"name": model}, "training": {**shared, **training}}


@pytest.mark.parametrize(
    ("model", "training", "data", "reason", "words"),
    [
        ("tiny", {}, "nowhere.jsonl", "data", ['no data set "nowhere.jsonl"', "DATASETS_DIR"]),
        ("tiny", {}, "../../etc/passwd", "permission", ["leads out of"]),
        ("tiny", {}, "null.jsonl", "data", ["row 57", "null"]),
        ("tiny", {}, "columns.jsonl", "data", ["foo", "bar", "messages"]),
        ("tiny", {}, "empty.jsonl", "data", ["empty.jsonl"]),
        ("missing", {}, "chat.jsonl", "model", ['no model "missing"', "MODELS_DIR"]),
        ("small", {}, "chat.jsonl", "model", ["tokenizer", "embeddings for"]),
        ("tiny", {"learning_rate": 1e30}, "chat.jsonl", "non_finite_loss", ["step", "loss"]),
    ],
    ids=["missing data", "path out", "null text", "wrong columns", "empty", "no model", "tokenizer", "nan"],
)
def test_a_job_that_cannot_run_fails_with_a_sentence(
    real: tuple[Hub, Agent], model: str, training: dict[str, Any], data: str, reason: str, words: list[str]
) -> None:
    hub, _ = real
    if reason == "non_finite_loss":
        training = {**training, "learning_rate": 100.0, "max_steps": 50, "max_grad_norm": 0.0, "optim": "sgd"}
    job = hub.submit(config(model, **training), data)
    failed = hub.wait_state(job, "failed")
    assert failed["failure"]["reason"] == reason, failed["error"]
    assert failed["failure"]["advice"]
    for word in words:
        assert word in failed["error"], failed["error"]
    assert "Traceback" not in failed["error"]


def test_the_agent_lives_on_after_all_that(real: tuple[Hub, Agent]) -> None:
    hub, _ = real
    assert hub.wait_state(hub.submit(config(), "chat.jsonl"), "completed")["current_step"] == 3


def test_an_unreadable_checkpoint_is_passed_over_with_a_note(real: tuple[Hub, Agent]) -> None:
    hub, agent = real
    job = hub.submit(config(max_steps=2000, save_steps=3), "chat.jsonl")
    hub.wait_step(job, 8)
    hub.control(job, "pause")
    hub.wait_state(job, "paused")
    folder = agent.home / "checkpoints" / job
    newest = max(folder.glob("step-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    weights = newest / "model.safetensors"
    torn = bytearray(weights.read_bytes())
    torn[len(torn) // 2] ^= 1
    weights.write_bytes(torn)
    hub.control(job, "resume")
    notes = wait_until(
        lambda: newest.name in str(hub.status(job)["notes"]) and hub.status(job)["notes"], "a note"
    )
    assert "model.safetensors" in str(notes)
    hub.wait_step(job, int(newest.name.rpartition("-")[2]) + 1)
    hub.control(job, "cancel")
    hub.wait_state(job, "cancelled")


def test_an_unknown_method_or_setting_is_refused_where_it_is_submitted(pair: tuple[Hub, Agent]) -> None:
    hub, _ = pair
    for training, words in (
        ({"method": "alchemy"}, ["training.method", "alchemy", "sft"]),
        ({"bach_size": 2}, ["training.bach_size", 'Did you mean "batch_size"']),
        ({"batch_size": 0}, ["training.batch_size", ">= 1"]),
    ):
        body = {
            "config": {"model": {"name": "m"}, "training": training},
            "dataset_path": "d",
            "status": "pending",
        }
        answer = hub.http.post(f"{hub.url}/api/training/local/jobs", json=body)
        assert answer.status_code == 400
        for word in words:
            assert word in answer.json()["error"]


# Backends that are not as they should be


def run_until_it_leaves(agent: Agent) -> tuple[int, str]:
    agent.start()
    assert agent.process is not None
    try:
        code = agent.process.wait(timeout=60)
    finally:
        end(agent.process)
    return code, agent.output


def test_a_wrong_key_ends_the_agent_with_its_own_code_and_no_hammering(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub").start()
    try:
        code, output = run_until_it_leaves(Agent(tmp_path / "agent", hub.url, API_KEY="wak_" + "x" * 32))
    finally:
        hub.stop()
    assert code == 4
    assert "refused the API key (HTTP 401" in output and "API_KEY" in output
    assert "Traceback" not in output and "x" * 32 not in output
    assert output.count("refused the API key") == 1


class _Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked = 0

    def do_GET(self) -> None:  # the library's name
        type(self).asked += 1
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_backend_that_is_not_ours_is_named(tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        code, output = run_until_it_leaves(Agent(tmp_path / "agent", url))
        server.shutdown()
        thread.join()
    assert code == 5
    assert "has no socket for training agents (HTTP 404)" in output and "BACKEND_URL" in output
    # Once for the socket, and once whether it can be polled.
    assert _Page.asked == 2


@contextmanager
def backend(script: Callable[[ServerConnection, Codec], None]) -> Iterator[str]:
    """Serve one hand-written conversation per connection."""
    codec = Codec(SUBPROTOCOL_MSGPACK)

    def talk(socket: ServerConnection) -> None:
        codec.decode_agent(socket.recv())
        script(socket, codec)

    with serve(talk, "127.0.0.1", 0, subprotocols=[SUBPROTOCOL_MSGPACK], max_size=None) as server:  # type: ignore[list-item]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


def test_a_message_of_the_future_and_a_frame_of_2_mib_hurt_nothing(tmp_path: Path) -> None:
    connections: list[int] = []
    welcomed = threading.Event()
    leave = threading.Event()

    def script(socket: ServerConnection, codec: Codec) -> None:
        connections.append(1)
        socket.send(codec.encode(Welcome("s", [])))
        socket.send(bytes([0x93, 0x7F, 0xC0, 0x01]))  # an array of three: tag 127, null, 1
        if len(connections) == 1:
            socket.send(b"\x00" * (2 << 20))
        else:
            offer = Offer(json.dumps(fake_config("step=0.001", steps=5)), "fake/data")
            socket.send(codec.encode(Desired("after-all", 1, "run", offer)))
            welcomed.set()
        while not leave.is_set():
            try:
                socket.recv(timeout=0.2)
            except TimeoutError:
                continue
            except Exception:  # noqa: BLE001  # the agent hung up, as it should
                return

    with backend(script) as url:
        agent = Agent(tmp_path / "agent", url).start()
        try:
            assert welcomed.wait(30), agent.output
            wait_until(lambda: "-> completed" in agent.output, "the job's end")
            assert "frame with 2097152 bytes exceeds limit of 262144 bytes" in agent.output
        finally:
            leave.set()
            agent.stop()


def test_no_backend_at_all_is_dialled_again_and_again_and_jobs_run_all_the_same(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agent = Agent(tmp_path / "agent", f"http://127.0.0.1:{port}").start()
    try:
        with agent.api() as api:
            body = {
                "config": fake_config("step=0.001", steps=5),
                "dataset_path": "fake/data",
                "execution_id": "own",
            }
            assert api.post("/api/training/execute", json=body).status_code == 200
            wait_until(
                lambda: api.get("/api/training/status/own").json()["status"] == "completed", "the job's end"
            )
            assert api.get("/health").json()["status"] == "ok"
        wait_until(lambda: agent.output.count("dialling again") >= 2, "two dials")
    finally:
        agent.stop()


def test_a_slip_in_a_setting_is_one_sentence_and_code_3(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MAX_CONCURENT_JOBS=2\n")
    command = [sys.executable, "-m", "agent", "start"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=clean_env(AGENT_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3
    assert "MAX_CONCURENT_JOBS" in done.stderr and "MAX_CONCURRENT_JOBS" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_pauses_the_job_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """On a file system of 48 MiB of its own, in a mount namespace, where the kernel lets us make one."""
    command = [sys.executable, "-m", "tests.support.small_disk", str(tmp_path)]
    done = subprocess.run(
        [*needs_mounts(), *command],
        cwd=ROOT,
        env=clean_env(),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["by"] == "disk" and "MB are needed" in said["detail"], said
    assert any("no room" in note["text"] for note in said["notes"]), said
    assert said["good"], said
    assert (said["attempt"], said["step"]) == (2, 150), said
