"""Memory as the kernel tells of it; the files of a container are written as the kernel writes them."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from agent.runtime.hostmem import held_by, memory, oom_kills
from agent.runtime.tree import identify
from tests.support.programs import wait_until

MB = 1 << 20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="cgroups are Linux's")


def tree(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup of a process in the cgroup ``own``."""
    proc, cgroups = folder / "proc", folder / "cgroup"
    for name, text in {
        "proc/self/cgroup": own,
        **{f"cgroup/{name}": text for name, text in files.items()},
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return proc, cgroups


def test_this_machine_has_memory() -> None:
    found = memory()
    assert 0 < found.available <= found.total <= psutil.virtual_memory().total
    assert oom_kills() >= 0


@LINUX
def test_a_container_with_less_left_counts_before_the_machine(tmp_path: Path) -> None:
    places = tree(
        tmp_path,
        "0::/a/b\n",
        {
            "a/memory.max": f"{64 * MB}\n",
            "a/memory.current": f"{60 * MB}\n",
            "a/memory.stat": f"anon 1\ninactive_file {8 * MB}\nactive_file {2 * MB}\nfile_dirty {MB}\n",
            "a/b/memory.max": "max\n",
            "a/b/memory.current": f"{50 * MB}\n",
        },
    )
    found = memory(*places)
    # What lies in the cache of files and is written can be had back at once.
    assert (found.available, found.total) == (13 * MB, 64 * MB)


@LINUX
def test_version_1_and_a_path_that_is_the_hosts(tmp_path: Path) -> None:
    places = tree(
        tmp_path,
        "4:cpu,memory:/docker/0123\n2:cpuset:/\n",
        {
            "memory/memory.limit_in_bytes": f"{32 * MB}\n",
            "memory/memory.usage_in_bytes": f"{30 * MB}\n",
            "memory/memory.stat": f"cache 5\ninactive_file 0\ntotal_inactive_file {MB}\n",
            "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
        },
    )
    assert memory(*places).available == 3 * MB
    assert oom_kills(*places) == 3


@LINUX
def test_no_limit_is_the_machines(tmp_path: Path) -> None:
    places = tree(tmp_path, "4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert memory(*places).total == psutil.virtual_memory().total
    assert memory(tmp_path / "nothing", tmp_path).total == psutil.virtual_memory().total


@LINUX
def test_kills_of_the_container_and_of_the_machine_are_counted(tmp_path: Path) -> None:
    places = tree(tmp_path, "0::/\n", {"memory.events": "low 0\noom 2\noom_kill 2\n"})
    (places[0] / "vmstat").write_text("nr_free_pages 5\noom_kill 7\n")
    assert oom_kills(*places) == 9


def test_what_a_process_holds_is_what_it_has_written_to_and_its_childrens() -> None:
    code = (
        "import subprocess, sys\n"
        "kept = bytearray(b'x') * (64 << 20)\n"
        "if len(sys.argv) > 1:\n"
        "    child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE)\n"
        "    child.stdout.readline()\n"
        "print('there', flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, code], start_new_session=True, **pipes) as parent:  # type: ignore[call-overload]
        assert parent.stdout.readline() == b"there\n"
        leader = identify(parent.pid)
        assert leader is not None
        assert 128 * MB <= held_by(leader) < 200 * MB
        parent.stdin.close()
    # Its child ends by itself, a moment later.
    wait_until(lambda: held_by(leader) == 0, "the end of the child")
