"""A job's life, from the backend's side: hub, agent and fake trainer as real processes over a real socket."""

import signal
from pathlib import Path

from tests.support.programs import Agent, Hub, fake_config, together, wait_until

Pair = tuple[Hub, Agent]


def steps_of(hub: Hub, job_id: str) -> list[int]:
    return [point["step"] for point in hub.metrics(job_id)]


def test_a_job_runs_and_every_step_arrives_once_and_in_order(pair: Pair) -> None:
    hub, _ = pair
    job = hub.submit(fake_config("step=0.005", steps=60))
    done = hub.wait_state(job, "completed")
    assert steps_of(hub, job) == list(range(1, 61))
    assert done["status"] == "completed" and done["progress"] == 100 and done["attempt"] == 1
    assert done["total_steps"] == 60 and done["weights_hash"] and Path(done["model_path"]).is_dir()


def test_pause_frees_the_trainer_and_resume_goes_on_to_the_same_result(pair: Pair) -> None:
    hub, agent = pair
    untouched = hub.submit(fake_config("step=0.002", steps=40))
    expected = hub.wait_state(untouched, "completed")["weights_hash"]
    job = hub.submit(fake_config("step=0.02", steps=40))
    hub.wait_step(job, 5)
    hub.control(job, "pause")
    paused = hub.wait_state(job, "paused")
    assert paused["status"] == "paused" and paused["by"] == "user"
    with agent.api() as api:
        assert api.get("/health").json()["active_jobs"] == 0
    hub.control(job, "resume")
    done = hub.wait_state(job, "completed")
    assert done["attempt"] == 2
    assert steps_of(hub, job) == list(range(1, 41))
    assert done["weights_hash"] == expected


def test_pause_and_resume_in_one_breath_ends_in_running(pair: Pair) -> None:
    hub, _ = pair
    job = hub.submit(fake_config("step=0.02 save=0.3", steps=60))
    hub.wait_step(job, 3)
    hub.control(job, "pause")
    hub.control(job, "resume")
    hub.wait_state(job, "completed")
    assert steps_of(hub, job) == list(range(1, 61))


def test_cancel_ends_a_running_a_waiting_and_a_paused_job(pair: Pair) -> None:
    hub, _ = pair
    running = hub.submit(fake_config("step=0.02", steps=5000))
    hub.wait_step(running, 2)
    waiting = hub.submit(fake_config("step=0.02", steps=50))
    hub.wait_state(waiting, "queued")
    hub.control(waiting, "cancel")
    hub.wait_state(waiting, "cancelled")
    hub.control(running, "cancel")
    assert hub.wait_state(running, "cancelled")["current_step"] < 5000
    paused = hub.submit(fake_config("step=0.02", steps=5000))
    hub.wait_step(paused, 2)
    hub.control(paused, "pause")
    hub.wait_state(paused, "paused")
    hub.control(paused, "cancel")
    hub.wait_state(paused, "cancelled")


def test_a_trainer_that_ignores_cancel_is_gone_with_its_children(pair: Pair) -> None:
    hub, _ = pair
    job = hub.submit(fake_config("step=0.02 deaf=1 grandchild=1", steps=5000))
    hub.wait_step(job, 2)
    hub.control(job, "cancel")
    hub.wait_state(job, "cancelled")


def test_stop_ends_early_and_keeps_a_model(pair: Pair) -> None:
    hub, _ = pair
    job = hub.submit(fake_config("step=0.02", steps=5000))
    hub.wait_step(job, 3)
    hub.control(job, "stop")
    done = hub.wait_state(job, "completed")
    assert done["current_step"] < 5000 and Path(done["model_path"]).is_dir()


def test_a_lost_trainer_goes_on_from_its_last_checkpoint(pair: Pair) -> None:
    hub, _ = pair
    job = hub.submit(fake_config("step=0.01 kill_at=13 until_attempt=1", steps=30, save_steps=5))
    done = hub.wait_state(job, "completed")
    assert done["attempt"] == 2
    points = {point["step"]: point["attempt"] for point in hub.metrics(job)}
    assert sorted(points) == list(range(1, 31))
    # A rewind makes a new attempt, and for each step the newest one counts.
    assert points[10] == 1 and points[12] == 2


def test_a_job_that_dies_three_times_fails_with_a_sentence_and_can_be_retried(pair: Pair) -> None:
    hub, _ = pair
    job = hub.submit(fake_config("step=0.001 kill_at=4 until_attempt=3", steps=10))
    failed = hub.wait_state(job, "failed")
    assert "lost 3 times" in failed["error"] and "SIGKILL" in failed["error"]
    hub.control(job, "retry")
    wait_until(lambda: hub.status(job)["state"] == "completed", "the retried job's end")
    assert hub.status(job)["attempt"] == 4


def test_live_parameters_reach_the_trainer(pair: Pair) -> None:
    hub, _ = pair
    job = hub.submit(fake_config("step=0.02", steps=100))
    hub.wait_step(job, 3)
    answer = hub.http.patch(
        f"{hub.url}/api/training/local/{job}/update-params", json={"learning_rate": 0.001}
    )
    assert answer.status_code == 200, answer.text
    wait_until(lambda: hub.status(job)["learning_rate"] == 0.001, "the new learning rate")
    hub.control(job, "cancel")
    hub.wait_state(job, "cancelled")


def test_what_a_job_prints_can_be_read_at_the_hub(pair: Pair) -> None:
    hub, agent = pair
    job = hub.submit(fake_config("step=0.002 shout_every=1", steps=20))
    hub.wait_state(job, "completed")
    lines = wait_until(lambda: (found := hub.logs(job)) and len(found) >= 20 and found, "20 lines of log")
    with agent.api() as api:
        page = api.get(f"/api/training/logs/{job}?limit=100&offset=0").json()
    assert page["logs"] == lines and page["total_lines"] == len(lines)


def test_the_machine_and_its_figures_are_shown(pair: Pair) -> None:
    hub, _ = pair

    def figures() -> bool:
        (agent,) = hub.get("/api/training/agents")["agents"]
        return bool(agent["is_online"] and "cpu_percent" in str(agent))

    wait_until(figures, "figures of the machine")


def test_two_jobs_at_once_where_the_owner_allows_it(folder: Path) -> None:
    with together(folder, MAX_CONCURRENT_JOBS="2") as (hub, _):
        jobs = [hub.submit(fake_config("step=0.02", steps=400)) for _ in range(3)]
        for job in jobs[:2]:
            hub.wait_step(job, 2)
        assert hub.wait_state(jobs[2], "queued")["current_step"] in (0, None)
        hub.control(jobs[0], "cancel")
        hub.wait_step(jobs[2], 2)


def test_a_stopped_agent_saves_tells_and_leaves_with_0_and_goes_on_when_started(folder: Path) -> None:
    with together(folder) as (hub, agent):
        job = hub.submit(fake_config("step=0.02", steps=60))
        hub.wait_step(job, 5)
        assert agent.stop(signal.SIGTERM) == 0
        stands = hub.wait_state(job, "paused")
        assert stands["by"] == "agent" and "stopped" in stands["detail"]
        agent.start()
        done = hub.wait_state(job, "completed")
        assert done["attempt"] == 2
        assert steps_of(hub, job) == list(range(1, 61))


def test_a_second_signal_does_not_wait_for_the_save(folder: Path) -> None:
    with together(folder) as (hub, agent):
        job = hub.submit(fake_config("step=0.02 deaf=1", steps=600))
        hub.wait_step(job, 5)
        assert agent.process is not None
        agent.process.send_signal(signal.SIGINT)
        hub.wait_state(job, "pausing")
        assert agent.stop(signal.SIGINT) == 130


def test_a_killed_agent_costs_no_step(folder: Path) -> None:
    with together(folder) as (hub, agent):
        job = hub.submit(fake_config("step=0.02", steps=120))
        hub.wait_step(job, 10)
        agent.stop(signal.SIGKILL)
        agent.start()
        done = hub.wait_state(job, "completed")
        assert done["attempt"] == 2
        assert steps_of(hub, job) == list(range(1, 121))


def test_a_killed_hub_loses_nothing_and_training_does_not_notice(folder: Path) -> None:
    with together(folder) as (hub, _):
        job = hub.submit(fake_config("step=0.02", steps=150))
        hub.wait_step(job, 10)
        hub.stop(signal.SIGKILL)
        hub.start()
        done = hub.wait_state(job, "completed")
        assert done["attempt"] == 1
        assert steps_of(hub, job) == list(range(1, 151))


def test_the_owner_pauses_locally_and_the_backend_cannot_lift_it(folder: Path) -> None:
    with together(folder) as (hub, agent):
        job = hub.submit(fake_config("step=0.02", steps=100))
        hub.wait_step(job, 3)
        with agent.api() as api:
            assert api.post(f"/api/training/pause/{job}").status_code == 200
            assert hub.wait_state(job, "paused")["by"] == "owner"
            hub.control(job, "resume")
            wait_until(lambda: "owner" in str(hub.status(job)["notes"]), "the owner's word at the hub")
            assert hub.status(job)["state"] == "paused"
            assert api.post(f"/api/training/resume/{job}").status_code == 200
        hub.wait_state(job, "completed")


def test_an_uploaded_data_set_reaches_the_agent(folder: Path) -> None:
    with together(folder) as (hub, agent):
        answer = hub.http.post(
            f"{hub.url}/api/training/dataset?name=rows.jsonl", content=b'{"text": "one"}\n' * 1000
        )
        assert answer.status_code in (200, 201), answer.text
        upload = answer.json()
        job = hub.submit(fake_config("step=0.002", steps=5), upload["storage_path"])
        hub.wait_state(job, "completed")
        (fetched,) = (agent.home / "datasets" / ".fetched").iterdir()
        assert fetched.stem == upload["sha256"]
