"""Each setting is obeyed: the agent is started with it, and what it then does is looked at."""

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

from tests.support.programs import KEY, Agent, Hub, end, fake_config, together, wait_until


def facts(hub: Hub, config: dict[str, Any]) -> dict[str, str]:
    job = hub.submit(config)
    return dict(hub.wait_state(job, "completed")["facts"])


def test_what_the_owner_sets_reaches_the_trainer_as_its_limits(tmp_path: Path) -> None:
    with together(
        tmp_path,
        GPU_MEMORY_FRACTION="0.5",
        ENABLE_MIXED_PRECISION="false",
        CHECKPOINT_INTERVAL_STEPS="7",
        METRICS_REPORT_INTERVAL_STEPS="3",
        ALLOW_HUB="true",
        ALLOW_REMOTE_CODE="models/none",
        PASS_TO_TRAINER="HF_TOKEN",
        HF_TOKEN="hf_" + "t" * 20,
        TRAINER_THREADS="3",
        DEVICES="1",
    ) as (hub, agent):
        plain = fake_config(steps=9)
        del plain["training"]["logging_steps"]
        job = hub.submit(plain)
        seen = hub.wait_state(job, "completed")["facts"]
        assert seen["gpu_memory_fraction"] == "0.5"
        assert seen["mixed_precision"] == "False"
        assert (seen["save_steps"], seen["logging_steps"]) == ("7", "3")
        assert (seen["hub"], seen["remote_code"]) == ("True", "True")
        assert seen["OMP_NUM_THREADS"] == "3" and seen["CUDA_VISIBLE_DEVICES"] == "1"
        names = seen["environment"].split()
        assert "HF_TOKEN" in names
        assert not {"API_KEY", "AGENT_HOME", "BACKEND_URL"} & set(names)
        # The owner's intervals count where the job names none, and only there.
        assert [point["step"] for point in hub.metrics(job)] == [3, 6, 9]
        assert (agent.home / "checkpoints" / job / "step-7").is_dir()
        named = hub.submit(fake_config(steps=4, save_steps=2))
        hub.wait_state(named, "completed")
        assert [point["step"] for point in hub.metrics(named)] == [1, 2, 3, 4]
        assert (agent.home / "checkpoints" / named / "step-2").is_dir()


def test_defaults_let_nothing_through_and_code_of_no_model(tmp_path: Path) -> None:
    with together(tmp_path, HF_TOKEN="hf_" + "t" * 20) as (hub, _):
        seen = facts(hub, fake_config(steps=2))
    assert seen["remote_code"] == "False" and seen["mixed_precision"] == "True"
    assert "HF_TOKEN" not in seen["environment"].split()


def test_folders_are_where_the_owner_puts_them(tmp_path: Path) -> None:
    places = {
        name: str(tmp_path / name.lower())
        for name in ("MODELS_DIR", "CHECKPOINTS_DIR", "LOGS_DIR", "DATASETS_DIR")
    }
    with together(tmp_path, **places, ALLOW_HUB="false") as (hub, _):
        refused = hub.submit(fake_config(steps=2))
        assert "ALLOW_HUB is off" in hub.wait_state(refused, "failed")["error"]
        for place in ("models/none", "fake/data"):
            folder = Path(places["MODELS_DIR" if place.startswith("m") else "DATASETS_DIR"]) / place
            folder.mkdir(parents=True)
        job = hub.submit(fake_config("shout_every=1", steps=2))
        done = hub.wait_state(job, "completed")
    assert done["model_path"] == f"{places['MODELS_DIR']}/{job}"
    assert (tmp_path / "checkpoints_dir" / job).is_dir()
    assert (tmp_path / "logs_dir" / f"{job}.log").is_file()


def test_identity_logs_and_host_name_are_the_owners_to_give(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(KEY + "\n")
    key_file.chmod(0o600)
    hub = Hub(tmp_path / "hub").start()
    agent = Agent(
        tmp_path / "agent",
        hub.url,
        AGENT_ID="agent_of_this_test",
        API_KEY="",
        API_KEY_FILE=str(key_file),
        SHARE_LOGS="false",
        SHARE_HOSTNAME="false",
        LOG_LEVEL="WARNING",
        LOG_JSON="true",
        LOCAL_API="false",
        GPU_MONITORING_INTERVAL_SECONDS="0.2",
    ).start()
    try:
        job = hub.submit(fake_config("shout_every=1", steps=5))
        hub.wait_state(job, "completed")
        (known,) = hub.get("/api/training/agents")["agents"]
        assert known["agent_id"] == "agent_of_this_test" and not known["hostname"]
        wait_until(
            lambda: "cpu_percent" in str(hub.get("/api/training/agents")), "figures at a short interval"
        )
        time.sleep(1.5)  # longer than the log is looked at, so that its absence means something
        assert hub.logs(job) == []
        assert not (agent.home / "local_api").exists()
        assert "INFO" not in agent.output
    finally:
        agent.stop()
        hub.stop()


def test_the_log_is_one_json_object_a_line_where_the_owner_wants_that(tmp_path: Path) -> None:
    with together(tmp_path, LOG_JSON="true") as (hub, agent):
        hub.wait_state(hub.submit(fake_config(steps=2)), "completed")
        assert agent.stop() == 0
    said = [json.loads(line) for line in (agent.home / "agent.log").read_text().splitlines()]
    assert any("connected to" in line["message"] for line in said)


def test_heartbeats_go_at_the_interval_that_is_set(tmp_path: Path) -> None:
    with together(tmp_path, HEARTBEAT_INTERVAL_SECONDS="0.3", GPU_MONITORING_INTERVAL_SECONDS="60") as (
        hub,
        agent,
    ):
        wait_until(lambda: "connected to" in agent.output, "the connection")
        assert hub.process is not None
        hub.process.send_signal(signal.SIGSTOP)
        try:
            # A backend that is stopped keeps its socket open: only silence tells, after 2.5 intervals.
            wait_until(
                lambda: re.search(r"nothing was heard for 0\.75 s", agent.output), "the silence", within=20
            )
        finally:
            hub.process.send_signal(signal.SIGCONT)
        wait_until(lambda: agent.output.count("connected to") >= 2, "the next connection")


def test_the_local_api_is_open_only_where_the_owner_says_so(tmp_path: Path) -> None:
    import httpx

    for opened, status in (("false", 401), ("true", 200)):
        home = tmp_path / opened
        agent = Agent(home, "none", LOCAL_API_OPEN=opened, HOST="127.0.0.1").start()
        try:
            with agent.api() as api:
                address = str(api.base_url)
            assert httpx.get(f"{address}/health").status_code == 200
            assert httpx.get(f"{address}/api/training/jobs").status_code == status
        finally:
            agent.stop()


def test_a_refused_key_waits_where_restarts_would_hammer(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub").start()
    agent = Agent(tmp_path / "agent", hub.url, API_KEY="wak_" + "x" * 32, BAD_KEY_SLEEP="2").start()
    try:
        wait_until(lambda: "refused the API key" in agent.output, "the refusal")
        assert agent.process is not None and agent.process.poll() is None
        assert agent.process.wait(timeout=60) == 4
        assert "sleeping 2 s" in agent.output
    finally:
        end(agent.process) if agent.process else None
        hub.stop()


def test_a_stop_waits_for_trainers_no_longer_than_its_grace(tmp_path: Path) -> None:
    with together(tmp_path, STOP_GRACE_SECONDS="1") as (hub, agent):
        job = hub.submit(fake_config("step=0.02 deaf=1", steps=2000))
        hub.wait_step(job, 3)
        assert agent.stop() == 0
        assert "did not save within 1 s" in agent.output
        assert hub.status(job)["state"] in ("paused", "pausing")


def test_records_beyond_the_quota_thin_out_and_states_all_arrive(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub").start()
    agent = Agent(tmp_path / "agent", hub.url, OUTBOX_MAX_MB="1", SHARE_LOGS="false").start()
    try:
        job = hub.submit(fake_config(steps=40_000))
        hub.wait_step(job, 10)
        hub.stop(signal.SIGKILL)
        with agent.api() as api:
            wait_until(
                lambda: api.get(f"/api/training/status/{job}").json()["status"] == "completed",
                "the job's end",
                within=110,
            )
            figures = api.get("/metrics").text
        journal = sum(path.stat().st_size for path in agent.home.glob("journal.sqlite*"))
        hub.start()
        done = hub.wait_state(job, "completed")
        assert done["current_step"] == 40_000
        assert "OUTBOX_MAX_MB" in str(hub.status(job)["notes"])
        (kept,) = re.findall(r'backlog_records\{lane="metrics"\} ([0-9.]+)', figures)
        assert 10 < float(kept) < 30_000
        assert journal < 64 << 20
    finally:
        agent.stop()
        hub.stop()


def test_a_warm_trainer_stands_by_only_when_asked_for(tmp_path: Path) -> None:
    with together(tmp_path, WARM_TRAINER="true") as (hub, agent):
        wait_until(lambda: list(agent.home.glob("warm-*.log")), "a trainer that stands by")
        job = hub.submit(fake_config("shout_every=1", steps=3))
        hub.wait_state(job, "completed")
        wait_until(lambda: len(hub.logs(job)) >= 3, "its log under the job's name")
