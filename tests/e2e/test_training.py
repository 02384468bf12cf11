"""Real fine-tunes of a tiny model, through hub, agent and trainer: exact however they are interrupted."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import Agent, Hub, clean_env, end, together, wait_until
from tests.trainer.conftest import build_model, build_tokenizer, chat_rows, pair_rows, write_jsonl

STEPS = 14
EXACT = (
    "train_loss",
    "eval_loss",
    "learning_rate",
    "grad_norm",
    "tokens_seen",
    "best_eval_loss",
    "best_step",
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Agent]]:
    folder = tmp_path_factory.mktemp("real")
    tokenizer = build_tokenizer()
    build_model(folder / "agent" / "models" / "tiny", len(tokenizer))
    tokenizer.save_pretrained(str(folder / "agent" / "models" / "tiny"))
    write_jsonl(folder / "agent" / "datasets" / "chat.jsonl", chat_rows(48))
    write_jsonl(folder / "agent" / "datasets" / "pairs.jsonl", pair_rows(48))
    with together(folder, fake=False, WARM_TRAINER="true") as both:
        yield both


def config(**training: Any) -> dict[str, Any]:
    lora = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}} if training.pop("lora", False) else {}
    return {
        "model": {"name": "tiny"},
        "training": {
            "method": "sft",
            "max_steps": STEPS,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_length": 64,
            "logging_steps": 1,
            "evaluation_strategy": "steps",
            "eval_steps": 5,
            "save_steps": 4,
            "packing": True,
            **training,
        },
        "data": {"eval_split": 0.2},
        **lora,
    }


def curve(hub: Hub, job: str) -> list[tuple[Any, ...]]:
    return [(point["step"], *(point[name] for name in EXACT)) for point in hub.metrics(job)]


def interrupted(hub: Hub, agent: Agent, job: str, how: str) -> None:
    hub.wait_step(job, 3)
    if how == "pause":
        hub.control(job, "pause")
        assert 3 <= hub.wait_state(job, "paused")["current_step"] < STEPS
        hub.control(job, "resume")
    else:
        agent.stop(signal.SIGKILL)
        agent.start()


@pytest.mark.parametrize(
    ("training", "how"),
    [
        ({}, "kill the agent"),
        ({"lora": True}, "pause"),
        ({"lora": True, "quantization": {"load_in_4bit": True}}, "pause"),
        ({"lora": True, "method": "dpo", "packing": False}, "pause"),
    ],
    ids=["full, agent killed", "lora, paused", "qlora 4 bit, paused", "dpo, paused"],
)
def test_an_interrupted_run_equals_one_never_touched(
    real: tuple[Hub, Agent], training: dict[str, Any], how: str
) -> None:
    hub, agent = real
    rows = "pairs.jsonl" if training.get("method") == "dpo" else "chat.jsonl"
    untouched = hub.submit(config(**training), rows)
    expected = hub.wait_state(untouched, "completed")
    job = hub.submit(config(**training), rows)
    interrupted(hub, agent, job, how)
    done = hub.wait_state(job, "completed")
    assert done["attempt"] == 2
    assert curve(hub, job) == curve(hub, untouched)
    if rows == "pairs.jsonl":
        margins = [
            [point["rewards_margin"] for point in hub.metrics(one) if point["step"]]
            for one in (untouched, job)
        ]
        assert margins[0] == margins[1] and margins[0][-1] > 0
    assert done["weights_hash"] == expected["weights_hash"]
    model = Path(done["model_path"])
    weights = "adapter_model.safetensors" if "lora" in training else "model.safetensors"
    assert (model / weights).is_file() and (model / "tokenizer.json").is_file()
    assert not list(model.rglob("*.bin"))


def test_the_points_carry_every_name_the_charts_use(real: tuple[Hub, Agent]) -> None:
    hub, _ = real
    job = hub.submit(config(max_steps=6), "chat.jsonl")
    done = hub.wait_state(job, "completed")
    points = {point["step"]: point for point in hub.metrics(job)}
    assert sorted(points) == [0, 1, 2, 3, 4, 5, 6]
    for name in (
        "train_loss",
        "train_perplexity",
        "learning_rate",
        "grad_norm",
        "samples_per_second",
        "tokens_per_second",
        "progress",
        "eta_seconds",
        "elapsed_seconds",
        "tokens_seen",
    ):
        assert points[3][name] is not None, name
    for name in ("eval_loss", "perplexity", "best_eval_loss", "best_step"):
        assert points[5][name] is not None, name
    assert done["best_eval_loss"] is not None and done["loss_trend"]
    assert (done["max_learning_rate"], done["batch_size"], done["total_samples"]) == (1e-2, 2, 48)
    assert done["results"]["final_eval_loss"] < done["results"]["initial_eval_loss"]


def test_an_adapter_is_merged_where_the_job_asks(real: tuple[Hub, Agent]) -> None:
    hub, _ = real
    job = hub.submit({**config(lora=True, max_steps=2), "output": {"merge_adapter": True}}, "chat.jsonl")
    done = hub.wait_state(job, "completed")
    merged = Path(done["merged_path"])
    assert (merged / "model.safetensors").is_file() and (merged / "tokenizer.json").is_file()
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"


def test_cancel_during_training_leaves_no_process(real: tuple[Hub, Agent]) -> None:
    hub, agent = real
    job = hub.submit(config(max_steps=5000), "chat.jsonl")
    hub.wait_step(job, 2)
    hub.control(job, "cancel")
    assert hub.wait_state(job, "cancelled")["current_step"] < 5000
    with agent.api() as api:
        assert api.get("/health").json()["active_jobs"] == 0


def test_run_pauses_on_ctrl_c_and_the_same_command_resumes(real: tuple[Hub, Agent], tmp_path: Path) -> None:
    import subprocess
    import sys

    _, agent = real
    job = tmp_path / "job.json"
    job.write_text(
        json.dumps({**config(max_steps=60, evaluation_strategy="no"), "dataset_path": "chat.jsonl"})
    )
    env = clean_env(
        AGENT_HOME=str(tmp_path / "home"),
        MODELS_DIR=str(agent.home / "models"),
        DATASETS_DIR=str(agent.home / "datasets"),
        BACKEND_URL="none",
    )
    command = [sys.executable, "-m", "agent", "run", str(job), "--json"]

    def lines(output: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in output.read_text().splitlines() if line.startswith("{")]

    def steps(output: Path) -> int:
        return max((int(line.get("step") or 0) for line in lines(output)), default=0)

    first = tmp_path / "first"
    with first.open("w") as out:
        process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=out, stderr=subprocess.DEVNULL)
        wait_until(lambda: steps(first) >= 5, "step 5 of the run")
        end(process, signal.SIGINT)
    paused_at = steps(first)
    assert lines(first)[-1]["state"] == "paused" and paused_at < 60
    second = tmp_path / "second"
    with second.open("w") as out:
        assert (
            subprocess.run(command, env=env, cwd=tmp_path, stdout=out, timeout=120, check=False).returncode
            == 0
        )
    last = lines(second)[-1]
    assert last["state"] == "completed" and last["current_step"] == 60 and last["attempt"] == 2
    assert [line["step"] for line in lines(second) if line["type"] == "metric"] == list(
        range(paused_at + 1, 61)
    )
