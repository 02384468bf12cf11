import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from agent.runtime.journal import (
    Journal,
    JournalError,
    JournalFull,
    JournalInUse,
    JournalTooNew,
    Reader,
    Stream,
    Tx,
)
from agent.runtime.journal_schema import MIGRATIONS, VERSION

HIGH_EPOCH = (1 << 64) - 3


def with_journal(path: Path, use: Callable[[Journal], Awaitable[None]]) -> None:
    async def main() -> None:
        journal = Journal.open(path)
        try:
            await use(journal)
        finally:
            await journal.close()

    anyio.run(main)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "journal.sqlite"


def test_jobs_come_back_in_order_after_a_restart(path: Path) -> None:
    async def first(journal: Journal) -> None:
        await journal.write(lambda tx: tx.put_job("late", "queued", 2, b"L"))
        await journal.write(lambda tx: tx.put_job("early", "queued", 1, b"E"))
        await journal.write(lambda tx: tx.put_job("gone", "queued", 0, b"G"))
        await journal.write(lambda tx: tx.put_job("late", "running", 2, b"L2"))
        await journal.write(lambda tx: tx.delete_job("gone"))

    async def second(journal: Journal) -> None:
        assert await journal.read(Reader.all_jobs) == [("early", b"E"), ("late", b"L2")]
        assert await journal.read(lambda r: r.get_job("late")) == b"L2"
        assert await journal.read(lambda r: r.get_job("gone")) is None

    with_journal(path, first)
    with_journal(path, second)


def test_what_is_committed_is_on_the_disk(path: Path) -> None:
    # A power cut cannot be tried here; these are the settings that SQLite promises it for.
    async def use(journal: Journal) -> None:
        promised = {"synchronous": 2, "journal_mode": "wal", "wal_autocheckpoint": 64}
        assert {
            name: await journal.read(lambda r, n=name: r._one(f"PRAGMA {n}")) for name in promised
        } == promised

    with_journal(path, use)


def test_each_start_is_counted(path: Path) -> None:
    boots: list[int] = []

    async def start(journal: Journal) -> None:
        boots.append(await journal.write(Tx.next_boot))

    for _ in range(3):
        with_journal(path, start)
    assert boots == [1, 2, 3]


def test_the_files_are_for_the_owner_alone(path: Path) -> None:
    async def use(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_meta("key", "value"))
        files = sorted(path.parent.iterdir())
        assert [f.name for f in files] == ["journal.sqlite", "journal.sqlite-wal", "journal.sqlite.ballast"]
        assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o600}
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    with_journal(path, use)


def test_changes_queued_together_share_a_commit_and_one_that_fails_spoils_no_other(path: Path) -> None:
    def fail(tx: Tx) -> None:
        tx.put_job("bad", "queued", 0, b"half")
        raise LookupError("mine")

    async def use(journal: Journal) -> None:
        before = await journal.read(lambda r: r.get_meta("none"))
        assert before is None
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


def test_secrets_leave_no_trace_in_the_files(path: Path) -> None:
    token = "wak_" + "s3cr3t" * 8

    def traces() -> list[str]:
        return [f.name for f in path.parent.iterdir() if token.encode() in f.read_bytes()]

    async def use(journal: Journal) -> None:
        await journal.write(lambda tx: tx.put_secret("j1", "token", token))
        await journal.write(lambda tx: tx.put_secret("j2", "token", "other"))
        assert await journal.read(lambda r: r.get_secret("j1", "token")) == token
        assert traces()
        await journal.write(lambda tx: tx.scrub_secrets("j1"))
        assert await journal.read(lambda r: r.get_secret("j1", "token")) is None
        assert await journal.read(lambda r: r.get_secret("j2", "token")) == "other"
        assert traces() == []

    with_journal(path, use)


def test_the_highest_event_of_an_attempt_is_remembered(path: Path) -> None:
    async def use(journal: Journal) -> None:
        assert await journal.read(lambda r: r.events_seen("j1", 1)) == 0
        for number in (1, 5, 3):
            await journal.write(lambda tx, n=number: tx.mark_event("j1", 1, n))
        assert await journal.read(lambda r: r.events_seen("j1", 1)) == 5
        assert await journal.read(lambda r: r.events_seen("j1", 2)) == 0

    with_journal(path, use)


def test_a_command_is_begun_once(path: Path) -> None:
    async def use(journal: Journal) -> None:
        assert await journal.write(lambda tx: tx.command_begin("c1")) is None
        assert await journal.write(lambda tx: tx.command_begin("c1")) == b""
        await journal.write(lambda tx: tx.command_end("c1", b"done"))
        assert await journal.write(lambda tx: tx.command_begin("c1")) == b"done"

    with_journal(path, use)


def test_the_ledger_forgets_the_oldest_commands(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.runtime.journal_tables.MAX_COMMANDS", 3)

    async def use(journal: Journal) -> None:
        for number in range(5):
            await journal.write(lambda tx, n=number: tx.command_begin(f"c{n}"))
        begun = [await journal.write(lambda tx, n=n: tx.command_begin(f"c{n}")) for n in (4, 3, 2)]
        assert begun == [b"", b"", b""]
        assert await journal.write(lambda tx: tx.command_begin("c0")) is None

    with_journal(path, use)


def test_records_are_numbered_densely_and_deleted_only_on_ack(path: Path) -> None:
    async def use(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(HIGH_EPOCH))
        seqs = [await journal.write(lambda tx, n=n: tx.append("j1/1", 1, b"r%d" % n)) for n in range(1, 6)]
        assert seqs == [1, 2, 3, 4, 5]
        assert await journal.write(lambda tx: tx.append("agent", 0, b"status")) == 1
        assert await journal.read(Reader.streams) == [
            Stream(HIGH_EPOCH, "j1/1", 1, 1, 5),
            Stream(HIGH_EPOCH, "agent", 0, 1, 1),
        ]
        assert await journal.read(Reader.backlog) == {0: (1, 6), 1: (5, 10)}
        assert await journal.write(lambda tx: tx.trim(HIGH_EPOCH, "j1/1", 1, 3)) == 3
        assert await journal.write(lambda tx: tx.trim(HIGH_EPOCH, "j1/1", 1, 2)) == 0
        assert await journal.read(lambda r: r.records(HIGH_EPOCH, "j1/1", 1, 0, 99, 9999)) == [
            (4, b"r4"),
            (5, b"r5"),
        ]
        assert await journal.write(lambda tx: tx.trim(HIGH_EPOCH, "j1/1", 1, 5)) == 2
        assert Stream(HIGH_EPOCH, "j1/1", 1, 6, 5) in await journal.read(Reader.streams)
        assert await journal.write(lambda tx: tx.append("j1/1", 1, b"r6")) == 6
        assert await journal.read(Reader.backlog) == {0: (1, 6), 1: (1, 2)}

    with_journal(path, use)


def test_records_come_in_portions(path: Path) -> None:
    async def use(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(7))
        for _ in range(5):
            await journal.write(lambda tx: tx.append("agent", 2, b"x" * 100))

        async def seqs(after: int, limit: int, size: int) -> list[int]:
            rows = await journal.read(lambda r: r.records(7, "agent", 2, after, limit, size))
            return [seq for seq, _ in rows]

        assert await seqs(0, 2, 9999) == [1, 2]
        assert await seqs(2, 99, 250) == [3, 4]
        assert await seqs(4, 99, 1) == [5]
        assert await seqs(5, 99, 9999) == []

    with_journal(path, use)


def test_an_ack_beyond_the_end_is_refused(path: Path) -> None:
    async def use(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(7))
        await journal.write(lambda tx: tx.append("agent", 0, b"x"))
        with pytest.raises(JournalError, match="ends at 1, but 2 is acknowledged"):
            await journal.write(lambda tx: tx.trim(7, "agent", 0, 2))
        assert await journal.write(lambda tx: tx.trim(8, "agent", 0, 2)) == 0

    with_journal(path, use)


def test_a_new_epoch_starts_at_one_and_keeps_the_old_records(path: Path) -> None:
    async def use(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(7))
        await journal.write(lambda tx: tx.append("agent", 0, b"old"))
        await journal.write(lambda tx: tx.append("agent", 1, b"acked"))
        await journal.write(lambda tx: tx.trim(7, "agent", 1, 1))
        await journal.write(lambda tx: tx.set_epoch(8))
        assert await journal.write(lambda tx: tx.append("agent", 0, b"new")) == 1
        assert await journal.read(Reader.streams) == [
            Stream(7, "agent", 0, 1, 1),
            Stream(8, "agent", 0, 1, 1),
        ]
        await journal.write(lambda tx: tx.trim(7, "agent", 0, 1))
        assert await journal.read(Reader.streams) == [Stream(8, "agent", 0, 1, 1)]

    with_journal(path, use)


def test_dropped_and_damaged_records_read_as_gaps(path: Path) -> None:
    async def fill(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(7))
        for n in range(1, 7):
            await journal.write(lambda tx, n=n: tx.append("agent", 2, b"line %d" % n))
        assert await journal.write(lambda tx: tx.drop(7, "agent", 2, 2)) == 2
        assert await journal.read(Reader.backlog) == {2: (4, 24)}

    async def look(journal: Journal) -> None:
        rows = await journal.read(lambda r: r.records(7, "agent", 2, 0, 99, 9999))
        assert rows == [(1, None), (2, None), (3, b"line 3"), (4, None), (5, b"line 5"), (6, None)]
        assert await journal.read(lambda r: r.records(7, "agent", 2, 0, 1, 9999)) == [(1, None)]
        assert await journal.write(lambda tx: tx.trim(7, "agent", 2, 6)) == 3

    with_journal(path, fill)
    with sqlite3.connect(path) as other:
        other.execute(
            "UPDATE records SET body = CAST('line 8' AS BLOB) WHERE crc = ?", (zlib.crc32(b"line 4"),)
        )
        other.execute("DELETE FROM records WHERE crc = ?", (zlib.crc32(b"line 6"),))
    other.close()
    with_journal(path, look)


def test_points_of_the_newest_attempt_win(path: Path) -> None:
    async def use(journal: Journal) -> None:
        for attempt, step, body in [
            (1, 1, b"a"),
            (1, 2, b"b"),
            (1, 2, b"b-eval"),
            (1, 3, b"c"),
            (2, 2, b"B"),
            (2, 2, b"B-eval"),
        ]:
            await journal.write(lambda tx, a=attempt, s=step, b=body: tx.put_point("j1", a, s, b))
        points = await journal.read(lambda r: r.points("j1", 0, 99))
        assert points == [(1, 1, b"a"), (2, 2, b"B"), (2, 2, b"B-eval"), (3, 1, b"c")]
        # A limit counts steps, so that a page never cuts one in two.
        assert [p.step for p in await journal.read(lambda r: r.points("j1", 1, 1))] == [2, 2]
        await journal.write(lambda tx: tx.delete_job("j1"))
        assert await journal.read(lambda r: r.points("j1", 0, 99)) == []

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


def test_a_second_agent_is_refused(path: Path) -> None:
    async def use(journal: Journal) -> None:
        with pytest.raises(JournalInUse, match="in use by another training agent"):
            Journal.open(path)

    with_journal(path, use)


def test_a_journal_of_a_later_version_is_refused_and_left_alone(path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as other:
        other.execute(f"PRAGMA user_version = {VERSION + 1}")
    other.close()
    with pytest.raises(JournalTooNew, match=f"schema version {VERSION + 1} .* knows up to {VERSION}"):
        Journal.open(path)
    assert [f.name for f in path.parent.iterdir()] == ["journal.sqlite"]


def test_a_later_schema_is_reached_step_by_step(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def put(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_meta("kept", "yes"))

    async def look(journal: Journal) -> None:
        assert await journal.read(lambda r: r.get_meta("kept")) == "yes"
        assert await journal.read(lambda r: r.get_meta("added")) == "also"

    with_journal(path, put)
    more = (*MIGRATIONS, ("INSERT INTO meta VALUES ('added', 'also')",))
    monkeypatch.setattr("agent.runtime.journal_schema.MIGRATIONS", more)
    monkeypatch.setattr("agent.runtime.journal_schema.VERSION", len(more))
    with_journal(path, look)
    with_journal(path, look)


@pytest.mark.parametrize("how", ["garbage", "pages"])
def test_a_damaged_journal_is_moved_aside_and_a_fresh_one_made(path: Path, how: str) -> None:
    async def fill(journal: Journal) -> None:
        await journal.write(lambda tx: [tx.put_job(f"j{n}", "queued", n, b"x" * 500) for n in range(200)])

    async def look(journal: Journal) -> None:
        assert journal.was_corrupt == path.with_name("journal.sqlite.corrupt-2")
        assert journal.was_corrupt.exists()
        assert await journal.read(Reader.all_jobs) == []
        assert await journal.write(Tx.next_boot) == 1

    with_journal(path, fill)
    path.with_name("journal.sqlite.corrupt-1").write_text("of an earlier time")
    data = bytearray(path.read_bytes())
    if how == "garbage":
        data[:] = os.urandom(len(data))
    else:
        data[3 * 4096 : 12 * 4096] = bytes(9 * 4096)
    path.write_bytes(data)
    path.with_name("journal.sqlite-wal").write_bytes(b"of a killed agent")
    with_journal(path, look)


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
