import asyncio
import resource
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import anyio
import pytest

from agent.runtime.journal import (
    BALLAST_BYTES,
    Journal,
    JournalError,
    JournalFull,
    Reader,
    Tx,
)
from tests.support.journals import begin_full, until_room, with_journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "journal.sqlite"


def test_changes_queued_together_share_a_commit_and_one_that_fails_spoils_no_other(path: Path) -> None:
    def fail(tx: Tx) -> None:
        tx.put_job("bad", "queued", 0, b"half")
        raise LookupError("mine")

    async def use(journal: Journal) -> None:
        caught: list[LookupError] = []

        async def failing() -> None:
            try:
                await journal.write(fail)
            except LookupError as exc:
                caught.append(exc)

        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(journal.write, lambda tx, n=number: tx.put_job(f"j{n}", "queued", n, b""))
            group.start_soon(failing)
            for number in range(50, 100):
                group.start_soon(journal.write, lambda tx, n=number: tx.put_job(f"j{n}", "queued", n, b""))
        assert [str(exc) for exc in caught] == ["mine"]
        assert [job for job, _ in await journal.read(Reader.all_jobs)] == [f"j{n}" for n in range(100)]

    with_journal(path, use)


def test_a_journal_shrinks_once_its_backlog_is_acknowledged(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.runtime.journal.SHRINK_PAGES", 64)

    def fill(tx: Tx) -> None:
        tx.set_epoch(7)
        for _ in range(2000):
            tx.append("agent", 2, b"x" * 1000)

    async def use(journal: Journal) -> None:
        await journal.write(fill)
        await journal.write(lambda tx: tx.trim(7, "agent", 2, 2000))

    with_journal(path, use)
    assert path.stat().st_size < 100 * 4096


WRITER = """
import sys, anyio
from pathlib import Path
from agent.runtime.journal import Journal

async def main():
    journal = Journal.open(Path(sys.argv[1]))
    await journal.write(lambda tx: tx.set_epoch(7))
    async def produce(lane):
        while True:
            seq = await journal.write(lambda tx: tx.append("agent", lane, b"x" * 300))
            print(lane, seq, flush=True)
    async with anyio.create_task_group() as group:
        for lane in range(3):
            group.start_soon(produce, lane)

anyio.run(main)
"""


def killed_writer(path: Path, lines: int) -> dict[int, int]:
    """Kill a process in the middle of its writes; return the last seq it was told of for each lane."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        told = [child.stdout.readline() for _ in range(lines)]
        child.kill()
        # Half a line can be left in the pipe.
        told += [line for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    last: dict[int, int] = {}
    for line in told:
        lane, seq = map(int, line.split())
        last[lane] = seq
    return last


def stored(path: Path) -> dict[int, int]:
    """Return the last seq of each lane after a reopening; the records must be whole and dense."""
    result: dict[int, int] = {}

    async def look(journal: Journal) -> None:
        assert journal.was_corrupt is None
        for stream in await journal.read(Reader.streams):
            rows = await journal.read(lambda r, s=stream: r.records(7, s.scope, s.lane, 0, 1 << 30, 1 << 30))
            assert rows == [(seq, b"x" * 300) for seq in range(1, stream.last + 1)]
            result[stream.lane] = stream.last

    with_journal(path, look)
    return result


@pytest.mark.parametrize("lines", [1, 300])
def test_every_acknowledged_write_survives_a_kill(path: Path, lines: int) -> None:
    told = killed_writer(path, lines)
    found = stored(path)
    assert told
    for lane, seq in told.items():
        # One change a lane can be on its way: committed, but not yet told.
        assert seq <= found[lane] <= seq + 1


def cut_copies(path: Path, folder: Path) -> None:
    """Copy a journal in use 16 times, each with a longer part of its log."""
    wal = path.with_name("journal.sqlite-wal").read_bytes()
    for number in range(16):
        copy = folder / f"cut-{number:02}" / "journal.sqlite"
        copy.parent.mkdir()
        copy.write_bytes(path.read_bytes())
        copy.with_name("journal.sqlite-wal").write_bytes(wal[: len(wal) * number // 15])


def test_a_cut_log_leaves_a_clean_prefix(path: Path, tmp_path: Path) -> None:
    async def begin(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(7))

    async def fill(journal: Journal) -> None:
        for _ in range(12):
            await journal.write(lambda tx: tx.append("agent", 0, b"x" * 300))
        cut_copies(path, tmp_path)

    with_journal(path, begin)
    with_journal(path, fill)
    lasts = [stored(folder / "journal.sqlite").get(0, 0) for folder in sorted(tmp_path.glob("cut-*"))]
    assert lasts == sorted(lasts)
    assert (lasts[0], lasts[-1]) == (0, 12)
    assert len(set(lasts)) > 6


FULL_DISK = """
import os, sys, anyio
from pathlib import Path
from agent.runtime.journal import Journal, JournalFull

async def main():
    home = Path(sys.argv[1])
    journal = Journal.open(home / "journal.sqlite")
    await journal.write(lambda tx: tx.set_epoch(7))
    hog = (home / "hog").open("wb")
    stored = 0
    try:
        while True:
            if stored == 100:
                # The rest of the disk goes to somebody else.
                hog.write(bytes(os.statvfs(home).f_bavail * os.statvfs(home).f_frsize - (256 << 10)))
                hog.flush()
            stored = await journal.write(lambda tx: tx.append("j/1", 1, b"m" * 2000))
    except JournalFull as exc:
        assert "no space left" in str(exc), exc
    assert journal.full and stored > 100, stored
    status = await journal.write(lambda tx: tx.append("agent", 0, b"disk full"))
    await journal.write(lambda tx: tx.put_job("j", "paused", 0, b"body"))
    rows = await journal.read(lambda r: r.records(7, "j/1", 1, 0, 1 << 30, 1 << 30))
    assert [seq for seq, _ in rows] == list(range(1, stored + 1))
    for acked in range(0, stored, 50):
        await journal.write(lambda tx: tx.trim(7, "j/1", 1, acked))
    await journal.write(lambda tx: tx.trim(7, "j/1", 1, stored))
    assert await journal.read(lambda r: r.backlog()) == {0: (1, 9), 1: (0, 0)}
    hog.truncate(0)
    # It looks after each change; the second question waits for that.
    for _ in range(2):
        await journal.write(lambda tx: tx.set_meta("any", "change"))
    assert not journal.full and (home / "journal.sqlite.ballast").stat().st_size == 512 << 10
    assert await journal.write(lambda tx: tx.append("j/1", 1, b"m")) == stored + 1
    await journal.close()
    print("fine", status)

anyio.run(main)
"""


def test_on_a_full_disk_deletes_and_status_still_work(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=6m tmpfs "$1" || exit 77; exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, FULL_DISK]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("needs unshare, to make a small disk")
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("needs the right to mount in a namespace of its own")
    assert done.stdout == "fine 1\n", done.stderr


@pytest.mark.parametrize("lane", [0, 1])
def test_where_an_append_finds_no_room_a_delete_beside_it_is_done(path: Path, lane: int) -> None:
    def fill(tx: Tx) -> None:
        tx.set_epoch(7)
        for _ in range(50):
            tx.append("agent", 1, b"x" * 4000)

    async def use(journal: Journal) -> None:
        await journal.write(fill)
        pages = await journal.read(lambda r: r._one("PRAGMA page_count"))
        await journal.read(lambda r: r._one(f"PRAGMA max_page_count = {pages}"))
        outcomes: list[object] = []

        async def grow() -> None:
            with pytest.raises(JournalFull, match="no space left") as caught:
                await journal.write(lambda tx: tx.append("agent", lane, b"y" * 100_000))
            outcomes.append(type(caught.value))

        async def shrink() -> None:
            outcomes.append(await journal.write(lambda tx: tx.trim(7, "agent", 1, 50)))

        together = threading.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(journal.read, lambda r: together.wait())
            group.start_soon(grow)
            group.start_soon(shrink)
            await anyio.wait_all_tasks_blocked()
            together.set()
        assert outcomes == [JournalFull, 50]
        assert [stream.last for stream in await journal.read(Reader.streams)] == [50]

    with_journal(path, use)


def test_a_limit_that_is_no_full_disk_is_waited_for_as_one(path: Path) -> None:
    """A limit on the size of files stands for a quota, which a test cannot set: SQLite calls both an I/O error."""

    async def use(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(7))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        try:
            with pytest.raises(JournalFull, match="a quota"):
                for _ in range(100):
                    await journal.write(lambda tx: tx.append("agent", 1, b"x" * 50_000))
            stored = (await journal.read(Reader.streams))[0].last
            was_full = journal.full
            with pytest.raises(JournalFull):
                await journal.write(lambda tx: tx.append("agent", 1, b"x" * 50_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert was_full
        await until_room(journal)
        assert await journal.write(lambda tx: tx.append("agent", 1, b"x" * 50_000)) == stored + 1

    with_journal(path, use)
    assert path.with_name(path.name + ".ballast").stat().st_size == BALLAST_BYTES


def test_room_is_known_only_by_writing_it_and_an_attempt_leaves_nothing(path: Path) -> None:
    async def use(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(7))
        ballast = path.with_name(path.name + ".ballast")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * BALLAST_BYTES, before[1]))
        try:
            await begin_full(journal)
            for _ in range(3):
                await journal.read(Reader.epoch)
            # On the journal's thread, between two attempts.
            names = await journal.read(lambda _: {one.name for one in path.parent.iterdir()})
            assert names == {path.name, path.name + "-wal"}
            assert journal.full
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        await until_room(journal)
        assert ballast.stat().st_size == BALLAST_BYTES

    with_journal(path, use)


def test_what_a_question_raises_is_raised_to_who_asked(path: Path) -> None:
    async def use(journal: Journal) -> None:
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            await journal.read(lambda r: r._one("SELECT 1 FROM nowhere"))
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            await journal.write(lambda tx: tx._one("SELECT 1 FROM nowhere"))
        assert await journal.write(Tx.next_boot) == 1

    with_journal(path, use)


def test_a_change_is_made_also_when_nobody_waits_for_it_any_more(path: Path) -> None:
    async def use(journal: Journal) -> None:
        complaints: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        with anyio.CancelScope() as scope:
            scope.cancel()
            await journal.write(lambda tx: tx.set_meta("asked", "yes"))
        assert await journal.read(lambda r: r.get_meta("asked")) == "yes"
        assert complaints == []

    with_journal(path, use)


def test_a_closed_journal_says_so(path: Path) -> None:
    async def main() -> None:
        journal = Journal.open(path)
        pending = []

        async def put() -> None:
            await journal.write(lambda tx: tx.set_meta("last", "in"))
            pending.append("told")

        async with anyio.create_task_group() as group:
            group.start_soon(put)
            await anyio.lowlevel.checkpoint()
            group.start_soon(journal.close)
        assert pending == ["told"]
        with pytest.raises(JournalError, match="is closed"):
            await journal.write(Tx.next_boot)
        await journal.close()

    anyio.run(main)
