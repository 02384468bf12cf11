import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.errors import AlreadyRunning
from agent.runtime.lock import HomeLock


def test_a_second_agent_of_a_home_is_told_who_has_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with HomeLock(home):
        with pytest.raises(AlreadyRunning, match=f"process {os.getpid()}.*AGENT_HOME"), HomeLock(home):
            pass
        assert (home / "agent.lock").stat().st_mode & 0o777 == 0o600
    with HomeLock(home):
        pass


def test_a_killed_agent_holds_it_no_more_and_its_children_never_did(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, pathlib, os, signal; from agent.runtime.lock import HomeLock;"
        "lock = HomeLock(pathlib.Path(sys.argv[1])); lock.__enter__();"
        "sleeper = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)'], close_fds=False,"
        "    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL);"
        "print(sleeper.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    try:
        with HomeLock(tmp_path):
            pass
    finally:
        os.kill(int(killed.stdout), 9)
