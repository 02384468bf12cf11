"""What the journal says and does where the disk takes nothing: full, or broken."""

import errno
import resource
import threading
from pathlib import Path

import anyio
import pytest

from agent.runtime.journal import BALLAST_BYTES, Journal, JournalFull, JournalRefused, Reader
from tests.support.broken_disk import SYNCS, WRITES, needs_filter, refuse
from tests.support.journals import begin_full, until_room, with_journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "journal.sqlite"


@needs_filter
@pytest.mark.parametrize("calls", [WRITES, SYNCS])
def test_a_full_quota_is_full_whether_a_write_or_a_sync_meets_it(path: Path, calls: tuple[str, ...]) -> None:
    async def use(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(7))
        await journal.read(lambda _: refuse(calls, errno.EDQUOT))
        with pytest.raises(JournalFull, match="a quota"):
            await journal.write(lambda tx: tx.append("agent", 1, b"x" * 5000))
        assert journal.full

    with_journal(path, use)


@needs_filter
@pytest.mark.parametrize("calls", [WRITES, SYNCS])
@pytest.mark.parametrize(
    ("error", "words"), [(errno.EIO, "Input/output error"), (errno.EROFS, "Read-only file system")]
)
def test_a_disk_that_refuses_writes_is_not_told_as_full(
    path: Path, calls: tuple[str, ...], error: int, words: str
) -> None:
    async def use(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(7))
        await journal.read(lambda _: refuse(calls, error))
        with pytest.raises(JournalRefused) as caught:
            await journal.write(lambda tx: tx.append("agent", 1, b"x" * 5000))
        assert f"the disk of {path} refuses writes: {words}" in str(caught.value)
        assert not journal.full
        names = await journal.read(lambda _: {one.name for one in path.parent.iterdir()})
        assert names == {path.name, path.name + "-wal", path.name + ".ballast"}

    with_journal(path, use)


@needs_filter
def test_what_lies_on_a_bad_block_is_refused_and_what_came_with_it_is_stored(path: Path) -> None:
    """The rest of the disk takes writes, so it is no quota; and only the last of these changes reaches the block."""
    wal = path.with_name(path.name + "-wal")

    async def use(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(7))
        size = await journal.read(lambda _: wal.stat().st_size)
        bad = size + 20 * 4096
        await journal.read(lambda _: refuse(["pwrite64"], errno.EIO, path=wal, beyond=bad))
        together = threading.Event()
        outcomes: list[object] = []

        async def small() -> None:
            outcomes.append(await journal.write(lambda tx: tx.append("agent", 1, b"x" * 100)))

        async def large() -> None:
            with pytest.raises(JournalRefused, match="Look into the system's log") as caught:
                await journal.write(lambda tx: tx.append("agent", 1, b"y" * 200_000))
            outcomes.append(type(caught.value))

        async with anyio.create_task_group() as group:
            group.start_soon(journal.read, lambda _: together.wait())
            group.start_soon(small)
            group.start_soon(large)
            await anyio.wait_all_tasks_blocked()
            together.set()
        assert outcomes == [1, JournalRefused]
        assert not journal.full
        assert [stream.last for stream in await journal.read(Reader.streams)] == [1]

    with_journal(path, use)


@needs_filter
def test_a_disk_that_breaks_while_it_is_full_is_told_as_broken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.runtime.journal.ROOM_EVERY", 0.0)

    async def use(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(7))
        await journal.read(lambda _: refuse([*WRITES, *SYNCS], errno.EIO))
        await begin_full(journal)
        with anyio.fail_after(30), pytest.raises(JournalRefused):
            while True:
                try:
                    await journal.write(lambda tx: tx.append("agent", 0, b"x"))
                except JournalFull:
                    continue

    with_journal(path, use)


@needs_filter
def test_an_open_of_a_journal_says_which_of_the_two_it_is(path: Path) -> None:
    told: list[BaseException] = []

    def look(error: int) -> None:
        refuse([*WRITES, *SYNCS], error)
        try:
            Journal.open(path)
        except (JournalFull, JournalRefused) as exc:
            told.append(exc)

    for error in (errno.EDQUOT, errno.EIO):
        thread = threading.Thread(target=look, args=(error,))
        thread.start()
        thread.join()
    assert [type(one) for one in told] == [JournalFull, JournalRefused]


@needs_filter
def test_under_a_full_quota_not_each_change_tries_whether_there_is_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.runtime.journal.ROOM_EVERY", 600.0)

    async def use(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(7))
        # What a try writes is refused as it is synced; SQLite syncs by the other call.
        await journal.read(lambda _: refuse(["fsync"], errno.EDQUOT))
        await begin_full(journal)
        for _ in range(2):
            await journal.write(lambda tx: tx.append("agent", 0, b"x"))
        # A try makes a file and removes it.
        before = await journal.read(lambda _: path.parent.stat().st_mtime_ns)
        for _ in range(20):
            await journal.write(lambda tx: tx.append("agent", 0, b"x"))
        assert await journal.read(lambda _: path.parent.stat().st_mtime_ns) == before
        assert journal.full

    with_journal(path, use)


def test_room_that_was_made_is_found_soon(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.runtime.journal.ROOM_EVERY", 0.3)

    async def use(journal: Journal) -> None:
        await journal.write(lambda tx: tx.set_epoch(7))
        ballast = path.with_name(path.name + ".ballast")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * BALLAST_BYTES, before[1]))
        try:
            await begin_full(journal)
            for _ in range(3):
                await journal.read(Reader.epoch)
            assert journal.full
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        await until_room(journal)
        assert ballast.stat().st_size == BALLAST_BYTES

    with_journal(path, use)
