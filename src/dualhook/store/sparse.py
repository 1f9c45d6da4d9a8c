"""Rows with many zeros in less room, as behind a ReLU: the numbers that are not zero, and a bit for every place.

Lossless to the last bit: what counts as zero has no bit set, which negative zeros and NaN have.

Letters: ``n`` row, ``w`` number of a row, ``m`` number that is not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        found = torch.empty((max(0, stop - start), self.width), dtype=self.dtype)
        bits, step = as_integers(found).numpy(), max(1, AT_ONCE // max(1, self.width))
        for begin in range(start, stop, step):
            end = min(stop, begin + step)
            before = int(self.end[begin - 1]) if begin else 0
            own = self.mask[begin:end].numpy(), as_integers(self.value[before : int(self.end[end - 1])]).numpy()
            _fill(bits[begin - start : end - start], *own)
        return found

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Some rows ``index`` [k], in that order."""
        ends = self.end[index.long()]
        counts = torch.diff(self.end, prepend=self.end.new_zeros(1))[index.long()]
        before = (ends - counts - (counts.cumsum(0) - counts)).repeat_interleave(counts)
        places = before + torch.arange(len(before))
        found = torch.empty((len(index), self.width), dtype=self.dtype)
        _fill(as_integers(found).numpy(), self.mask[index.long()].numpy(), as_integers(self.value[places]).numpy())
        return found


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
            and tuple(mask.shape) == (len(end), -(-width // 8))
            and (end.dim(), value.dim()) == (1, 1)
            and bool((torch.diff(end, prepend=end.new_zeros(1)) >= 0).all())
            and int(end[-1] if len(end) else 0) == len(value)
        )
        if not is_so:
            raise ValueError(f"{name!r} is no sparse rows of {width} numbers")
        found[name] = cast(Tensor, SparseRows(mask, value, end, width))
    return found


def packed_in_place(values: Tensor) -> SparseRows | None:
    """Rows [n, w] in less room, the numbers at the beginning of their own memory; None: nothing is changed.

    That of the caller is used up.
    """
    if values.dim() != 2 or not values.numel() or not values.is_contiguous():
        return None
    bits, (count, width) = as_integers(values).numpy(), values.shape
    row_bytes = -(-width // 8) + 8
    kept = int(np.count_nonzero(bits))
    if kept * bits.itemsize + count * row_bytes > WORTH * values.nbytes:
        return None
    flat, mask, end = bits.reshape(-1), np.empty((count, -(-width // 8)), np.uint8), np.empty(count, np.int64)
    step, filled = max(1, AT_ONCE // width), 0
    for begin in range(0, count, step):
        own = bits[begin : begin + step]
        set_bits = own != 0
        mask[begin : begin + step] = np.packbits(set_bits, axis=1, bitorder="little")
        end[begin : begin + step] = filled + np.count_nonzero(set_bits, axis=1).cumsum()
        found = own.reshape(-1).take(np.flatnonzero(set_bits))
        flat[filled : filled + len(found)] = found  # never beyond the rows that have been read
        filled += len(found)
    return SparseRows(torch.from_numpy(mask), values.view(-1)[:filled], torch.from_numpy(end), width)


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
