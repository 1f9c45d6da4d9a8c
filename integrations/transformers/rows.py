"""Which dataset rows the batches are that a Trainer works on.

A dataset row's number travels from the dataset through the collator, in worker processes too, and is taken out of the
batch where accelerate moves it to the training device: in the order in which the loader yields, before the Trainer
sees it. Batches, their order and the random numbers stay as they are.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

__all__ = ["RowTape"]

ROWS = "dualhook_rows"  # what they are called in a batch on its way
_NUMBERS = itertools.count()
_TAPES: weakref.WeakValueDictionary[int, RowTape] = weakref.WeakValueDictionary()


class RowTape:
    """The rows of the batches that a loader has yielded and nobody has asked for yet, oldest first.

    Of each batch: rows [b], and where in them the samples begin [b]. Of sequences that a collator lays end to end every
    token is a sample.
    """

    def __init__(self, loader: Any) -> None:
        number = next(_NUMBERS)
        _TAPES[number] = self
        self._waiting: deque[tuple[Tensor, Tensor]] = deque()
        self._arrived = 0  # samples of a stream, which have no rows but the order of their arrival
        self._loader: DataLoader[Any] = getattr(loader, "base_dataloader", loader)
        self._before = {"dataset": self._loader.dataset, "collate_fn": self._loader.collate_fn}
        is_stream = isinstance(self._loader.dataset, IterableDataset)
        is_batched = self._loader.batch_size is not None or self._loader.batch_sampler is not None
        # DataLoader forbids setting its dataset by attribute after its construction
        self._loader.__dict__.update(
            dataset=self._loader.dataset if is_stream else _Numbered(self._loader.dataset),
            collate_fn=_Collator(self._loader.collate_fn, number, is_stream=is_stream, is_batched=is_batched),
        )

    def restore(self) -> None:
        """Give the loader back as it was."""
        self._loader.__dict__.update(self._before)

    def next(self) -> tuple[Tensor, Tensor] | None:
        """The rows of the batch that comes next, and the positions in them; None if they are not known."""
        return self._waiting.popleft() if self._waiting else None

    def drop_but(self, count: int) -> None:
        """Forget all but the newest batches: the others were skipped."""
        while len(self._waiting) > count:
            self._waiting.popleft()

    def saw(self, rows: Tensor, positions: Tensor) -> None:
        """The loader yields a batch of these rows; of a stream they are numbers from 0."""
        is_stream = not isinstance(self._loader.dataset, _Numbered)
        self._waiting.append((rows + self._arrived if is_stream else rows, positions))
        self._arrived += int(rows.max()) + 1 if is_stream else 0


class _Numbered:
    """A map-style dataset whose items come with their numbers; everything else of it is the dataset's own."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        return index, self._dataset[index]

    @property
    def __getitems__(self) -> Callable[[Iterable[Any]], list[tuple[Any, Any]]]:
        several = self._dataset.__getitems__  # not every dataset has it
        return lambda indices: list(zip(indices, several(indices), strict=True))

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # a copy in the making
            raise AttributeError(name)
        return getattr(self._dataset, name)


class _Collator:
    """Collates items without their numbers and lets these travel on with the batch."""

    def __init__(self, collate: Callable[[Any], Any], tape: int, *, is_stream: bool, is_batched: bool) -> None:
        self._collate = collate
        self._tape = tape
        self._is_stream = is_stream
        self._is_batched = is_batched

    def __call__(self, items: Any) -> Any:
        rows: Iterable[Any]
        if self._is_stream:
            parts = items if self._is_batched else [items]
            batch, rows = self._collate(items), range(len(parts))
        elif self._is_batched:
            rows, parts = zip(*items, strict=True)
            batch = self._collate(list(parts))
        else:
            index, item = items
            batch, rows, parts = self._collate(item), index if isinstance(index, Iterable) else [index], []
        if not isinstance(batch, Mapping):
            return batch
        numbers = torch.as_tensor(list(rows)).long()
        positions = torch.zeros_like(numbers)
        if (lengths := _laid_end_to_end(batch, parts)) is not None:
            numbers = numbers.repeat_interleave(lengths)
            positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
        return _Carried(batch, torch.stack([numbers, positions, torch.full_like(numbers, self._tape)], dim=1))


def _laid_end_to_end(batch: Mapping[str, Any], items: Sequence[Any]) -> Tensor | None:
    """The lengths of the sequences that a collator without padding has made one of; None if it has not."""
    ids = batch.get("input_ids")
    if len(items) < 2 or not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1:
        return None
    lengths = [len(item["input_ids"]) for item in items]
    return torch.tensor(lengths) if sum(lengths) == ids.shape[1] else None


class _Carried(dict[str, Any]):
    """A batch on its way, with its rows: a mapping like the collator's own, which it becomes again on the device.

    Rows, positions and the number of their tape [b, 3] are among the tensors, so that whoever takes the batch apart
    keeps them.
    """

    def __init__(self, batch: Mapping[str, Any], rows: Tensor | None = None) -> None:
        super().__init__(batch)
        self._like = None if type(batch) in (dict, _Carried) else batch
        if rows is not None:
            self[ROWS] = rows

    def to(self, device: Any, non_blocking: bool = False) -> Any:
        """The collator's batch on the device; its rows are told."""
        batch: Any = dict(self)
        rows = batch.pop(ROWS, None)
        tape = None if rows is None or not len(rows) else _TAPES.get(int(rows[0, 2]))
        if tape is not None:
            tape.saw(rows[:, 0], rows[:, 1])
        if self._like is not None:  # as tokenisers have it; what is inside may have been pinned meanwhile
            inside, batch = batch, copy.copy(self._like)
            batch.data = inside
        return send_to_device(batch, device, non_blocking=non_blocking)
