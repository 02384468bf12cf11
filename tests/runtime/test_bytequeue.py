import fcntl
import multiprocessing
import os
import pickle
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.runtime.bytequeue import PIPE_SIZE, BadFrame, ByteQueue, FrameReader, make_queue, pack


@pytest.fixture
def queue() -> Iterator[ByteQueue]:
    queue = make_queue(multiprocessing.get_context("spawn"))
    yield queue
    queue.close()


@given(st.lists(st.binary(max_size=40)), st.integers(1, 30))
def test_frames_come_whole_however_they_were_cut(frames: list[bytes], size: int) -> None:
    stream = b"".join(map(pack, frames))
    reader = FrameReader(limit=40)
    read = [frame for at in range(0, len(stream), size) for frame in reader.feed(stream[at : at + size])]
    assert read == frames
    assert reader.waiting == 0


def test_the_reader_understands_what_put_writes(queue: ByteQueue) -> None:
    frames = [b"", b"small", b"x" * 100_000]  # from 16 KiB on the head is written apart
    for frame in frames:
        queue.put(frame)
    reader = FrameReader(limit=100_000)
    read: list[bytes] = []
    while len(read) < 3:
        read += reader.feed(os.read(queue.fileno(), 4096))
    assert read == frames


@pytest.mark.parametrize("head", [b"\x00\x00\x00\x0b", b"\xff\xff\xff\xff", b"\xff\xff\xff\x00"])
def test_a_frame_too_large_or_of_no_length_is_refused_at_its_head(head: bytes) -> None:
    with pytest.raises(BadFrame, match="at most 10 bytes"):
        FrameReader(limit=10).feed(head)


def test_what_is_put_is_got_as_bytes_and_never_unpickled(queue: ByteQueue) -> None:
    data = pickle.dumps({"not": "unpickled"})
    queue.put(data)
    assert not queue.empty()
    assert queue.get() == data
    assert queue.empty()


def test_a_closed_writer_is_an_end_of_file(queue: ByteQueue) -> None:
    queue.put(b"last")
    queue.close_writer()
    assert queue.get() == b"last"
    with pytest.raises(EOFError):
        queue.get()
    with pytest.raises(OSError, match="closed in this process"):
        queue.put(b"more")


def test_a_child_gets_one_end_only(queue: ByteQueue) -> None:
    with pytest.raises(OSError, match="closed"):
        queue.reading_end().writer_fileno()
    with pytest.raises(OSError, match="closed"):
        queue.writing_end().fileno()


def test_it_is_pickled_for_a_child_alone(queue: ByteQueue) -> None:
    with pytest.raises(RuntimeError, match="inheritance"):
        pickle.dumps(queue)


def test_the_pipe_is_enlarged(queue: ByteQueue) -> None:
    size = fcntl.fcntl(queue.writer_fileno(), fcntl.F_GETPIPE_SZ)
    if size < PIPE_SIZE:
        pytest.skip("this user's pipes may not be larger")
    queue.put(b"x" * (PIPE_SIZE - 4096))  # would wait for ever in a pipe of the usual size
