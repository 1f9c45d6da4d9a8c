"""Self-influence: how far a sample's own steps have lowered its own loss, from its own rows alone.

A sample's part ``g_t`` of a step's gradient moves the weights by ``-c_t M g_t``, with the coefficient ``c_t`` and the
optimiser's metric ``M`` (1 under SGD). Where the loss is a mean of ``n`` rows, ``n g_t`` is the gradient of the
sample's own loss, which this has lowered by ``n c_t g_t' M g_t`` to first order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dualhook.query.curvature import extended, norms_of
from dualhook.query.decay import decayed
from dualhook.query.metric import edges, metric_of, some_rows
from dualhook.query.parts import ReplayShare
from dualhook.records import LayerSpec, Rows, RowSource

__all__ = ["self_influence"]

NUMBERS = 2**24  # of a layer's rows, read at a time


def self_influence(
    source: RowSource,
    spec: LayerSpec,
    shares: Sequence[ReplayShare],
    counts: Tensor,
    reduced_over: Tensor,
    numbered: Callable[[Rows], Tensor],
    groups: int,
) -> Tensor:
    """By how much the loss of every group of patterns was lowered through one layer, float64 [groups].

    ``counts`` [t + 1] are the layer's rows in each step, ``reduced_over`` [t + 1] how many the loss is a mean of.
    ``numbered`` gives the group of every pattern [n], ``groups`` for those that are in none. A preconditioner is that
    of one step for each of some stretches of training, as the product of a row and a column.

    Raises:
        RuleError: what the optimiser does is made of more than its state.
    """
    factor = reduced_over * _coefficients(shares[0])
    found = torch.zeros(groups + 1, dtype=torch.float64)
    for begin, end in _stretches(shares[0]):
        some = some_rows(source, spec, begin, end, counts, _alike) if shares[0].snapshots else None
        metric = metric_of(spec, shares, (begin, end), some)
        for rows in _by_steps(source, spec, begin + 1, end, counts, lambda rows: numbered(rows) < groups):
            squares, group = norms_of(metric.measured(extended(spec, rows)))
            number, step = torch.empty(2, len(squares), dtype=torch.int64)
            number[group], step[group] = numbered(rows), rows.step
            found.index_add_(0, number, squares * factor[step])
    return found[:-1]


def _stretches(share: ReplayShare) -> Iterator[tuple[int, int]]:
    """A dozen, and of the first one more: there second moments, and with them the metric, change from step to step."""
    found = edges(share)
    early = (
        {share.begins + 2**power for power in range((found[1] - found[0]).bit_length())} if len(found) > 1 else set()
    )
    return pairwise(sorted({*found, *(step for step in early if step < found[1])}))


def _alike(rows: Rows) -> Tensor:
    return torch.ones(len(rows))


def _coefficients(share: ReplayShare) -> Tensor:
    """What multiplies the gradient of every step in the weight at the horizon [t + 1], its sign reversed."""
    steps = range(share.begins + 1, share.horizon + 1)
    nothing = torch.zeros(1, dtype=torch.float64)
    each = decayed(share, nothing, torch.zeros(share.horizon + 1), [(step - 1, step) for step in steps])
    return torch.cat([nothing.repeat(share.begins + 1), *list(each)[::-1]])


def _by_steps(
    source: RowSource, spec: LayerSpec, first: int, last: int, counts: Tensor, wanted: Callable[[Rows], Tensor]
) -> Iterator[Rows]:
    """The wanted rows of steps, all of a step together, and several steps where they are few."""
    most = max(1, NUMBERS // (spec.in_features // spec.slots + spec.out_features))
    begin, gathered = first, 0
    for step in range(first, last + 1):
        gathered += int(counts[step])
        if step < last and gathered + int(counts[step + 1]) <= most:
            continue
        blocks = source.blocks(spec.name, first_step=begin, last_step=step, block_rows=most)
        parts = [rows.where(wanted(rows)) for rows in blocks]
        if any(map(len, parts)):
            yield parts[0].joined(*parts[1:])
        begin, gathered = step + 1, 0
