"""The command `check`, from the job's file to the exit code, with the real trainer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.cli_check import lacks, table
from protocol.worker import Estimate
from tests.support.programs import clean_env
from tests.trainer.conftest import build_model, build_tokenizer, chat_rows, write_jsonl

CONFIG: dict[str, Any] = {
    "model": {"name": "tiny"},
    "training": {"method": "sft", "num_epochs": 2, "batch_size": 4, "max_length": 64},
}
FOUND = Estimate(
    device="NVIDIA H100",
    device_gb=30.0,
    host_gb=4.0,
    disk_gb=1.5,
    free_device_gb=24.0,
    free_host_gb=60.0,
    free_disk_gb=100.0,
    step_seconds=2.5,
    total_seconds=9000.0,
    total_steps=3600,
    parts={"weights": 16.0, "activations": 14.0, "program": 0.6},
    advice=["training.max_length 2048 saves about 7.0 GB."],
    fits=False,
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An agent's home with a model and rows."""
    folder = tmp_path / "home"
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(build_model(folder / "models" / "tiny", len(tokenizer)))
    write_jsonl(folder / "datasets" / "rows.jsonl", chat_rows(24))
    return folder


def called(home: Path, *words: str) -> tuple[int, str, str]:
    """Run the command in a process of its own, which it makes to a trainer's parent."""
    done = subprocess.run(
        [sys.executable, "-m", "agent", *words],
        env=clean_env(AGENT_HOME=str(home), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"),
        cwd=home.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def job(folder: Path, **changes: Any) -> str:
    path = folder / "job.json"
    path.write_text(json.dumps({**CONFIG, "dataset_path": "rows.jsonl", **changes}))
    return str(path)


def test_a_job_that_fits(home: Path) -> None:
    code, out, err = called(home, "check", job(home.parent), "--json")
    assert code == 0, err
    found = msgspec.json.decode(out, type=Estimate)
    assert found.fits and found.total_steps == 12 and found.step_seconds
    assert 0.3 < found.host_gb < 2
    # Nothing is left but the agent's own log.
    assert sorted(path.name for path in home.iterdir()) == ["agent.log", "datasets", "models"]
    assert sorted(path.name for path in (home / "models").iterdir()) == ["tiny"]


def test_a_job_whose_data_is_bad(home: Path) -> None:
    rows = [*chat_rows(3), {"messages": "hello"}]
    write_jsonl(home / "datasets" / "bad.jsonl", rows)
    asked = {"tensorboard": {"enabled": True}}
    code, out, err = called(home, "check", job(home.parent, dataset_path="bad.jsonl", **asked))
    assert code == 11 and not out
    assert "bad.jsonl" in err and "4" in err
    assert "warning: Asked for in the job's config, and not done by this agent: tensorboard." in err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"name": "tyni"}, "dataset_path": "rows.jsonl"}, "tyni"),
        ({"dataset_path": "no-such.jsonl"}, "no-such.jsonl"),
        ({"training": {"method": "sft", "batch_size": 0}}, "batch_size"),
    ],
)
def test_a_job_that_cannot_be_accepted(home: Path, changes: dict[str, Any], words: str) -> None:
    code, out, err = called(home, "--set", "ALLOW_HUB=false", "check", job(home.parent, **changes))
    assert code == 10 and not out
    assert words in err


def test_what_does_not_fit_is_said_with_figures() -> None:
    said = table(FOUND)
    assert "NVIDIA H100   30.00 GB   24.00 GB" in said
    assert "The job does not fit." in said and "saves about 7.0 GB" in said
    assert "3600 steps of about 2.5 s: 2 h 30 min in all" in said
    assert "Python and its libraries" not in said  # no part of the device's memory
    assert lacks(FOUND) == (
        "the job does not fit: 30.00 GB of memory of NVIDIA H100 are needed and 24.00 GB are free. "
        "training.max_length 2048 saves about 7.0 GB."
    )


def test_a_job_too_large_for_this_machine_leaves_with_its_code(home: Path) -> None:
    """No step of it is measured: that would take the machine's last memory."""
    file = home / "models" / "tiny" / "config.json"
    config = json.loads(file.read_text())
    config |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 120, "head_dim": 128}
    config |= {"num_attention_heads": 128, "num_key_value_heads": 8}
    file.write_text(json.dumps({name: value for name, value in config.items() if name != "layer_types"}))
    (home / "models" / "tiny" / "model.safetensors").unlink()
    code, out, err = called(home, "check", job(home.parent))
    assert code == 10 and "The job does not fit." in out
    assert "error: the job does not fit: " in err and "GB of memory are needed" in err
    assert "A LoRA adapter of rank 16" in out
