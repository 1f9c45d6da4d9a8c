"""A look at some rows of every stretch of training: what its gradients were, and how far its steps moved each entry.

Letters: ``n`` pattern, ``t`` step, ``o`` output, ``s`` slot, ``c`` column of a slot (the bias's 1 included).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from dualhook.query.curvature import Metric, extended, moments_of
from dualhook.query.parts import ReplayShare
from dualhook.query.preview import close_to, middle_factor
from dualhook.records import NO_SAMPLE, LayerSpec, Rows, RowSource

__all__ = ["LEAST", "Some", "columns_of", "edges", "looked_at", "metric_of", "some_rows"]

STRETCHES = 12
ROWS = 2**18  # looked at in all …
BYTES = 2**28  # … or fewer, where they are wide
ENTRIES = 2**20  # that a median is taken of
LEAST = 1e-30  # what stands for nothing at all


@dataclass(frozen=True)
class Some:
    """Some rows of a stretch, as many as ``steps`` had (the bias's 1 among their keys)."""

    rows: Rows
    weight: Tensor
    """Of every row's outer product in the curvature [n]."""
    steps: float

    @property
    def weighted(self) -> Rows:
        """The rows so that their outer products sum to the curvature of so many steps."""
        return replace(self.rows, output_grad=self.rows.output_grad * self.weight.sqrt()[:, None])


def columns_of(spec: LayerSpec) -> int:
    """How many columns a slot has, the bias's among them."""
    return spec.in_features // spec.slots + (spec.bias is not None)


def edges(share: ReplayShare) -> list[int]:
    """The steps between which the stretches lie."""
    steps = share.horizon - share.begins
    count = min(STRETCHES, max(1, steps))
    return [share.begins + steps * k // count for k in range(count + 1)]


def looked_at(
    source: RowSource,
    spec: LayerSpec,
    shares: Sequence[ReplayShare],
    counts: Tensor,
    weighted: Callable[[Rows], Tensor],
) -> Iterator[tuple[tuple[int, int], Some | None, Metric]]:
    """Every stretch, oldest first: the step before it and its last one, some of its rows, and its metric.

    ``counts`` and ``weighted`` as :func:`some_rows` takes them.
    """
    for begin, end in pairwise(edges(shares[0])):
        some = some_rows(source, spec, begin, end, counts, weighted)
        yield (begin, end), some, metric_of(spec, shares, (begin, end), some)


def some_rows(
    source: RowSource, spec: LayerSpec, begin: int, end: int, counts: Tensor, weighted: Callable[[Rows], Tensor]
) -> Some | None:
    """Rows from the middle of a stretch, as many as may be looked at; None where there are none.

    ``counts`` [t + 1] are the layer's rows in each step, ``weighted`` gives every row [n] of known sample the weight of
    its outer product in the curvature.
    """
    columns = spec.in_features // spec.slots + spec.out_features
    most = max(1, min(ROWS, BYTES // (4 * columns)) // STRETCHES)
    before = counts.cumsum(0)
    spared = max(0, int(before[end] - before[begin]) - most) // 2
    first = min(end, int(torch.searchsorted(before, before[begin] + spared, right=True)))
    parts, length = list[Rows](), 0
    for rows in source.blocks(spec.name, first_step=first, last_step=end, block_rows=most):
        parts.append(rows)
        length += len(rows)
        if length >= most:
            break
    if not parts:
        return None
    rows = parts[0].joined(*parts[1:])
    rows = rows.where(rows.sample != NO_SAMPLE)
    if length >= most and bool((rows.sample != rows.sample[-1:]).any()):
        rows = rows.where((rows.sample != rows.sample[-1]) | (rows.step != rows.step[-1]))  # it may have more rows
    if not len(rows):
        return None
    weight = weighted(rows).float()
    rows = replace(rows, key=rows.key.float(), output_grad=rows.output_grad.float())
    return Some(extended(spec, rows), weight, float((1 / counts[rows.step].double()).sum()))


def metric_of(spec: LayerSpec, shares: Sequence[ReplayShare], stretch: tuple[int, int], some: Some | None) -> Metric:
    """How far the stretch's steps move each entry: the optimiser's factors as the product of a row and a column.

    Where gradients are rare the factor of one step says little of those that met them, since they are in it
    themselves: it is held to that of gradients as large as the stretch's own elsewhere.
    """
    columns = columns_of(spec)
    whole = Metric(torch.ones(spec.out_features), torch.ones(spec.slots, columns))
    if some is None or not shares[0].snapshots:
        return whole
    parts = [middle_factor(share, *stretch, torch.float32) for share in shares]
    factor = parts[0].reshape(spec.out_features, spec.slots, -1)
    if len(parts) > 1:
        factor = torch.cat([factor, parts[1].reshape(spec.out_features, spec.slots, 1)], 2)
    by_step = replace(some.rows, sample=torch.zeros_like(some.rows.sample))
    energy = moments_of(by_step, spec.slots, columns) / len(torch.unique(by_step.step))
    row, column = close_to(_held(factor.flatten(1), energy), energy / energy.sum().clamp(min=LEAST))
    size = column[column > 0].mean() if bool((column > 0).any()) else 1.0
    return Metric(row * size, (column / size).reshape(whole.column.shape))


def _held(factor: Tensor, energy: Tensor) -> Tensor:
    """No larger than its median over the energy would be for gradients of this mean ``energy`` [o, s · c]."""
    size = energy.sqrt()
    some = slice(None, None, energy.numel() // ENTRIES | 1)  # odd, so as not to stay within some columns
    moved, order = (factor * size).flatten()[some].sort()
    below = energy.flatten()[some][order].double().cumsum(0)
    median = moved[int(torch.searchsorted(below, below[-1] / 2).clamp(max=len(moved) - 1))]
    return torch.where(energy > 0, factor.minimum(median / size), factor)
