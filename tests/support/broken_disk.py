"""A disk that fails: the kernel answers the calling thread's own system calls with an error, by a seccomp filter.

It needs no rights and cannot be taken back, so it is for a thread that ends with the test, such as the journal's.
What is sound again after a while is `unwritable`.
"""

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

_CALLS = {
    "x86_64": {"write": 1, "pwrite64": 18, "fsync": 74, "fdatasync": 75},
    "aarch64": {"write": 64, "pwrite64": 68, "fsync": 82, "fdatasync": 83},
}
WRITES = ("write", "pwrite64")
SYNCS = ("fsync", "fdatasync")

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER, _FIRST, _FOURTH = 0, 16, 40
_NO_NEW_PRIVS, _SECCOMP, _FILTER = 38, 22, 2

needs_filter = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in _CALLS,
    reason="needs a seccomp filter, to make a disk that fails",
)

needs_descriptors = pytest.mark.skipif(
    sys.platform != "linux", reason="needs the list of open files in /proc"
)


def refuse(calls: Sequence[str], error: int, *, path: Path | None = None, beyond: int = 0) -> None:
    """Have these calls of this thread fail with ``error``; of an open file alone, and from a byte on, where given."""
    numbers = _CALLS[platform.machine()]
    program: list[tuple[int, int, int, int]] = []
    for call in calls:
        tests = [(_NUMBER, _EQUAL, numbers[call])]
        if path is not None:
            tests += [(_FIRST, _EQUAL, _descriptor(path)), (_FOURTH, _AT_LEAST, beyond)]
        for done, (where, comparison, value) in enumerate(tests):
            # Of a test that fails: over the tests that are left and the return.
            program += [(_LOAD, 0, 0, where), (comparison, 0, 2 * (len(tests) - done) - 1, value)]
        program.append((_RETURN, 0, 0, _ERRNO | error))
    program.append((_RETURN, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    whole = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, whole, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no seccomp filter")


@contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """Have this open file of the process take no writes meanwhile; other files beside it still do.

    Not for a file that is locked: the closing of any descriptor of it takes its locks away.
    """
    own = _descriptor(path)
    kept = os.dup(own)
    reads = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.dup2(reads, own, inheritable=False)
        yield
    finally:
        os.dup2(kept, own, inheritable=False)
        os.close(reads)
        os.close(kept)


def _descriptor(path: Path) -> int:
    for link in Path("/proc/self/fd").iterdir():
        if link.exists() and link.readlink() == path:
            return int(link.name)
    raise FileNotFoundError(path)
