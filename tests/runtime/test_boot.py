import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from protocol.worker import Note
from tests.support.children import HOSTILE, clean_env, start_order, supervised


def test_it_needs_the_standard_library_alone() -> None:
    # It runs before the output is claimed and the environment is cut.
    code = (
        "import sys; before = set(sys.modules); import agent.runtime.boot; print(*set(sys.modules) - before)"
    )
    # Under a coverage run every process loads coverage before its first line.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=plain
    ).stdout
    roots = {name.partition(".")[0] for name in loaded.split()}
    # multiprocessing makes the main module known by a second name.
    assert roots - sys.stdlib_module_names == {"agent", "__mp_main__"}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a child saw of itself."""
    folder = tmp_path_factory.mktemp("boot")

    async def look() -> dict[str, Any]:
        async with supervised(HOSTILE) as watch:
            env = clean_env(BEHAVIOUR="tells", MINE="yes")
            await watch.supervisor.start("job", start_order(folder), env=env, log=folder / "job.log")
            note: Note = await watch.heard(Note)
            assert (await watch.exited()).exit_code == 0
            return {**json.loads(note.text), "given": env}

    os.environ["SECRET_OF_THE_AGENT"] = "wak_1"
    try:
        return anyio.run(look)
    finally:
        del os.environ["SECRET_OF_THE_AGENT"]


def test_the_environment_is_exactly_the_one_it_was_given(told: dict[str, Any]) -> None:
    assert told["env"] == told["given"]


def test_it_leads_a_session_and_leaves_ctrl_c_to_the_agent(told: dict[str, Any]) -> None:
    assert told["session"] == told["pid"]
    assert told["sigint"]
    assert told["blocked"] == []


def test_the_main_module_and_its_arguments_do_not_come_along(told: dict[str, Any]) -> None:
    assert told["main"][1] == []
    assert "pytest" not in told["modules"]


def test_it_has_one_end_of_each_queue(told: dict[str, Any]) -> None:
    pipes = [name for name in told["fds"] if name.startswith("pipe:")]
    assert len(pipes) == len(set(pipes))


def test_all_output_is_in_the_log_native_writes_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "logs" / "job.log"

    async def go() -> None:
        async with supervised(HOSTILE) as watch:
            env = clean_env(BEHAVIOUR="prints")
            await watch.supervisor.start("job", start_order(tmp_path), env=env, log=log)
            end = await watch.exited()
            assert end.exit_code == 3
            assert end.log_tail[-1] == "to stderr"
            assert "left with code 3" in end.sentence

    anyio.run(go)
    lines = ["from Python", "from C", "from the descriptor", "from a grandchild", "to stderr"]
    assert log.read_text().splitlines() == lines  # in order, although it left by os._exit
    assert log.stat().st_mode & 0o777 == 0o600
    assert capfd.readouterr() == ("", "")


def test_a_module_that_cannot_be_imported_is_a_traceback_in_the_log(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised("agent.trainer.absent") as watch:
            await watch.supervisor.start(
                "job", start_order(tmp_path), env=clean_env(), log=tmp_path / "job.log"
            )
            end = await watch.exited()
            assert end.exit_code == 1
            assert "agent.trainer.absent" in end.log_tail[-1]

    anyio.run(go)


def test_it_leaves_without_taking_itself_apart(tmp_path: Path) -> None:
    async def go() -> None:
        async with supervised(HOSTILE) as watch:
            env = clean_env(BEHAVIOUR="lingers")
            await watch.supervisor.start("job", start_order(tmp_path), env=env, log=tmp_path / "job.log")
            assert (await watch.exited()).exit_code == 0

    anyio.run(go)
    assert (tmp_path / "job.log").read_text() == "no newline, callback\n"
