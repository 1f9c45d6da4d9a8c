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
from collections.abc import Callable, Iterable, Mapping
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
    """The rows [b] of the batches that a loader has yielded and nobody has asked for yet, oldest first."""

    def __init__(self, loader: Any) -> None:
        number = next(_NUMBERS)
        _TAPES[number] = self
        self._waiting: deque[Tensor] = deque()
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

    def next(self) -> Tensor | None:
        """The rows of the batch that comes next; None if they are not known."""
        return self._waiting.popleft() if self._waiting else None

    def drop_but(self, count: int) -> None:
        """Forget all but the newest batches: the others were skipped."""
        while len(self._waiting) > count:
            self._waiting.popleft()

    def saw(self, rows: Tensor) -> None:
        """The loader yields a batch of these rows; of a stream they are numbers from 0."""
        is_stream = not isinstance(self._loader.dataset, _Numbered)
        self._waiting.append(rows + self._arrived if is_stream else rows)
        self._arrived += len(rows)


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
            batch, rows = self._collate(items), range(len(items) if self._is_batched else 1)
        elif self._is_batched:
            batch, rows = self._collate([item for _, item in items]), [index for index, _ in items]
        else:
            index, item = items
            batch, rows = self._collate(item), index if isinstance(index, Iterable) else [index]
        if not isinstance(batch, Mapping):
            return batch
        numbers = torch.as_tensor(list(rows)).long()
        return _Carried(batch, torch.stack([numbers, torch.full_like(numbers, self._tape)], dim=1))


class _Carried(dict[str, Any]):
    """A batch on its way, with its rows: a mapping like the collator's own, which it becomes again on the device.

    Rows and the number of their tape [b, 2] are among the tensors, so that whoever takes the batch apart keeps them.
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
        tape = None if rows is None or not len(rows) else _TAPES.get(int(rows[0, 1]))
        if tape is not None:
            tape.saw(rows[:, 0])
        if self._like is not None:  # as tokenisers have it; what is inside may have been pinned meanwhile
            inside, batch = batch, copy.copy(self._like)
            batch.data = inside
        return send_to_device(batch, device, non_blocking=non_blocking)
