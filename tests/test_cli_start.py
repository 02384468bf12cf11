"""The bare `start`: the same words as through the parser, and nothing loaded that it does not need."""

import subprocess
import sys
from pathlib import Path

from agent.errors import Exit
from tests.support.programs import clean_env

HEAVY = ("typer", "click", "pydantic", "rich", "httpx", "starlette", "uvicorn", "psutil", "yaml", "torch")


def ran(folder: Path, *words: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    env = clean_env(AGENT_HOME=str(folder / "home"), **settings)
    command = [sys.executable, *words]
    return subprocess.run(
        command, env=env, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def test_what_is_loaded_before_the_first_dial(tmp_path: Path) -> None:
    listed = f"import sys, agent.cli_start, agent.app; print(sorted(set({HEAVY}) & set(sys.modules)))"
    assert ran(tmp_path, "-c", listed).stdout.strip() == "[]"


def test_a_bad_setting_is_the_same_sentence_with_and_without_options(tmp_path: Path) -> None:
    bare = ran(tmp_path, "-m", "agent", "start", PORT="many")
    parsed = ran(tmp_path, "-m", "agent", "--set", "LOG_LEVEL=INFO", "start", PORT="many")
    assert bare.returncode == parsed.returncode == Exit.SETTINGS
    assert bare.stderr == parsed.stderr
    assert bare.stderr.startswith("error: ") and "PORT" in bare.stderr
    assert "Traceback" not in bare.stderr
