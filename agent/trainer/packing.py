"""Rows put together into sequences of full length, each of which knows the rows that are in it.

TRL's own packing forgets them, and a user knows rows, not sequences.
"""

from typing import Any

import numpy
import pyarrow  # type: ignore[import-untyped]
from trl.data_utils import (
    _pack_bfd,
)  # what `pack_dataset` does with a batch: that one keeps no further column

from agent.trainer.tables import NUMBER

TOKENS = "input_ids"


def packed(rows: Any, length: int) -> Any:
    """Return tokenised ``rows`` (with their numbers) in sequences of at most ``length`` tokens, cut where longer.

    What is trained on is the same as from `pack_dataset` with "bfd_split". `NUMBER` becomes a list.
    """
    rows = rows.select_columns([TOKENS, "labels", NUMBER]).with_format("arrow")
    return rows.map(_pack, batched=True, fn_kwargs={"length": length}).with_format(None)


def _pack(rows: pyarrow.Table, length: int) -> pyarrow.Table:
    """Pack a batch of rows with each token's row beside it, of which one for each part of a row is kept."""
    columns = {name: _from_nought(rows[name].combine_chunks()) for name in (TOKENS, "labels")}
    tokens = columns[TOKENS]
    sizes = numpy.diff(tokens.offsets.to_numpy())
    of_token = pyarrow.array(numpy.repeat(rows[NUMBER].to_numpy(), sizes))
    columns[NUMBER] = type(tokens).from_arrays(tokens.offsets, of_token)
    made = _pack_bfd(pyarrow.table(columns), length, on_seq_length_overflow="split")
    parts = made["seq_lengths"].combine_chunks()
    ends = numpy.cumsum(parts.values.to_numpy())
    of_part = made[NUMBER].combine_chunks().values.to_numpy()[ends - 1]
    rows_of = type(parts).from_arrays(parts.offsets, pyarrow.array(of_part))
    return made.set_column(made.column_names.index(NUMBER), NUMBER, rows_of)


def _from_nought(column: pyarrow.Array) -> pyarrow.Array:
    """Return lists whose offsets begin at 0; those of a batch are a slice of all the lists on disk."""
    starts = column.offsets.to_numpy()
    return type(column).from_arrays(pyarrow.array(starts - starts[0], column.offsets.type), column.flatten())
