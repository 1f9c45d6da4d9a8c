"""Products of a layer's gradients: those that queries ask with, and those of groups of patterns.

A gradient is a sum of outer products. Either their factors meet one by one, as in attention, or both gradients are made
whole first: that is less where many patterns of a group meet many positions of a query, as in convolutions.

Letters: ``n`` pattern, ``m`` group of patterns, ``q`` query, ``p`` position of a query, ``o`` output, ``c`` column of a
slot (the bias's 1 included).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dualhook.maps import map_of
from dualhook.query.curvature import extended, laid_out
from dualhook.query.slots import products
from dualhook.records import LayerSpec, Rows

__all__ = ["Gradient"]

PRODUCTS = 2**22  # of patterns and positions, at a time
AROUND = 8  # what else a product costs, in multiplications


@dataclass(frozen=True)
class Gradient:
    """A query's gradient on one layer: inputs ``query`` [q, p, c] with the bias's 1, directions [q, p, o]."""

    spec: LayerSpec
    query: Tensor
    direction: Tensor
    slot: Tensor | None

    def met(self, rows: Rows, group: Tensor, groups: int) -> Tensor:
        """The products with the gradients of groups of patterns [m, q], float64; ``group`` [n] is that of each."""
        found = torch.zeros(groups, len(self.query), dtype=torch.float64)
        if self.slot is None and self._whole_is_less(len(rows), groups):
            counts = torch.bincount(group, minlength=groups)
            for some, key, output_grad, _ in laid_out(rows, group, counts, lambda _: self.whole.shape[1]):
                gradients = output_grad.to(self.query.dtype).mT @ key.to(self.query.dtype)
                found[some] = (gradients.flatten(1) @ self.whole.T).double()
            return found
        most = max(256, PRODUCTS // max(1, self.query.shape[0] * self.query.shape[1]))
        for begin in range(0, len(rows), most):
            part = rows.part(begin, begin + most)
            met = products(self.query, self.slot, part, self.query.dtype)
            met *= (self.direction.flatten(0, 1) @ part.output_grad.to(self.direction.dtype).T).reshape(met.shape)
            found.index_add_(0, group[begin : begin + most], met.sum(1).T.double())
        return found

    def in_few_pairs(self) -> Gradient:
        """The same, its outputs or columns in the place of positions that are more."""
        (queries, positions, columns), outputs = self.query.shape, self.direction.shape[2]
        if self.slot is not None or positions <= min(outputs, columns):
            return self
        matrix, one = self.whole.reshape(queries, outputs, columns), torch.eye(min(outputs, columns))
        one = one.to(matrix.dtype).expand(queries, -1, -1)
        query, direction = (matrix, one) if outputs <= columns else (one, matrix.mT)
        return Gradient(self.spec, query, direction, None)

    @property
    def rows(self) -> Rows:
        """Its positions as rows [q · p], each query a sample."""
        sample = torch.arange(len(self.query)).repeat_interleave(self.query.shape[1])
        none, slot = torch.zeros_like(sample), None if self.slot is None else self.slot.flatten()
        return Rows(self.query.flatten(0, 1), self.direction.flatten(0, 1), none, sample, none, slot=slot)

    def seen_from(self, spec: LayerSpec) -> Rows:
        """The same as another use of the weight has them."""
        rows = self.rows if self.spec.bias is None else replace(self.rows, key=self.rows.key[:, :-1])
        return extended(spec, map_of(self.spec).seen_from(spec, rows))

    @cached_property
    def whole(self) -> Tensor:
        """All of it [q, o · c]."""
        return (self.direction.mT @ self.query).flatten(1)

    def _whole_is_less(self, rows: int, groups: int) -> bool:
        (queries, positions, columns), outputs = self.query.shape, self.direction.shape[2]
        one_by_one = rows * queries * positions * (outputs + columns + AROUND)
        return outputs * columns * (rows + groups * queries) < one_by_one
