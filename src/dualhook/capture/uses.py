"""The rows of one use of a weight, seen as the layer that is asked about: what a probe gathers and sums of them.

Layers that share a weight may use it in other ways: the head of a language model multiplies by the matrix that the
embedding looks up, which is the transpose of the embedding's own. Rows are never laid out as whole matrices for that: a
lookup is as wide as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dualhook.gathering import columns_at
from dualhook.maps import gradient, map_of
from dualhook.packing import Softmax
from dualhook.records import LayerSpec, Rows

__all__ = ["Sums", "Use", "are_alike", "signed_sums"]

BLOCK_BYTES = 2**20  # of rows that are looked at together: they stay in a processor's cache
MADE_BYTES = 2**24  # of output gradients that are computed together: the weights are read for each block of them


@dataclass(frozen=True)
class Sums:
    """What rows add up to per output and slot [o, s], or per output over all columns [o, 1], in float64.

    ``weight`` and ``bias`` are parts of the gradients, a weight's summed over its inputs with signs; ``size`` and
    ``ones`` the sums of the absolute values of the same.
    """

    weight: Tensor
    size: Tensor
    bias: Tensor
    ones: Tensor


class Use:
    """The stored rows of the layer ``own``, for a layer ``asked`` that has the same weight, or is the same."""

    def __init__(self, asked: LayerSpec, own: LayerSpec, rows: Rows) -> None:
        self.rows = rows
        self._asked = asked
        self._own = own
        self._map = map_of(own)
        self._is_alike = are_alike(own, asked)
        # keys stand for output gradients then, and the other way round
        self._is_swapped = self._map.is_transposed != map_of(asked).is_transposed

    @property
    def slot(self) -> Tensor | None:
        """Which slot of the asked layer every stored row fills [n]; None: rows do not tell."""
        return self.rows.slot if self._is_alike else None

    def some(self, slot: int, outputs: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output gradients [n, outputs], keys [n, inputs] and bias constants [n] of the patterns that fill a slot."""
        if self._is_alike:
            d, x = self._map.some(self.rows, slot, outputs, inputs)
            there = self.rows if self.rows.slot is None else self.rows.where(self.rows.slot == slot)
            return d, x, self._constants(there, len(d))
        inputs = slot * (self._asked.in_features // self._asked.slots) + inputs
        of_grads, of_keys = (inputs, outputs) if self._is_swapped else (outputs, inputs)
        grads, keys = self.rows.grads(of_grads), self._keys(of_keys)
        d, x = (keys, grads) if self._is_swapped else (grads, keys)
        return d, x, self._constants(self.rows, len(d))

    def sizes(self, slot: int) -> tuple[Tensor, Tensor]:
        """How large the rows are in every output [o], and in every column of a slot [c]."""
        if self._is_swapped and self.rows.slot is not None:
            ones = self.rows.key.new_ones(len(self.rows), 1)
            outputs = gradient(ones, self.rows.key.abs(), self.rows.slot, self._own.in_features)
            return outputs[0], self.rows.grads().abs().sum(0)
        every = torch.arange(self._asked.out_features), torch.arange(self._asked.in_features // self._asked.slots)
        d, x, _ = self.some(slot, *every)
        return d.abs().sum(0), x.abs().sum(0)

    def add_to(self, sums: Sums, signs: Tensor, outputs: Tensor | None) -> None:
        """Add the sums of all patterns, with ``signs`` [i] for the asked inputs, at some outputs or all."""
        rows, dtype = self.rows, torch.promote_types(self.rows.output_grad.dtype, torch.float32)
        signs, seen = signs.to(dtype), None if self._is_swapped else outputs
        for part in self._map.patterns(rows, self._at_once(seen, dtype)):
            d, x = part.grads(seen).to(dtype), part.key.to(dtype)
            if self._is_swapped:
                for values, keys, total in ((d @ signs, x, sums.weight), (d.abs().sum(1), x.abs(), sums.size)):
                    added = gradient(values[:, None], keys, part.slot, self._own.in_features).T
                    total.add_(added if outputs is None else added[outputs])
                continue
            own = signs if part.slot is None else signs.reshape(self._own.slots, -1)[part.slot.long()]
            signed = x @ own if part.slot is None else (x * own).sum(1)
            constant = self._constants(part, len(d)).to(dtype)
            per_slot, sizes = part.slot if sums.weight.shape[1] > 1 else None, d.abs()
            for values, factor, total in (
                (d, signed, sums.weight),
                (sizes, x.abs().sum(1), sums.size),
                (d, constant, sums.bias),
                (sizes, constant.abs(), sums.ones),
            ):
                if per_slot is None:
                    total[:, 0] += values.T @ factor  # far faster than as a matrix of one column
                else:
                    total += gradient(values, factor[:, None], per_slot, total.shape[1])

    def _at_once(self, seen: Tensor | None, dtype: torch.dtype) -> int:
        """How many rows to look at together, at some of their output gradients or all."""
        outputs = self.rows.output_grad.shape[1] or self._own.out_features
        width = self.rows.key.shape[1] + (outputs if seen is None else len(seen))
        most = MADE_BYTES if isinstance(self.rows.packed, Softmax) else BLOCK_BYTES
        return max(16, most // max(1, width * dtype.itemsize))

    def _keys(self, columns: Tensor) -> Tensor:
        """Keys at some columns of the use's whole matrix [n, columns]."""
        if self.rows.slot is None:
            return columns_at(self.rows.key, columns)
        width = self.rows.key.shape[1]
        fills = self.rows.slot[:, None] == columns // width
        return self.rows.key.index_select(1, columns % width) * fills

    def _constants(self, rows: Rows, count: int) -> Tensor:
        """The keys' components for the asked layer's bias [count]."""
        if rows.constant is not None:
            return rows.constant
        return torch.full((count,), float(self._own.bias == self._asked.bias), dtype=rows.output_grad.dtype)


def are_alike(a: LayerSpec, b: LayerSpec) -> bool:
    """Whether two uses lay out their weight in the same way."""
    return a.kind == b.kind and a.slots == b.slots


def signed_sums(
    asked: LayerSpec, uses: Iterable[Use], signs: Tensor, columns: int, outputs: Tensor | None = None
) -> Sums:
    """The sums over the patterns of all uses, with ``signs`` [i], at some outputs or all; per slot, or in 1 column."""
    count = asked.out_features if outputs is None else len(outputs)
    found = Sums(*(torch.zeros(count, columns, dtype=torch.float64) for _ in range(4)))
    for use in uses:
        use.add_to(found, signs, outputs)
    return found
