"""Our own hub behind a proxy that breaks upgrades: everything arrives by REST, and the socket takes over again."""

import re
import signal
import sqlite3
from pathlib import Path

import pytest

from protocol.messages import Lane
from tests.support.programs import Agent, Hub, fake_config, wait_until
from tests.support.recording import RecordingHub
from tests.support.upgrades import ProxyThread


def presence(hub: Hub) -> str:
    agents = hub.get("/api/training/agents")["agents"]
    return str(agents[0]["presence"]) if agents else ""


def steps(hub: Hub, job: str) -> list[int]:
    return [point["step"] for point in hub.metrics(job)]


@pytest.mark.parametrize("manner", ["refuse", pytest.param("abort", marks=pytest.mark.slow)])
def test_a_job_runs_and_is_steered_where_no_socket_can_be_had(tmp_path: Path, manner: str) -> None:
    hub = RecordingHub(tmp_path / "hub").start()
    try:
        with ProxyThread(hub.port, manner) as proxy:
            agent = Agent(tmp_path / "agent", proxy.url, POLL_INTERVAL_SECONDS="2").start()
            try:
                job = hub.submit(fake_config("step=0.04 shout_every=1", steps=150))
                hub.wait_step(job, 20)
                assert presence(hub) == "polling" and proxy.net.refused
                hub.control(job, "pause")
                hub.wait_state(job, "paused")
                hub.control(job, "resume")
                hub.wait_state(job, "completed")
                wait_until(lambda: len(steps(hub, job)) == 150, "the whole curve")
                wait_until(lambda: hub.logs(job)[-1:] == ["step 150 of 150"], "the whole log")
                assert agent.stop() == 0
                assert steps(hub, job) == list(range(1, 151)) and hub.took(Lane.METRICS)[job] == 150
                own = (agent.home / "logs" / f"{job}.log").read_text().splitlines()
                assert hub.logs(job) == own
            finally:
                agent.stop(signal.SIGKILL)
    finally:
        hub.stop()


def test_a_quiet_job_is_retried_and_says_its_last_words_where_agents_poll(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub").start()
    # It prints at its very end alone, when all else may have arrived.
    job = hub.submit(fake_config("fail_at=5 until_attempt=1 shout_every=20", steps=20, save_steps=3))
    settings = {"BACKEND_TRANSPORT": "poll", "GPU_MONITORING_INTERVAL_SECONDS": "1"}
    agent = Agent(tmp_path / "agent", f"http://127.0.0.1:{hub.port}", **settings).start()
    try:
        assert hub.wait_state(job, "failed")["attempt"] == 1
        # Away while it is asked for, which also spares the test a wait for the next poll.
        assert agent.stop() == 0
        hub.control(job, "retry")
        agent.start()
        assert hub.wait_state(job, "completed")["attempt"] == 2
        wait_until(lambda: hub.logs(job) == ["step 20 of 20"], "the last words")
        assert steps(hub, job) == list(range(1, 21))
        wait_until(lambda: hub.get("/api/training/agents")["agents"][0]["figures"], "the machine's figures")
        assert agent.stop() == 0
        with sqlite3.connect(f"file:{agent.home / 'journal.sqlite'}?mode=ro", uri=True) as db:
            left = db.execute("SELECT (SELECT count(*) FROM records), (SELECT count(*) FROM secrets)")
            assert left.fetchone() == (0, 0)
    finally:
        agent.stop(signal.SIGKILL)
        hub.stop()


def test_each_record_goes_one_way_while_the_ways_change(tmp_path: Path) -> None:
    hub = RecordingHub(tmp_path / "hub").start()
    try:
        with ProxyThread(hub.port) as proxy:
            agent = Agent(tmp_path / "agent", proxy.url).start()
            try:
                job = hub.submit(fake_config("step=0.05 shout_every=1", steps=250))
                wait_until(lambda: presence(hub) == "connected", "the socket")
                at = hub.status(job)["current_step"] or 0
                hub.wait_step(job, at + 20)
                proxy.net.manner = "abort"
                proxy.cut()
                wait_until(lambda: presence(hub) == "polling", "the polls")
                at = hub.status(job)["current_step"] or 0
                hub.wait_step(job, at + 20)
                proxy.net.manner = "pass"
                hub.wait_state(job, "completed")
                wait_until(lambda: presence(hub) == "connected", "the socket at the end")
                wait_until(lambda: len(steps(hub, job)) == 250, "the whole curve")
                wait_until(lambda: hub.logs(job)[-1:] == ["step 250 of 250"], "the whole log")
                assert agent.stop() == 0
                assert steps(hub, job) == list(range(1, 251)) and hub.took(Lane.METRICS)[job] == 250
                own = (agent.home / "logs" / f"{job}.log").read_text().splitlines()
                assert hub.logs(job) == own
                ways = re.findall(r"connected to ws|no socket to be had", agent.output)
                assert ways[:3] == ["connected to ws", "no socket to be had", "connected to ws"]
            finally:
                agent.stop(signal.SIGKILL)
    finally:
        hub.stop()
