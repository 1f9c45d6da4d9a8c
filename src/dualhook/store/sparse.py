"""Rows with many zeros in less room, as behind a ReLU: the numbers that are not zero, and a bit for every place.

Lossless to the last bit: what counts as zero has no bit set, which negative zeros and NaN have.

Letters: ``n`` row, ``w`` number of a row, ``m`` number that is not zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from dualhook.errors import StoreError
from dualhook.store.direct import as_integers

__all__ = ["SPARSE_FIELDS", "SparseRows", "packed_in_place", "with_sparse"]

WORTH = 0.75  # of the bytes that rows take whole, from where on they are kept whole
AT_ONCE = 2**17  # numbers: as many as stay in a processor's cache
SPARSE_FIELDS = ("key", "output_grad", "scaled/value")
"""The tensors of a layer's rows that may be kept so."""


@dataclass(frozen=True)
class SparseRows:
    """Rows [n, w]; they read like a tensor, of which each cut is made whole in fresh memory."""

    FIELDS: ClassVar[tuple[str, ...]] = ("mask", "value", "end")

    mask: Tensor
    """A bit for every place [n, w / 8 rounded up] uint8, lowest bit first."""
    value: Tensor
    """The numbers [m] where it is set, row by row."""
    end: Tensor
    """How many numbers there are up to the end of each row [n] int64."""
    width: int

    @property
    def shape(self) -> torch.Size:
        """Rows, and numbers of each."""
        return torch.Size((len(self.mask), self.width))

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.value.dtype

    def dim(self) -> int:
        """Dimensions."""
        return 2

    def is_floating_point(self) -> bool:
        """Whether the numbers are."""
        return self.value.is_floating_point()

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(len(self))
        return self._made(max(0, stop - start), lambda begin, end: slice(start + begin, start + end))

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Some rows ``index`` [k], in that order; ``dim`` is 0."""
        return self._made(len(index), lambda begin, end: index[begin:end].long())

    def check(self) -> None:
        """Look at every bit.

        Raises:
            ValueError: there are not as many places of a row as numbers.
        """
        for begin in range(0, len(self), step := _rows_at_once(self.width)):
            ends = self.end[max(0, begin - 1) : begin + step]
            counts = torch.diff(ends, prepend=None if begin else ends.new_zeros(1))
            there = np.unpackbits(self.mask[begin : begin + step].numpy(), axis=1, bitorder="little")
            if there[:, self.width :].any() or (there.sum(1, dtype=np.int64) != counts.numpy()).any():
                raise ValueError("masks with other places than there are numbers")

    def _made(self, count: int, rows_of: Callable[[int, int], slice | Tensor]) -> Tensor:
        """So many rows whole; ``rows_of`` says which those from one to another are."""
        found = torch.empty((count, self.width), dtype=self.dtype)
        bits = as_integers(found).numpy()
        for begin in range(0, count, step := _rows_at_once(self.width)):
            rows = rows_of(begin, min(count, begin + step))
            _fill(bits[begin : begin + step], self.mask[rows].numpy(), as_integers(self._numbers(rows)).numpy())
        return found

    def _numbers(self, rows: slice | Tensor) -> Tensor:
        """The numbers of some rows, of a slice without a copy."""
        if isinstance(rows, slice):
            return self.value[int(self.end[rows.start - 1]) if rows.start else 0 : int(self.end[rows.stop - 1])]
        chosen, end = rows.numpy(), self.end.numpy()  # in the writing thread torch would call others in
        starts, bits = np.where(chosen > 0, end[chosen - 1], 0), as_integers(self.value).numpy()
        parts = [bits[begin:stop] for begin, stop in zip(starts.tolist(), end[chosen].tolist(), strict=True)]
        return torch.from_numpy(np.concatenate([bits[:0], *parts])).view(self.dtype)


def with_sparse(tensors: Mapping[str, Tensor], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """A layer's tensors by name, those of some ``widths`` [w] that are sparse in one each, which reads like one.

    Raises:
        ValueError: what there is does not make sparse rows.
    """
    found = dict(tensors)
    for name, width in widths.items():
        mask, value, end = (found.pop(f"{name}/{field}") for field in SparseRows.FIELDS)
        is_so = (
            mask.dtype == torch.uint8
            and end.dtype == torch.int64
            and tuple(mask.shape) == (len(end), _mask_bytes(width))
            and (end.dim(), value.dim()) == (1, 1)
            and len(end) > 0
            and bool((end[1:] >= end[:-1]).all())
            and 0 <= int(end[0]) <= int(end[-1]) == len(value)
            and int(torch.diff(end, prepend=end.new_zeros(1)).max()) <= width
        )
        if not is_so:
            raise ValueError(f"{name!r} is no sparse rows of {width} numbers")
        found[name] = cast(Tensor, SparseRows(mask, value, end, width))
    return found


def packed_in_place(values: Tensor) -> SparseRows | None:
    """Rows [n, w] in less room, the numbers at the beginning of their own memory; None: nothing is changed.

    What the caller had there is gone then.
    """
    if values.dim() != 2 or not values.numel() or not values.is_contiguous():
        return None
    bits, (count, width) = as_integers(values).numpy(), values.shape
    mask, end = np.empty((count, _mask_bytes(width)), np.uint8), np.empty(count, np.int64)
    if int(np.count_nonzero(bits)) * bits.itemsize + mask.nbytes + end.nbytes > WORTH * values.nbytes:
        return None
    flat, filled = bits.reshape(-1), 0
    for begin in range(0, count, step := _rows_at_once(width)):
        own = bits[begin : begin + step]
        set_bits = own != 0
        mask[begin : begin + step] = np.packbits(set_bits, axis=1, bitorder="little")
        end[begin : begin + step] = filled + np.count_nonzero(set_bits, axis=1).cumsum()
        found = own.reshape(-1).take(np.flatnonzero(set_bits))
        flat[filled : filled + len(found)] = found  # never beyond the rows that have been read
        filled += len(found)
    return SparseRows(torch.from_numpy(mask), values.view(-1)[:filled], torch.from_numpy(end), width)


def _mask_bytes(width: int) -> int:
    """Of a row of so many numbers."""
    return -(-width // 8)


def _rows_at_once(width: int) -> int:
    return max(1, AT_ONCE // width)


def _fill(bits: np.ndarray, mask: np.ndarray, numbers: np.ndarray) -> None:
    """Write rows [n, w] whole."""
    if not bits.size:
        return
    there = np.unpackbits(mask, axis=1, count=bits.shape[1], bitorder="little")
    places = np.flatnonzero(there.view(bool))
    if len(places) != len(numbers):
        raise StoreError(
            f"{len(numbers)} numbers for {len(places)} places of sparse rows: the memory is damaged, "
            "dualhook verify --deep names the file"
        )
    bits[...] = 0
    bits.reshape(-1)[places] = numbers
