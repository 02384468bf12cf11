"""Rows that are read while training: each is checked as it comes, and no table of them is kept.

An order of rows is made from the seed and the epoch alone, so a resume finds its place by reading up to it.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import msgspec
import numpy
import torch.utils.data
import xxhash
from datasets.iterable_dataset import ExamplesIterable

from agent.trainer.errors import TrainerError
from agent.trainer.readers import unreadable
from agent.trainer.tables import NUMBER, Reading
from protocol.failures import FailureReason
from protocol.jobspec import DataFormat

BUFFER = 1024
"""Rows that are held to be shuffled: each leaves it in favour of the next that is read."""
HEAD = 256
"""Rows that are looked at before training: they tell the format, and make the fingerprint."""
HELD_OUT_AMONG = 20_000
"""Held-out rows are chosen among so many of the first ones: evaluating must end, where the rows may not."""
REMEMBERED = 1 << 17
"""Last rows of a pass whose digests are kept: a checkpoint may be older than what has been read ahead."""


def holds_out(fraction: float, seed: int) -> Callable[[int], bool]:
    """Return what tells by its place (0, 1, ...) whether a row is held out; the same for the same seed."""

    def held_out(place: int) -> bool:
        if place >= HELD_OUT_AMONG:
            return False
        drawn: int = xxhash.xxh3_64_intdigest(place.to_bytes(8, "little"), seed=seed)
        return drawn < fraction * 2**64

    return held_out


class Source:
    """A data set that can be read from its beginning as often as there are epochs."""

    def __init__(
        self,
        read: Reading,
        source: str,
        folder: Path,
        *,
        limit: int | None,
        seed: int,
        held_out: Callable[[int], bool],
        note: Callable[[str, str], None],
    ) -> None:
        self.epoch = 0
        self.peeking = True
        """Rows come in their own order, and fast: TRL reads the first one several times to learn the columns."""
        self.accepts_changes = False
        """The user has said that a checkpoint may be gone on from although rows have changed."""
        self.format = DataFormat.AUTO
        self._read, self._source, self._folder, self._limit = read, source, folder, limit
        self._seed, self._held_out, self._note = seed, held_out, note
        self._told: set[str] = set()

    def head(self) -> list[dict[str, Any]]:
        """Return the first rows."""
        return list(islice(self._checked(), HEAD))

    def rows(self) -> datasets.IterableDataset:
        """Return the rows as TRL takes them."""
        return datasets.IterableDataset(ExamplesIterable(lambda: enumerate(self), {}))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield one epoch's rows in its order."""
        if self.peeking:
            yield from self._checked()
            return
        generator = numpy.random.default_rng([self._seed, self.epoch])
        buffer: list[dict[str, Any]] = []
        for row in self._checked():
            if len(buffer) < BUFFER:
                buffer.append(row)
                continue
            place = int(generator.integers(BUFFER))
            yield buffer[place]
            buffer[place] = row
        for place in generator.permutation(len(buffer)):
            yield buffer[place]

    def _checked(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that are trained on, in their own order. Raises TrainerError at the first bad one."""
        checker, count = self._read.checker(self._source), 0
        self._folder.mkdir(parents=True, exist_ok=True)
        rows = self._read.rows(self._source, self._folder, streaming=True)
        for place, row in enumerate(islice(rows, self._limit)):
            if self._held_out(place):
                continue
            value = checker.check_now(row)
            if value is not None:
                count += 1
                self.format = checker.format
                value[NUMBER] = row.number
                yield value
            else:
                checker.empty.clear()
                self._tell("empty", "warning", f"{row.where} is empty text; such rows are left out.")
            if checker.dropped:
                names = ", ".join(sorted(map(str, checker.dropped)))
                unused = f"columns that {checker.format} data has no use for are left out: {names}."
                self._tell("dropped", "info", unused)
        if checker.seen and not count:
            raise unreadable(self._source, f"none of its {checker.seen} rows holds anything to train on.")
        if not checker.seen:
            raise unreadable(self._source, "the data set is empty: it has no rows to train on.")

    def found_changed(self, epoch: int, rows: int) -> None:
        """Say that rows which have been trained on are others now, or raise if nobody has said that they may be."""
        changed = f"the first {rows} rows of epoch {epoch} are not those that were trained on before the checkpoint."
        if not self.accepts_changes:
            raise TrainerError(
                FailureReason.CHECKPOINT,
                f"{self._source}: {changed} Put the old data back, or resume with accept_changes "
                "(`training-agent retry JOB --accept-changes`).",
            )
        self._tell("changed", "warning", f"{changed} That is meant, so training goes on behind them.")

    def _tell(self, what: str, level: str, sentence: str) -> None:
        """Say once what of the data set is not used."""
        if what not in self._told:
            self._told.add(what)
            self._note(level, f"{self._source}, {sentence}")


class Stream(torch.utils.data.IterableDataset):  # type: ignore[misc]
    """The rows of a `Source`, tokenised, with a digest that grows over the rows of a pass."""

    def __init__(self, rows: datasets.IterableDataset, source: Source) -> None:
        self._rows, self._source = rows, source
        self._digests: deque[bytes] = deque(maxlen=REMEMBERED)
        self._count = 0
        self._expected: tuple[int, int, str] | None = None
        source.peeking = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self._source.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._digests.clear()
        self._count = 0
        hasher = xxhash.xxh3_128(self._source.epoch.to_bytes(8, "little"))
        encode = msgspec.msgpack.Encoder().encode
        for row in self._rows:
            hasher.update(encode([row[name] for name in sorted(row) if name.endswith("_ids")]))
            self._digests.append(hasher.digest())
            self._count += 1
            self._compare(hasher)
            yield row
        if self._expected is not None and self._expected[0] == self._source.epoch:
            self._count = max(self._count, self._expected[1])
            self._compare(hasher)

    def expect(self, epoch: int, rows: int, digest: str) -> None:
        """Raise TrainerError while reading if the first ``rows`` rows of that epoch do not hash to ``digest``."""
        self._expected = (epoch, rows, digest)

    def _compare(self, hasher: Any) -> None:
        """Hold what has been read against what is expected, at the row that this is known for."""
        if self._expected is None or self._expected[:2] != (self._source.epoch, self._count):
            return
        (epoch, rows, digest), self._expected = self._expected, None
        if hasher.hexdigest() != digest:
            self._source.found_changed(epoch, rows)

    def digest_at(self, rows: int) -> str:
        """Return the digest of the first ``rows`` rows of this pass; empty if that cannot be told any more.

        A resume that has passed over as many rows must find the same one, or the data has changed.
        """
        back = self._count - rows
        if rows == 0 or not 0 <= back < len(self._digests):
            return ""
        return self._digests[-1 - back].hex()
