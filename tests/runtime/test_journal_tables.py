import sqlite3
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import pytest

from agent.runtime.journal import Journal, JournalError, Reader, Stream, Tx
from tests.support.journals import with_journal

HIGH_EPOCH = (1 << 64) - 3


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


def test_each_start_is_counted(path: Path) -> None:
    boots: list[int] = []

    async def start(journal: Journal) -> None:
        boots.append(await journal.write(Tx.next_boot))

    for _ in range(3):
        with_journal(path, start)
    assert boots == [1, 2, 3]


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
            await journal.write(lambda tx, a=attempt, s=step, b=body: tx.put_points([("j1", a, s, b)]))
        points = await journal.read(lambda r: r.points("j1", 0, 99))
        assert points == [(1, 1, b"a"), (2, 2, b"B"), (2, 2, b"B-eval"), (3, 1, b"c")]
        # A limit counts steps, so that a page never cuts one in two.
        assert [p.step for p in await journal.read(lambda r: r.points("j1", 1, 1))] == [2, 2]
        await journal.write(lambda tx: tx.delete_job("j1"))
        assert await journal.read(lambda r: r.points("j1", 0, 99)) == []

    with_journal(path, use)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_stored_together_is_stored_as_one_by_one(path: Path, seed: int) -> None:
    drawn = Random(seed)
    rows = [("j1", drawn.randint(1, 2), drawn.randint(1, 40), str(number).encode()) for number in range(150)]
    rows += [("j1", 3, step, f"{step}{part}".encode()) for step in range(100, 180) for part in "ab"]
    bodies = [bytes(drawn.randbytes(9)) for _ in range(200)]

    async def together(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(7))
        half = len(rows) // 2
        await journal.write(lambda tx: tx.put_points(rows[:half]))
        await journal.write(lambda tx: tx.put_points(rows[half:]))
        await journal.write(lambda tx: tx.append_all("j1", 1, bodies))

    async def alone(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(7))
        for row in rows:
            await journal.write(lambda tx, row=row: tx.put_points([row]))
        for body in bodies:
            await journal.write(lambda tx, body=body: tx.append("j1", 1, body))

    def content(change: Callable[[Journal], Awaitable[None]], file: Path) -> list[object]:
        with_journal(file, change)
        with sqlite3.connect(file) as db:
            tables = [
                db.execute(sql).fetchall()
                for sql in ("SELECT * FROM points", "SELECT * FROM records", "SELECT * FROM streams")
            ]
        db.close()
        return tables

    assert content(together, path) == content(alone, path.with_name("other.sqlite"))
