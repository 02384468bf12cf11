"""The container: its first process in a real PID namespace, its health check, and the files about it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from agent.config import NAMES, load
from agent.setup import init
from tests.local.desk import api

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
UNSHARE = [
    "unshare",
    *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]),
    "--pid",
    "--fork",
    "--mount-proc",
]

AGENT = """
import os, signal, subprocess, sys, time
# A stand-in for the agent: leaves at once on SIGTERM, and its trainer saves for two seconds after that.
folder = sys.argv[1]
read, write = os.pipe()
trainer = subprocess.Popen([sys.executable, "-c", sys.argv[2], folder, str(read)], pass_fds=[read], start_new_session=True)
os.close(read)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
signal.signal(signal.SIGHUP, lambda *_: open(folder + "/hup", "w").close())
print("up", os.getpid(), os.getuid(), flush=True)
while True:
    signal.pause()
"""
TRAINER = """
import os, signal, sys, time
folder, pipe = sys.argv[1], int(sys.argv[2])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.read(pipe, 1)  # end of file: the agent is gone
time.sleep(SAVE)
open(folder + "/saved", "w").close()
"""


def can_unshare() -> bool:
    return sys.platform == "linux" and subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


needs_namespace = pytest.mark.skipif(not can_unshare(), reason="no PID namespace can be made here")


def children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


def waits(pid: int, number: signal.Signals) -> bool:
    """Tell whether a signal was sent to a process that has not taken it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pending = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in pending)


def stop(pid: int) -> None:
    """Have a process stand still, and wait until it does."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: "State:\tT" in Path(f"/proc/{pid}/status").read_text())


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def container(folder: Path, save: float, **environ: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """Run the first process as process 1 of a namespace; yield unshare and its id outside."""
    trainer = TRAINER.replace("SAVE", str(save))
    command = [
        *UNSHARE,
        sys.executable,
        str(ROOT / "agent/setup/init.py"),
        sys.executable,
        "-c",
        AGENT,
        str(folder),
        trainer,
    ]
    env = {"PATH": os.environ["PATH"], "PUID": "0", "PGID": "0", **environ}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as outer:
        assert outer.stdout is not None
        assert outer.stdout.readline().startswith("up "), outer.stderr and outer.stderr.read()
        first = int(children(outer.pid))
        try:
            yield outer, first
        finally:
            outer.kill()
            # When process 1 goes, its namespace goes.
            if outer.poll() is None or Path(f"/proc/{first}").exists():
                os.kill(first, signal.SIGKILL)


@needs_namespace
def test_the_first_process_outlives_the_agent_until_the_trainer_has_saved(tmp_path: Path) -> None:
    with container(tmp_path, save=2) as (outer, first):
        os.kill(first, signal.SIGTERM)
        outer.wait(30)
        assert (tmp_path / "saved").exists()
        assert outer.returncode == 7, "the agent's own exit code"


@needs_namespace
def test_it_does_not_wait_longer_than_the_grace(tmp_path: Path) -> None:
    with container(tmp_path, save=300, STOP_GRACE_SECONDS="0.5") as (outer, first):
        os.kill(first, signal.SIGTERM)
        outer.wait(30)
        assert not (tmp_path / "saved").exists()
        assert outer.stderr is not None and "killed" in outer.stderr.read()
        assert outer.returncode == 7


@pytest.mark.skipif(sys.platform != "linux", reason="orphans go to a subreaper on Linux alone")
def test_where_it_is_not_process_1_the_trainer_is_ended_by_its_id(tmp_path: Path) -> None:
    trainer = TRAINER.replace("SAVE", "300").replace(
        "time.sleep", "print(os.getpid(), flush=True); time.sleep"
    )
    command = [
        sys.executable,
        str(ROOT / "agent/setup/init.py"),
        sys.executable,
        "-c",
        AGENT,
        str(tmp_path),
        trainer,
    ]
    env = {"PATH": os.environ["PATH"], "PUID": "0", "PGID": "0", "STOP_GRACE_SECONDS": "0.5"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as outer:
        assert outer.stdout is not None and outer.stdout.readline().startswith("up ")
        outer.send_signal(signal.SIGTERM)
        pid = int(outer.stdout.readline())
        assert outer.wait(30) == 7
        assert not Path(f"/proc/{pid}").exists()


@needs_namespace
@pytest.mark.parametrize("second", [False, True])
def test_a_second_stop_does_not_wait_for_the_save_and_the_first_does(tmp_path: Path, second: bool) -> None:
    with container(tmp_path, save=300 if second else 1) as (outer, first):
        agent = children(first)
        if second:
            stop(int(agent))
            os.kill(first, signal.SIGTERM)
            until(lambda: waits(int(agent), signal.SIGTERM))
        # Both wait for the first process at once, the end of the agent and a stop.
        stop(first)
        os.kill(int(agent), signal.SIGCONT if second else signal.SIGTERM)
        until(lambda: children(first) != agent)
        os.kill(first, signal.SIGTERM)
        os.kill(first, signal.SIGCONT)
        outer.wait(30)
        assert outer.returncode == 7
        assert (tmp_path / "saved").exists() is not second


@needs_namespace
def test_other_signals_are_handed_on(tmp_path: Path) -> None:
    with container(tmp_path, save=0) as (outer, first):
        os.kill(first, signal.SIGHUP)
        until((tmp_path / "hup").exists)
        os.kill(first, signal.SIGTERM)
        outer.wait(30)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up root")
def test_root_is_given_up_and_the_folders_are_the_users(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o005 != 0o005 and str(parent) != "/":
            parent.chmod(parent.stat().st_mode | 0o005)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "old").touch()
    code = "import os; print(os.getuid(), os.getgid(), os.getgroups(), open('/proc/self/status').read())"
    env = {"PATH": os.environ["PATH"], "PUID": "1234", "PGID": "2345", "AGENT_HOME": str(tmp_path / "data")}
    base = getattr(sys, "_base_executable", sys.executable)
    program = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else base
    ran = subprocess.run(
        [program, str(ROOT / "agent/setup/init.py"), program, "-c", code],
        env=env,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("1234 2345 []")
    assert "NoNewPrivs:\t1" in ran.stdout
    assert (tmp_path / "data" / "old").stat().st_uid == 1234


def test_a_wrong_owner_is_said() -> None:
    with pytest.raises(SystemExit, match="PUID: 'me' is not a number"):
        init._identity({"PUID": "me"}, "PUID")
    assert init.grace({"STOP_GRACE_SECONDS": "x"}) == init.GRACE


def _json_of(instruction: str) -> list[str]:
    found = re.search(rf"^{instruction} (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert found is not None
    return [str(word) for word in json.loads(found[1])]


def test_the_health_check_asks_the_local_api_on_its_port(tmp_path: Path) -> None:
    command = _json_of("HEALTHCHECK .* CMD")
    assert command[0] == "python"
    with api(tmp_path) as door:
        port = door.url.rsplit(":", 1)[1]
        env = {"PORT": port, "PATH": "", "http_proxy": "http://127.0.0.1:9"}
        assert subprocess.run([sys.executable, *command[1:]], env=env).returncode == 0
    gone = subprocess.run([sys.executable, *command[1:]], env=env, capture_output=True)
    assert gone.returncode != 0


def test_the_image_sets_only_settings_that_there_are() -> None:
    text = DOCKERFILE[DOCKERFILE.index("ENV PUID") :]
    block = text[: text.index("\n\n")].removeprefix("ENV ").replace("\\\n", " ")
    values = dict(word.split("=", 1) for word in block.split())
    assert set(values) - set(NAMES) == {"PUID", "PGID", "HOME", "USER", "HF_HOME", "PYTHONUNBUFFERED"}
    settings = load({name: value for name, value in values.items() if name in NAMES})
    assert settings.bad_key_sleep > 0
    volumes = _json_of("VOLUME")
    for folder in (
        settings.agent_home,
        settings.models_dir,
        settings.checkpoints_dir,
        Path(values["HF_HOME"]),
    ):
        assert any(folder.is_relative_to(volume) for volume in volumes)


def test_the_image_is_built_from_files_that_there_are() -> None:
    for source in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), name
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == set(" ".join(re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE)).split())


def test_stopping_waits_longer_than_the_grace() -> None:
    service = yaml.safe_load((ROOT / "agent/setup/compose.yaml").read_text())["services"]["training-agent"]
    assert int(service["stop_grace_period"].removesuffix("s")) > load({"HOME": "/h"}).stop_grace_seconds
    assert set(service["environment"]) <= {*NAMES, "PUID", "PGID"}
    timeout = re.search(r"--stop-timeout (\d+)", DOCKERFILE)
    assert timeout is not None and int(timeout[1]) > load({"HOME": "/h"}).stop_grace_seconds
    assert service["shm_size"] and "--shm-size" in DOCKERFILE


def test_the_script_and_the_packages_are_as_promised() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "finetunelab-training-agent"
    assert project["scripts"] == {"training-agent": "agent.__main__:main"}
    assert set(project["optional-dependencies"]) == {"hub", "hpo", "test"}
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, agent.__main__; print(sorted(m for m in sys.modules if m.startswith('agent')))",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert shown.stdout.strip() == "['agent', 'agent.__main__']", "a spawned trainer imports it again"


def test_ci_runs_the_command_of_the_readme_and_then_the_gate() -> None:
    script = (ROOT / ".ci/run").read_text()
    command = 'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/pytest'
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert f"\n{command}\n" in script and command in (ROOT / "README.md").read_text()
    order = [
        script.index(word)
        for word in (command, "ruff format --check", "ruff check", "bin/mypy", "lint-imports")
    ]
    assert order == sorted(order)
    assert subprocess.run(["bash", "-n", ROOT / ".ci/run"]).returncode == 0
