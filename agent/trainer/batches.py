"""Which rows come when, from any place in the data on.

A place is counted in rows, not in batches: so a resume needs no batch to be read in vain, and the size of a
batch can change between two steps without a row coming twice or never.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from agent.trainer.progress import Place

EPOCHS = 1000
"""Epochs in a row that may be left out whole after rewinds."""
Collate = Callable[[list[Any]], Any]


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


@dataclass
class Step:
    """What one optimizer step is made of."""

    epoch: int
    first: int
    """Place of its first row in the epoch's order."""
    end: int
    """Place after its last row."""
    batches: list[Any]
    """Its micro-batches."""
    sizes: list[int]
    """Rows of each."""
    rows: list[int] = field(default_factory=list)
    """Numbers of its rows in the data set; empty where that has none."""
    examples: list[Any] = field(default_factory=list)
    """Its rows themselves, where they cannot be fetched again."""

    @property
    def size(self) -> int:
        return sum(self.sizes)


@dataclass(frozen=True)
class Loading:
    """How rows are fetched (torch.utils.data.DataLoader)."""

    workers: int = 0
    prefetch: int | None = None
    pin: bool = False


class Feed:
    """The steps of a training, in order, from a place on."""

    dataset: Any

    def next(self, place: Place) -> Step | None:
        """Return the step that begins at ``place``, in micro-batches of its size; None where there are no rows.

        May be asked for another place, or another size, than the one before: that costs a new start.
        """
        raise NotImplementedError

    def again(self, step: Step, micro: int) -> None:
        """Cut a step anew, into micro-batches of ``micro`` rows."""
        examples = self._examples(step)
        step.sizes = _sizes(len(examples), micro)
        starts = itertools.accumulate(step.sizes, initial=0)
        step.batches = [
            self._collate(examples[at : at + size]) for at, size in zip(starts, step.sizes, strict=False)
        ]

    def share(self, place: Place, max_steps: int) -> float:
        """Return how much of its epoch is behind ``place``, from 0 to 1."""
        raise NotImplementedError

    def _examples(self, step: Step) -> list[Any]:
        raise NotImplementedError

    def _collate(self, examples: list[Any]) -> Any:
        raise NotImplementedError


class TableFeed(Feed):
    """Rows of a data set with a length, in an order made from seed and epoch."""

    def __init__(
        self,
        dataset: Any,
        collate: Collate,
        *,
        seed: int,
        batch_size: int,
        loading: Loading,
        by_length: ByLength | None = None,
        skipped: Callable[[int], Collection[int]] = lambda epoch: (),
    ) -> None:
        self.dataset = dataset
        self._collate_rows = collate
        self._seed = seed
        self._batches = -(-len(dataset) // batch_size)
        self._loading = loading
        self._by_length = by_length
        self._skipped = skipped
        self._steps: Iterator[Step] = iter(())
        self._at: tuple[int, int, int, int] | None = None
        """Place and sizes that the next of `_steps` begins at."""

    def __len__(self) -> int:
        """Micro-batches of an epoch at the job's own size; the steps of its epochs follow from that."""
        return self._batches

    def next(self, place: Place) -> Step | None:
        for _ in range(EPOCHS if len(self.dataset) else 0):
            wanted = (place.epoch, place.rows, place.micro, place.step_rows)
            if wanted != self._at:
                self._steps = self._run(place)
            step = next(self._steps, None)
            if step is not None:
                self._at = (step.epoch, step.end, place.micro, place.step_rows)
                return step
            self._at = None
            place.epoch, place.rows = place.epoch + 1, 0
        return None

    def share(self, place: Place, max_steps: int) -> float:
        return place.rows / max(1, len(self.dataset))

    def _run(self, place: Place) -> Iterator[Step]:
        """Yield the steps from ``place`` to the end of its epoch."""
        order, skipped = self._order(place.epoch), self._skipped(place.epoch)
        places = [at for at in range(place.rows, len(order)) if at not in skipped]
        steps = [places[at : at + place.step_rows] for at in range(0, len(places), place.step_rows)]
        cuts = [_sizes(len(step), place.micro) for step in steps]
        numbers = [order[at] for at in places]
        batches = iter(self._loader(numbers, [size for cut in cuts for size in cut], place.epoch))
        for at, (step, cut) in enumerate(zip(steps, cuts, strict=True)):
            last = at == len(steps) - 1
            yield Step(
                epoch=place.epoch,
                first=step[0],
                end=len(order) if last else step[-1] + 1,
                batches=[next(batches) for _ in cut],
                sizes=cut,
                rows=[order[row] for row in step],
            )

    def _loader(self, numbers: list[int], sizes: list[int], epoch: int) -> Any:
        starts = itertools.accumulate(sizes, initial=0)
        cuts = [numbers[at : at + size] for at, size in zip(starts, sizes, strict=False)]
        loading = self._loading
        return DataLoader(
            self.dataset,
            batch_sampler=cuts,
            collate_fn=self._collate_rows,
            num_workers=loading.workers,
            prefetch_factor=loading.prefetch if loading.workers else None,
            pin_memory=loading.pin,
            # Without one of its own it draws from the random numbers of training, and a resume would draw again.
            generator=torch.Generator().manual_seed(self._seed + epoch),
        )

    def _order(self, epoch: int) -> list[int]:
        if self._by_length is not None:
            self._by_length.set_epoch(epoch)
            return list(self._by_length)
        # The order of Trainer with accelerate's sampler.
        generator = torch.Generator().manual_seed(self._seed + epoch)
        return list(RandomSampler(self.dataset, generator=generator))

    def _examples(self, step: Step) -> list[Any]:
        fetch = getattr(self.dataset, "__getitems__", None)
        return list(fetch(step.rows)) if fetch else [self.dataset[row] for row in step.rows]

    def _collate(self, examples: list[Any]) -> Any:
        return self._collate_rows(examples)


class StreamFeed(Feed):
    """Rows of a data set without a length, read while training; the same rows in each pass over an epoch."""

    def __init__(
        self,
        dataset: Any,
        collate: Collate,
        *,
        skipped: Callable[[int], Collection[int]] = lambda epoch: (),
    ) -> None:
        self.dataset = dataset
        self._collate_rows = collate
        self._skipped = skipped
        self._rows: Iterator[tuple[int, Any]] = iter(())
        self._at: tuple[int, int] | None = None

    def next(self, place: Place) -> Step | None:
        for _ in range(EPOCHS):
            if (place.epoch, place.rows) != self._at:
                self._rows = self._read(place)
            taken = list(itertools.islice(self._rows, place.step_rows))
            if taken:
                step = Step(
                    epoch=place.epoch,
                    first=taken[0][0],
                    end=taken[-1][0] + 1,
                    batches=[],
                    sizes=[],
                    examples=[example for _, example in taken],
                )
                self.again(step, place.micro)
                self._at = (place.epoch, step.end)
                return step
            self._at = None
            place.stream_rows = max(place.stream_rows, place.rows)
            if place.rows == 0 and not self._skipped(place.epoch):
                return None
            place.epoch, place.rows = place.epoch + 1, 0
        return None

    def share(self, place: Place, max_steps: int) -> float:
        whole = max(1, place.stream_rows or max_steps * place.step_rows)
        # Its length was a guess: a pass that is longer is not over, and there is no evaluation at each of its steps.
        return place.rows / whole if place.rows <= whole else 1 - 1e-6

    def _read(self, place: Place) -> Iterator[tuple[int, Any]]:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(place.epoch)
        skipped = self._skipped(place.epoch)
        numbered = enumerate(self.dataset)
        return ((at, row) for at, row in itertools.islice(numbered, place.rows, None) if at not in skipped)

    def _examples(self, step: Step) -> list[Any]:
        return step.examples

    def _collate(self, examples: list[Any]) -> Any:
        return self._collate_rows(examples)


def _sizes(rows: int, micro: int) -> list[int]:
    """Return the rows of each micro-batch of a step: ``micro``, and in the last what is left."""
    return [min(micro, rows - at) for at in range(0, rows, micro)]
