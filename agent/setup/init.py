"""The container's first process: outlives the agent until its trainers have saved.

When process 1 leaves, the kernel kills everything else in the container, a trainer in the middle
of its save included. So the agent is a child of this one, which gives up root for PUID and PGID,
hands signals on, collects the dead, and leaves when nobody is left or STOP_GRACE_SECONDS after
the agent has. Standard library only. `python init.py [COMMAND ...]`; the agent where none is given.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDERS = ("AGENT_HOME", "MODELS_DIR", "DATASETS_DIR", "CHECKPOINTS_DIR", "LOGS_DIR", "HF_HOME", "HOME")
HANDED_ON = frozenset(
    {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
)
STOPS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
GRACE = 120.0
AFTER_KILL = 5.0


def main(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run ``command`` to its end and everything it left behind; return its exit code."""
    watched = HANDED_ON | {signal.SIGCHLD}
    # Blocked before the child starts, so that none is lost; process 1 has no default actions.
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    drop_root(environ)
    _prctl(PR_SET_NO_NEW_PRIVS)
    # Where this is not process 1 (`docker run --init`), orphans come here all the same.
    _prctl(PR_SET_CHILD_SUBREAPER)
    agent = os.posix_spawnp(
        command[0],
        list(command),
        dict(environ),
        # A group of its own: Ctrl-C in a terminal reaches this process alone, which hands it on once.
        setpgroup=0,
        setsigmask=[],
    )
    return _wait(agent, watched, grace(environ))


def grace(environ: Mapping[str, str]) -> float:
    """Return the seconds that trainers may outlive the agent."""
    try:
        return float(environ.get("STOP_GRACE_SECONDS") or GRACE)
    except ValueError:
        # The agent says what is wrong with it.
        return GRACE


def _wait(agent: int, watched: frozenset[signal.Signals], seconds: float) -> int:
    code: int | None = None
    deadline = float("inf")
    killed = asked = False
    while True:
        ended, anybody = _collect(agent)
        if ended is not None:
            code, deadline = ended, time.monotonic() + seconds
        if code is not None and not anybody:
            return code
        left = deadline - time.monotonic()
        if code is not None and left <= 0:
            if killed:
                return code
            sys.stderr.write("init: trainers did not save in time and are killed\n")
            _kill_children()
            killed, deadline = True, time.monotonic() + AFTER_KILL
            continue
        got = signal.sigtimedwait(watched, min(left, 3600.0))
        if got is None or got.si_signo == signal.SIGCHLD:
            continue
        if code is None:
            # It may have ended just now, and a signal to the dead would be lost without a word.
            code, _ = _collect(agent)
            deadline = time.monotonic() + seconds if code is not None else deadline
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent, got.si_signo)
        elif got.si_signo in STOPS and asked:
            # The agent is gone, and whoever stops a second time does not want to wait for a save.
            deadline = 0.0
        asked = asked or got.si_signo in STOPS


def _collect(agent: int) -> tuple[int | None, bool]:
    """Reap the dead; return the agent's exit code if it is among them, and whether anybody is left."""
    code: int | None = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code, False
        if pid == 0:
            return code, True
        if pid == agent:
            ended = os.waitstatus_to_exitcode(status)
            code = ended if ended >= 0 else 128 - ended


def _kill_children() -> None:
    """Kill every child by its id: those of the dead have become ours."""
    me = os.getpid()
    for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def drop_root(environ: Mapping[str, str]) -> None:
    """Become PUID:PGID for good, and let that user own the folders it needs; nothing where we are not root."""
    if os.geteuid() != 0:
        return
    uid, gid = _identity(environ, "PUID"), _identity(environ, "PGID")
    if uid == 0:
        return
    for name in FOLDERS:
        folder = environ.get(name, "")
        if folder:
            _give(Path(folder), uid, gid)
    # Devices such as /dev/dri belong to groups that `--group-add` named; root's own are left behind.
    groups = [group for group in os.getgroups() if group != 0]
    os.setgroups(groups)
    os.setgid(gid)
    os.setuid(uid)


def _identity(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name) or "1000"
    if not text.isdigit():
        sys.exit(f"{name}: {text!r} is not a number of a user or group")
    return int(text)


def _give(folder: Path, uid: int, gid: int) -> None:
    """Make ``folder`` for the user. What lies in it is changed only if the folder was another's."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.stat().st_uid == uid:
        return
    try:
        os.chown(folder, uid, gid)
        for root, folders, files in os.walk(folder):
            for name in (*folders, *files):
                os.lchown(os.path.join(root, name), uid, gid)  # noqa: PTH118 - many thousand files
    except PermissionError as error:
        sys.exit(f"cannot give {folder} to {uid}:{gid}: {error.strerror}; set PUID and PGID to its owner")


def _prctl(option: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, 1, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [sys.executable, "-m", "agent", "start"], os.environ))
