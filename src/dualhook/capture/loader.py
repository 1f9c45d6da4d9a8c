"""Which dataset row every sample of a batch is, for any loader, without touching batches, order or random numbers.

A map-style ``DataLoader`` draws its indices in the main process, in the order in which it later yields the batches:
a tape beside its sampler is all that is needed. Streams are counted in order of arrival.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from dualhook.capture.hooks import Guard
from dualhook.errors import DualHookError
from dualhook.records import COORDINATES, Batch
from dualhook.sampling import SamplerTape

__all__ = ["TrackedLoader", "as_batch"]

T = TypeVar("T")
Announce = Callable[["Batch | None"], None]
Numbered = Iterator[tuple["Tensor | None", Any]]


def as_batch(samples: Any, columns: Mapping[str, Any], positions: Any = None) -> Batch:
    """A batch from the sample numbers [b], columns [b] (a single number stands for all samples) and positions [b].

    Raises:
        DualHookError: samples or positions that are no whole numbers, or a column of another length or of no numbers.
    """
    numbers = _whole_numbers("samples", samples)
    values = {name: _column(name, column, numbers.numel()) for name, column in columns.items()}
    begins = None if positions is None else _whole_numbers("positions", positions)
    if begins is not None and len(begins) != len(numbers):
        raise DualHookError(
            f"positions= names {len(begins)} places, samples= {len(numbers)} dataset rows: expected one for each"
        )
    return Batch(numbers, values, begins)


EXPECTED = {
    "samples": "the dataset row of every sample of the batch, a one-dimensional sequence of whole numbers from 0",
    "positions": "where in its dataset row every sample begins, a one-dimensional sequence of whole numbers from 0",
}


def _whole_numbers(what: str, given: Any) -> Tensor:
    expected = f"expected {EXPECTED[what]}"
    try:
        numbers = torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DualHookError(f"{what}= of type {type(given).__name__}: {expected}") from error
    if numbers.dim() > 1 or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise DualHookError(f"{what}= of shape {list(numbers.shape)} and {numbers.dtype}: {expected}")
    numbers = numbers.reshape(-1).long().clone()
    if numbers.numel() and int(numbers.min()) < 0:
        raise DualHookError(f"{what}= with the number {int(numbers.min())}: {expected}")
    return numbers


def _column(name: str, column: Any, count: int) -> Tensor:
    if name in COORDINATES:
        raise DualHookError(f"column {name!r} is recorded with every pattern anyway: choose another name")
    try:
        value = torch.as_tensor(column).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DualHookError(
            f"column {name!r}: expected one number per sample; put texts into memory.add_column"
        ) from error
    value = value.double() if value.is_floating_point() else value.long()
    if value.dim() == 0:
        value = value.expand(count)
    if value.shape != (count,):
        raise DualHookError(
            f"column {name!r} has shape {list(value.shape)}: expected one value for each of the batch's {count} samples"
        )
    return value.clone()


class TrackedLoader:
    """Yields what ``loader`` yields and announces the samples of every batch before it is used.

    Reading anything else of it (length, ``dataset``, ``sampler.set_epoch``, …) reads the loader's own. What goes wrong
    in finding the samples is the ``guard``'s; the loader goes on.
    """

    def __init__(self, loader: Iterable[Any], announce: Announce, guard: Guard) -> None:
        self._loader = loader
        self._announce = announce
        self._guard = guard

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # a copy in the making
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        try:
            for samples, batch in _numbered(self._loader, self._guard):
                self._announce(None if samples is None else Batch(samples))
                yield batch
        finally:
            self._announce(None)


def _numbered(loader: Iterable[Any], guard: Guard) -> Numbered:
    with guard:
        return _followed(loader, guard)
    return ((None, batch) for batch in loader)


def _found(guard: Guard, find: Callable[[], T]) -> T | None:
    """What is found, or None where that goes wrong and training goes on."""
    with guard:
        return find()
    return None


def _followed(loader: Iterable[Any], guard: Guard) -> Numbered:
    if not isinstance(loader, DataLoader):
        return _counted(loader, guard)
    why = ""
    if _is_of_accelerate(loader):
        if _processes(loader) == 1:
            return _fetched_ahead(loader, guard)
        why = "process 0 alone draws what it dispatches to the others"
    elif isinstance(loader.dataset, IterableDataset):
        return _counted_stream(loader, guard)
    elif type(loader).__iter__ is not DataLoader.__iter__:
        why = f"{type(loader).__name__} iterates in a way of its own"
    elif loader.num_workers and not getattr(loader, "in_order", True):
        why = "a DataLoader with in_order=False yields batches in an order that cannot be followed"
    if why:
        warnings.warn(
            f"{why}: patterns get no sample; name the rows with recorder.batch(samples=...)", UserWarning, stacklevel=5
        )
        return ((None, batch) for batch in loader)
    return _taped(loader, guard)


def _is_of_accelerate(loader: Any) -> bool:
    """Whether it is one that ``Accelerator.prepare`` has made: it holds another loader, and is not one itself."""
    return type(loader).__iter__.__module__ == "accelerate.data_loader" and hasattr(loader, "base_dataloader")


def _processes(loader: Any) -> int:
    """Between how many processes accelerate divides the batches of the loader within."""
    return loader.state.num_processes if "Dispatcher" in type(loader).__name__ else 1


def _fetched_ahead(loader: Any, guard: Guard) -> Numbered:
    """The batches of accelerate's loader: those of the one within, in its order, of which one is fetched ahead."""
    inner = _Noting(loader.base_dataloader, guard)
    batches = iter(loader)
    loader.base_dataloader = inner  # until it has been asked for its iterator
    try:
        batch = next(batches, inner)
    finally:
        loader.base_dataloader = inner.loader
    for _ in range(loader.skip_batches if batch is not inner else 0):
        _found(guard, inner.samples.popleft)
    while batch is not inner:
        yield _found(guard, inner.samples.popleft), batch
        batch = next(batches, inner)


class _Noting:
    """A loader that notes the samples of the batches it yields."""

    def __init__(self, loader: Iterable[Any], guard: Guard) -> None:
        self.loader = loader
        self._guard = guard
        self.samples: deque[Tensor | None] = deque()

    def __iter__(self) -> Iterator[Any]:
        for samples, batch in _numbered(self.loader, self._guard):
            self.samples.append(samples)
            yield batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


_TWINS: weakref.WeakKeyDictionary[DataLoader[Any], DataLoader[Any]] = weakref.WeakKeyDictionary()
"""The shadow of every tracked loader: kept, since it owns the persistent workers."""


def _twin(loader: DataLoader[Any], **changed: Any) -> DataLoader[Any]:
    """A copy of the loader as it is now, but for what is ``changed``; the loader itself stays untouched."""
    twin = _TWINS.get(loader)
    workers = None if twin is None else twin.__dict__.get("_iterator")
    if twin is None:
        twin = _TWINS[loader] = copy.copy(loader)
    # DataLoader forbids setting these by attribute after its construction
    twin.__dict__.update(loader.__dict__)
    twin.__dict__.update(changed, _iterator=workers)
    return twin


def _taped(loader: DataLoader[Any], guard: Guard) -> Numbered:
    which = "sampler" if loader.batch_sampler is None else "batch_sampler"
    known = _TWINS.get(loader)
    tape = None if known is None else getattr(known, which)  # persistent workers go on with the one they know
    if not isinstance(tape, SamplerTape) or tape.sampler is not getattr(loader, which):
        tape = SamplerTape(getattr(loader, which))
    return _drawn(_twin(loader, **{which: tape}), tape, guard)


def _drawn(loader: DataLoader[Any], tape: SamplerTape, guard: Guard) -> Numbered:
    drawn: deque[Any] | None = None
    for batch in loader:
        drawn = tape.drawn if drawn is None else drawn  # of this pass over the loader
        yield (_found(guard, partial(_next_rows, drawn)) if drawn else None), batch


def _next_rows(drawn: deque[Any]) -> Tensor | None:
    """The indices [b] that were drawn next, or None for a dataset whose indices are no whole numbers."""
    indices = drawn.popleft()
    try:
        return torch.as_tensor([int(index) for index in (indices if hasattr(indices, "__len__") else [indices])]).long()
    except (TypeError, ValueError):
        return None


class _Counting:
    """A collate function that says how many samples it was given."""

    def __init__(self, collate: Callable[[Any], Any], batched: bool) -> None:
        self.collate = collate
        self.batched = batched

    def __call__(self, items: Any) -> tuple[int, Any]:
        return (len(items) if self.batched else 1), self.collate(items)


def _counted_stream(loader: DataLoader[Any], guard: Guard) -> Numbered:
    batched = loader.batch_size is not None or loader.batch_sampler is not None
    return _arrived(_twin(loader, collate_fn=_Counting(loader.collate_fn, batched)), batched, guard)


def _arrived(loader: DataLoader[Any], batched: bool, guard: Guard) -> Numbered:
    arrived = 0
    for count, batch in loader:
        count = count if batched else _found(guard, partial(_length, batch)) or 1
        yield torch.arange(arrived, arrived + count), batch
        arrived += count


def _counted(batches: Iterable[Any], guard: Guard) -> Numbered:
    arrived = 0
    for batch in batches:
        count = _found(guard, partial(_length, batch))
        yield (None if count is None else torch.arange(arrived, arrived + count)), batch
        arrived += count or 0


def _length(batch: Any) -> int | None:
    """The number of samples in a batch: the length of the first tensor in it."""
    tensors = (leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
    first = next(tensors, None)
    return None if first is None else int(first.shape[0])
