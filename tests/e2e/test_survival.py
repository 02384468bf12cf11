"""A run that is killed again and again, and whose newest checkpoint is damaged while the agent is down."""

import random
import signal
from pathlib import Path
from typing import Any

from tests.support.programs import Agent, Hub, together, wait_until
from tests.support.trainers import trainer_of
from tests.trainer.conftest import build_model, build_tokenizer, chat_rows, write_jsonl

STEPS = 60
CONFIG: dict[str, Any] = {
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
        "eval_steps": 20,
        "save_steps": 4,
        "save_total_limit": 3,
    },
    "data": {"eval_split": 0.2},
    "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
}


def kill_trainer(hub: Hub, agent: Agent, job: str, step: int) -> None:
    """SIGKILL the trainer after ``step`` and wait for the next attempt."""
    hub.wait_step(job, step)
    attempt = hub.status(job)["attempt"]
    child = wait_until(lambda: trainer_of(agent, job), "the job's trainer")
    child.send_signal(signal.SIGKILL)
    wait_until(lambda: hub.status(job)["attempt"] > attempt, "the next attempt")


def test_a_run_survives_two_kills_and_a_damaged_checkpoint(tmp_path: Path) -> None:
    home = tmp_path / "agent"
    tokenizer = build_tokenizer()
    build_model(home / "models" / "tiny", len(tokenizer))
    tokenizer.save_pretrained(str(home / "models" / "tiny"))
    write_jsonl(home / "datasets" / "chat.jsonl", chat_rows(48))
    with together(tmp_path, fake=False, WARM_TRAINER="true") as (hub, agent):
        untouched = hub.wait_state(hub.submit(CONFIG, "chat.jsonl"), "completed")
        job = hub.submit(CONFIG, "chat.jsonl")
        kill_trainer(hub, agent, job, 10)
        kill_trainer(hub, agent, job, 22)

        hub.wait_step(job, 34)
        child = wait_until(lambda: trainer_of(agent, job), "the job's trainer")
        agent.stop(signal.SIGKILL)
        child.wait(60)
        flipped = flip(home / "checkpoints" / job)
        agent.start()

        done = hub.wait_state(job, "completed")
        assert done["attempt"] == 4
        assert done["weights_hash"] == untouched["weights_hash"]
        assert [point["step"] for point in hub.metrics(job)][-1] == STEPS
        assert any(f"Checkpoint {flipped} was passed over" in note["text"] for note in done["notes"])


def flip(checkpoints: Path) -> str:
    """Change a byte of the weights in the newest checkpoint, and return its name."""
    newest = max(checkpoints.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    file = newest / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[random.Random(0).randrange(len(raw))] ^= 1
    file.write_bytes(raw)
    return newest.name
