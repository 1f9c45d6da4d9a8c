"""Influence by decay: the query's gradient goes back through training, and meets every pattern where it happened.

Along the curvature's eigenvectors an entry of the gradient decays on its own; over a stretch of steps the factors of
all entries are a matrix of low rank, so that a stretch is asked with a few pairs of inputs and directions in place of
one: the same dot products as plain attention, a few times over.

Letters: ``n`` pattern, ``q`` query, ``p`` position of a query, ``r`` pair, ``o`` output, ``s`` slot, ``c`` column of a
slot (the bias's 1 included).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dualhook.query.curvature import Basis, Metric, extended
from dualhook.query.gradients import Gradient
from dualhook.query.parts import Composition
from dualhook.records import Rows, RowSource

__all__ = ["Decay", "Stretch", "contributed_scores", "decayed_scores"]

ROWS = 2**14  # of a layer, read at a time


@dataclass(frozen=True)
class Stretch:
    """Some steps, and what is left of their gradients: ``sum_r row_r column_r'`` along the eigenvectors.

    ``row`` [r, o] and ``column`` [r, s, c]; ``metric`` is that of these steps.
    """

    first_step: int
    last_step: int
    row: Tensor
    column: Tensor
    metric: Metric


@dataclass(frozen=True)
class Decay:
    """What later steps have left of the gradients of one layer, stretch by stretch, oldest first."""

    metric: Metric
    basis: Basis
    stretches: Sequence[Stretch]

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        found = prefixed("mean/", vars(self.metric))
        found |= {f"basis/{name}": values for name, values in vars(self.basis).items() if values is not None}
        for number, own in enumerate(self.stretches):
            steps = torch.tensor([own.first_step, own.last_step])
            named = {"steps": steps, "row": own.row, "column": own.column, **prefixed("metric/", vars(own.metric))}
            found |= prefixed(f"{number}/", named)
        return {name: values.contiguous() for name, values in found.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Decay:
        """From named tensors."""
        stretches = list[Stretch]()
        while (number := f"{len(stretches)}/") + "steps" in tensors:
            first, last = tensors[number + "steps"].tolist()
            metric = Metric(tensors[number + "metric/row"], tensors[number + "metric/column"])
            stretches.append(Stretch(first, last, tensors[number + "row"], tensors[number + "column"], metric))
        basis = Basis(tensors.get("basis/outputs"), tensors.get("basis/inputs"))
        return cls(Metric(tensors["mean/row"], tensors["mean/column"]), basis, stretches)

    def left(self, stretch: Stretch, asked: Gradient) -> Gradient:
        """What a stretch is asked with: every position [q, p] of the query becomes several pairs [q, p · r]."""
        mean, own, ranks = self.metric, stretch.metric, len(stretch.row)
        along = asked.direction * mean.row.sqrt()
        if self.basis.outputs is not None:
            along = along @ self.basis.outputs
        along = along[:, :, None] * stretch.row  # [q, p, r, o]
        if self.basis.outputs is not None:
            along = along @ self.basis.outputs.T
        along = along * (own.row / mean.row.sqrt())
        slot = asked.slot
        at = torch.zeros(asked.query.shape[:2], dtype=torch.int64) if slot is None else slot.long().clamp(min=0)
        key = self.basis.turned(asked.query * mean.column[at].sqrt(), at)
        key = key[:, :, None] * stretch.column.permute(1, 0, 2)[at]  # [q, p, r, c]
        key = self.basis.turned(key, at[..., None].expand(-1, -1, ranks), back=True)
        key = key * (own.column / mean.column.sqrt())[at][:, :, None]
        slot = None if slot is None else slot.repeat_interleave(ranks, 1)
        return Gradient(asked.spec, key.flatten(1, 2), along.flatten(1, 2), slot)


def decayed_scores(
    source: RowSource,
    asked: Gradient,
    decay: Decay,
    numbered: Callable[[Rows], Tensor],
    groups: int,
) -> Tensor:
    """Per query and group of patterns the influence through one layer, float64 [q, groups].

    ``numbered`` gives the group of every pattern [n], ``groups`` for those that are in none.
    """
    found = torch.zeros(groups + 1, len(asked.query), dtype=torch.float64)
    asked = asked.in_few_pairs()
    for stretch in decay.stretches:
        left = decay.left(stretch, asked)
        blocks = source.blocks(
            asked.spec.name, first_step=stretch.first_step, last_step=stretch.last_step, block_rows=ROWS
        )
        for rows in blocks:
            known, group = torch.unique(numbered(rows), return_inverse=True)
            found.index_add_(0, known, -left.met(extended(asked.spec, rows), group, len(known)))
    return found[:-1].T


def contributed_scores(
    source: RowSource,
    asked: Gradient,
    made_of: Composition,
    numbered: Callable[[Rows], Tensor],
    groups: int,
) -> Tensor:
    """The same of exact contributions, of a layer that is ``made_of`` coefficients only."""
    found, asked = torch.zeros(groups + 1, len(asked.query), dtype=torch.float64), asked.in_few_pairs()
    for rows in source.blocks(asked.spec.name, last_step=made_of.horizon, block_rows=ROWS):
        step, recorded = rows.step - made_of.first_step, extended(asked.spec, rows).key.double()
        key = recorded * made_of.weight[step, None]
        if made_of.bias is not None:
            key[:, -1] = recorded[:, -1] * made_of.bias[step]
        known, group = torch.unique(numbered(rows), return_inverse=True)
        found.index_add_(0, known, -asked.met(replace(rows, key=key, constant=None), group, len(known)))
    return found[:-1].T


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same under longer names."""
    return {prefix + name: values for name, values in tensors.items()}
