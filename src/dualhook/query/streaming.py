"""One pass over a layer's patterns: what every block of rows contributes to every query.

Letters: ``n`` pattern of a block, ``q`` query, ``p`` position of a query (a call of the layer or a place in a
sequence), ``i`` input, ``o`` output, ``t`` step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dualhook.records import Composition, Rows, RowSource

if TYPE_CHECKING:
    from dualhook.query.collectors import Collector

__all__ = ["BLOCK_ROWS", "LayerQuery", "Scores", "dual_output", "scan"]

BLOCK_ROWS = 4096
BLOCK_SCORES = 2**24  # numbers of one score matrix: many queries make the blocks shorter


@dataclass(frozen=True)
class LayerQuery:
    """What one layer is asked: its inputs ``query`` [q, p, i] and the ``direction`` [q, p, o] that counts.

    A query with several positions (the layer is called several times for one prediction, or along a sequence) is
    answered by the sum over them. ``output`` [q, p, o] is what the trained layer really gives, for the receipt.
    """

    made_of: Composition
    query: Tensor
    direction: Tensor
    output: Tensor

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.made_of.spec.name

    def __len__(self) -> int:
        return int(self.query.shape[0])


class Scores:
    """One block of rows against all queries; each quantity is computed when a collector asks for it."""

    def __init__(self, asked: LayerQuery, rows: Rows) -> None:
        self._asked = asked
        self.rows = rows
        self._dtype = _computing_dtype(rows)

    @cached_property
    def _products(self) -> Tensor:
        """``key · query`` [q, p, n]."""
        return _against(self._asked.query, self.rows.key, self._dtype)

    @cached_property
    def _attended(self) -> Tensor:
        """``key · query`` with every pattern's coefficient, the bias as one more key component [q, p, n]."""
        weight, bias = self._coefficients
        attended = self._products * weight
        return attended if bias is None else attended + bias

    @cached_property
    def _coefficients(self) -> tuple[Tensor, Tensor | None]:
        made_of, step = self._asked.made_of, self.rows.step
        weight = made_of.weight[step].to(self._dtype)
        return weight, None if made_of.bias is None else made_of.bias[step].to(self._dtype)

    @cached_property
    def weight(self) -> Tensor:
        """Attention weights ``key · query``, the bias's constant 1 included [q, n]."""
        positions = self._asked.query.shape[1]
        return self._products.sum(1) + (0 if self._asked.made_of.bias is None else positions)

    @cached_property
    def contribution(self) -> Tensor:
        """``direction · value (key · query)`` [q, n]; sums to what training has put into the direction."""
        aligned = _against(self._asked.direction, self.rows.output_grad, self._dtype)
        return -(self._attended * aligned).sum(1)

    def output(self) -> Tensor:
        """What the block adds to the layer's output, ``sum_n value_n (key_n · query)`` [q, p, o]."""
        return -(self._attended @ self.rows.output_grad.to(self._dtype))


def scan(source: RowSource, asked: LayerQuery, collectors: Sequence[Collector]) -> None:
    """Show every block of the layer's patterns to the collectors, oldest first."""
    rows = max(1, min(BLOCK_ROWS, BLOCK_SCORES // max(1, asked.query.shape[0] * asked.query.shape[1])))
    for block in source.blocks(asked.name, last_step=asked.made_of.horizon, block_rows=rows):
        scores = Scores(asked, block)
        for collector in collectors:
            collector.add(scores)


def dual_output(source: RowSource, made_of: Composition, query: Tensor) -> Tensor:
    """The layer's output for inputs [..., i] in dual form: origin, plus attention over every training pattern."""
    flat = query.reshape(1, -1, query.shape[-1])
    total = origin_output(made_of, flat)
    asked = LayerQuery(made_of, flat, flat, flat)
    for block in source.blocks(asked.name, last_step=made_of.horizon, block_rows=BLOCK_ROWS):
        total += Scores(asked, block).output()
    return total.reshape(*query.shape[:-1], -1).to(query.dtype)


def origin_output(made_of: Composition, query: Tensor) -> Tensor:
    """What the origin alone answers, float64 [q, p, o]."""
    output = query.double() @ made_of.origin_weight.T
    return output if made_of.origin_bias is None else output + made_of.origin_bias


def _against(query: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Products of [q, p, d] with [n, d], as [q, p, n]."""
    return (query.to(dtype).reshape(-1, query.shape[-1]) @ rows.to(dtype).T).reshape(*query.shape[:2], -1)


def _computing_dtype(rows: Rows) -> torch.dtype:
    return torch.promote_types(rows.key.dtype, torch.float32)
