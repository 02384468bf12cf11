import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.runtime import logs
from agent.runtime.logs import MAX_LINE, MAX_LINES, Chunk, LogTail, read_lines
from agent.runtime.redact import MARK, Redactor


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "job.log"


def add(log: Path, data: bytes) -> None:
    with log.open("ab") as file:
        file.write(data)


def everything(tail: LogTail) -> list[str]:
    lines: list[str] = []
    while (chunk := tail.read_new()) is not None:
        lines += chunk.lines
    return lines


def test_only_whole_lines_are_given_out_and_each_once(log: Path) -> None:
    tail = LogTail(log)
    assert tail.read_new() is None
    add(log, b"one\ntw")
    assert tail.read_new() == Chunk(0, ["one"])
    assert tail.read_new() is None
    assert tail.offset == 4
    add(log, b"o\n\nthree")
    assert tail.read_new() == Chunk(4, ["two", ""])
    assert tail.read_new() is None
    assert tail.finish() == Chunk(9, ["three"])
    assert tail.finish() is None
    assert tail.offset == 14


def test_a_later_tail_goes_on_where_the_first_stopped(log: Path) -> None:
    first = LogTail(log)
    add(log, b"one\ntw")
    first.read_new()
    add(log, b"o\n")
    assert LogTail(log, offset=first.offset).read_new() == Chunk(4, ["two"])


def test_a_progress_bar_gives_its_last_state_only(log: Path) -> None:
    tail = LogTail(log)
    for percent in range(1000):
        add(log, b"\r%3d%%|####" % (percent // 10))
        assert tail.read_new() is None
    add(log, b"\nnext\n")
    assert everything(tail) == [" 99%|####", "next"]


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        (b"windows\r\nends\r\r\n", ["windows", "ends"]),
        (b"\r10%\r20%\r    \rafter the bar\n", ["after the bar"]),
        (b"\r10%\r20%\r     \r\nafter\n", ["after"]),
        (b"10%\r20%\r\n", ["20%"]),
        (b"\x1b[32mgreen\x1b[0m\x1b[A \x00\x07bell\ttab\n", ["green bell\ttab"]),
        ("caf\u00e9 \u2028 \u4f60\n".encode(), ["caf\u00e9 \u2028 \u4f60"]),
        (b"not \xff utf-8\n", ["not \ufffd utf-8"]),
    ],
)
def test_what_a_terminal_would_show_is_what_is_kept(log: Path, written: bytes, lines: list[str]) -> None:
    whole, bytewise = LogTail(log), LogTail(log.with_name("other"))
    add(log, written)
    assert everything(whole) == lines
    slowly: list[str] = []
    for byte in written:
        add(bytewise.path, bytes([byte]))
        slowly += everything(bytewise)
    assert slowly == lines


@given(
    st.lists(st.sampled_from([b"a", b"bc", b"\r", b"\n", b"\r\n", b" ", "\u00e9".encode()]), max_size=40),
    st.data(),
)
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_how_the_bytes_arrive_does_not_matter(parts: list[bytes], data: st.DataObject) -> None:
    written = b"".join(parts)
    cut = data.draw(st.integers(0, len(written)))
    at_once, in_two = logs._Lines(0), logs._Lines(0)
    assert [*at_once.feed(written)] == [*in_two.feed(written[:cut]), *in_two.feed(written[cut:])]
    assert (
        (at_once.start, at_once.at) == (in_two.start, in_two.at) == (written.rfind(b"\n") + 1, len(written))
    )
    assert at_once.end() == in_two.end()


def test_a_long_line_is_cut_and_takes_no_memory(log: Path) -> None:
    add(log, b"before\n" + b"x" * (3 << 20) + b"\nafter\n")
    tail = LogTail(log)
    tracemalloc.start()
    lines = everything(tail)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines == [
        "before",
        f"{'x' * MAX_LINE} [... {(3 << 20) - MAX_LINE} more bytes in this line]",
        "after",
    ]
    assert peak < 1 << 20


def test_secrets_are_out_also_at_the_cut(log: Path) -> None:
    secret = "s3cr3t-" * 10
    tail = LogTail(log, Redactor([secret]).redact)
    add(log, b"key " + secret.encode() + b"\n" + b"y" * (MAX_LINE - 30) + secret.encode() + b"\n")
    first, second = everything(tail)
    assert first == f"key {MARK}"
    assert "s3cr3t" not in second
    assert read_lines(log, 0, 9, Redactor([secret]).redact)[0] == [first, second]


def test_a_chunk_is_bounded(log: Path) -> None:
    add(log, b"".join(b"%d\n" % n for n in range(3 * MAX_LINES + 5)))
    tail = LogTail(log)
    chunks = []
    while (chunk := tail.read_new()) is not None:
        chunks.append(chunk)
    assert [len(chunk.lines) for chunk in chunks] == [MAX_LINES, MAX_LINES, MAX_LINES, 5]
    assert [line for chunk in chunks for line in chunk.lines] == [str(n) for n in range(3 * MAX_LINES + 5)]
    data = log.read_bytes()
    assert all(data[chunk.offset :].startswith(chunk.lines[0].encode() + b"\n") for chunk in chunks)


def test_a_tail_far_behind_leaves_some_out_and_says_so(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_LAG", 4000)
    add(log, b"".join(b"line %05d\n" % n for n in range(1000)))
    lines = everything(LogTail(log))
    # The last 1,000 bytes, from the next whole line on.
    assert lines[0] == "[10010 bytes left out here; they are in the log file on the agent's machine]"
    assert lines[1:] == [f"line {n:05}" for n in range(910, 1000)]


def test_an_emptied_file_is_read_from_its_start(log: Path) -> None:
    add(log, b"old line\nold\n")
    tail = LogTail(log)
    everything(tail)
    log.write_bytes(b"new\n")
    assert tail.read_new() == Chunk(0, ["new"])


def test_a_log_stays_within_its_quota_and_keeps_both_ends(log: Path) -> None:
    code = "import sys\nfor n in range(4000):\n    print(f'line {n:06}', flush=n % 50 == 0)"
    tail = LogTail(log, quota=8000)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    lines: list[str] = []
    with subprocess.Popen([sys.executable, "-c", code], stdout=descriptor) as child:
        os.close(descriptor)
        while child.poll() is None:
            lines += everything(tail)
    # Of what is written while it is shortened a little can be lost; not of what comes after.
    everything(tail)
    add(log, b"line 004000\n")
    lines += everything(tail)
    assert log.stat().st_size <= 8000
    kept, total = read_lines(log, 0, 10_000)
    assert kept[0] == "line 000000"
    assert kept[-1] == "line 004000"
    assert total == len(kept)
    assert [line for line in kept if "bytes dropped here: the log has reached its limit of 8000]" in line]
    # What the tail gave out is in order and has the end.
    numbers = [int(line[5:]) for line in lines if line.startswith("line ") and len(line) == 11]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 4000


def test_what_was_read_before_a_shortening_is_not_read_again(log: Path) -> None:
    add(log, b"".join(b"line %03d\n" % n for n in range(100)))
    tail = LogTail(log, quota=1000)
    assert everything(tail) == [f"line {n:03}" for n in range(100)]
    add(log, b"".join(b"line %03d\n" % n for n in range(100, 120)))
    # 900 bytes were read, 1,080 are there: the last 250 stay, of which the first 70 were read.
    assert everything(tail) == [f"line {n:03}" for n in range(100, 120)]
    assert "[330 bytes dropped here" in log.read_text()
    everything(tail)
    unread = LogTail(log.with_name("other"), quota=1000)
    add(unread.path, b"".join(b"line %03d\n" % n for n in range(120)))
    lines = everything(unread)
    assert lines[54:57] == [
        "line 054",
        "line 055"[:5],
        "[330 bytes dropped here: the log has reached its limit of 1000]",
    ]
    assert lines[-1] == "line 119"


LINES = [f"line {n}" for n in range(1, 3001)]


@pytest.mark.parametrize("scan", [7, 4096, 1 << 20])
@pytest.mark.parametrize(("end", "more"), [(b"\n", []), (b"\nthe last", ["the last"]), (b"\n\n", [""])])
@pytest.mark.parametrize(
    ("offset", "limit"), [(0, 10), (2995, 10), (3000, 5), (3001, 5), (1500, 0), (0, 10_000)]
)
def test_pages_of_a_log(
    log: Path,
    monkeypatch: pytest.MonkeyPatch,
    scan: int,
    end: bytes,
    more: list[str],
    offset: int,
    limit: int,
) -> None:
    monkeypatch.setattr(logs, "_SCAN_BYTES", scan)
    log.write_bytes("\n".join(LINES).encode() + end)
    lines = LINES + more
    assert read_lines(log, offset, limit) == (lines[offset : offset + limit], len(lines))


def test_a_big_log_is_paged_with_little_memory(log: Path) -> None:
    with log.open("wb") as file:
        for _ in range(32):
            file.write(b"0123456789abcde\n" * (1 << 16))
    tracemalloc.start()
    lines, total = read_lines(log, 2_000_000, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (lines, total) == (["0123456789abcde"] * 3, 32 << 16)
    assert peak < 8 << 20


def test_no_log_is_no_lines(log: Path) -> None:
    assert read_lines(log, 0, 10) == ([], 0)
    log.touch()
    assert read_lines(log, 0, 10) == ([], 0)
