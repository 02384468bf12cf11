"""A mount table of one's own, in which a small disk can be made: as the kernel lets whoever runs the tests."""

import functools
import subprocess
import tempfile

import pytest

WAYS = (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"])
"""For root, and for anybody else."""


@functools.cache
def own_mounts() -> tuple[str, ...]:
    """Return the command that gives a program a mount table of its own; nothing where none may be had."""
    for way in WAYS:
        # Some systems make the namespace and then let nothing be mounted in it.
        with tempfile.TemporaryDirectory() as folder:
            command = [*way, "mount", "-t", "tmpfs", "tmpfs", folder]
            try:
                done = subprocess.run(command, capture_output=True, check=False)
            except FileNotFoundError:
                return ()
        if done.returncode == 0:
            return tuple(way)
    return ()


def needs_mounts() -> tuple[str, ...]:
    """Return that command, or skip the test."""
    if not (way := own_mounts()):
        pytest.skip("needs the right to mount in a namespace of its own, to make a small disk")
    return way
