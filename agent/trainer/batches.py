"""The order of rows, which must be the same after a resume in any epoch."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class ByLength(Sampler[int]):  # type: ignore[misc]
    """Rows of like length together, in an order that depends on seed and epoch alone.

    Trainer's own sampler draws from the global random state, which is another one when an epoch is resumed.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return iter(get_length_grouped_indices(self._lengths, self._batch_size, generator=generator))
