"""Packed sequences: TRL's own, with the rows that are in them."""

import random

import pytest
from datasets import Dataset
from trl import pack_dataset

from agent.trainer.packing import packed

LENGTH = 16


@pytest.fixture
def rows() -> Dataset:
    """Tokens that say their row; every third row is longer than a sequence, and one is empty."""
    rng = random.Random(2)
    lengths = [0 if n == 7 else rng.randint(1, 12) + (20 if n % 3 == 0 else 0) for n in range(2500)]
    return Dataset.from_list(
        [
            {"input_ids": [100 + n] * length, "labels": [n] * length, "row": 100 + n}
            for n, length in enumerate(lengths)
        ]
    )


@pytest.mark.parametrize("streamed", [False, True], ids=["table", "stream"])
def test_packed_rows_are_trls_and_know_their_numbers(rows: Dataset, streamed: bool) -> None:
    # In several batches of `map`, of a table that does not begin at the first of what lies on disk.
    part = rows.skip(10)
    mine = list(packed(part.to_iterable_dataset() if streamed else part, LENGTH))
    theirs = list(pack_dataset(part.select_columns(["input_ids", "labels"]), LENGTH, "bfd_split"))
    assert [{name: one[name] for name in other} for one, other in zip(mine, theirs, strict=True)] == theirs
    for one in mine:
        assert set(one["row"]) == set(one["input_ids"])
        assert len(one["row"]) == len(one["seq_lengths"])
