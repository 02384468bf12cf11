import os
import sqlite3
import stat
from pathlib import Path

import pytest

from agent.runtime.journal import Journal, JournalInUse, JournalTooNew, Reader, Tx
from agent.runtime.journal_schema import MIGRATIONS, VERSION
from tests.support.journals import with_journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "journal.sqlite"


def test_what_is_committed_is_on_the_disk(path: Path) -> None:
    # A power cut cannot be tried here; these are the settings that SQLite promises it for.
    async def use(journal: Journal) -> None:
        promised = {"synchronous": 2, "journal_mode": "wal", "wal_autocheckpoint": 64}
        assert {
            name: await journal.read(lambda r, n=name: r._one(f"PRAGMA {n}")) for name in promised
        } == promised

    with_journal(path, use)


def test_the_files_are_for_the_owner_alone(path: Path) -> None:
    async def use(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_meta("key", "value"))
        files = sorted(path.parent.iterdir())
        assert [f.name for f in files] == ["journal.sqlite", "journal.sqlite-wal", "journal.sqlite.ballast"]
        assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o600}
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    with_journal(path, use)


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
