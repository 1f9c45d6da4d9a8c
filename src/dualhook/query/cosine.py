"""Influence by cosines: between a query's gradient and that of every sample in every step, all layers together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dualhook.query.curvature import extended, norms_of
from dualhook.query.gradients import Gradient
from dualhook.records import Rows, RowSource

__all__ = ["cosine_scores"]

ROWS = 2**15  # of a layer, read at a time; but one step at least


def cosine_scores(
    source: RowSource,
    gradients: Sequence[Gradient],
    steps: tuple[int, int],
    numbered: Callable[[Rows], Tensor],
    groups: int,
) -> list[Tensor]:
    """Layer by layer the sums of cosines over repeats [q, groups], float64; together they are the cosines.

    ``steps`` are the first and the last; ``numbered`` gives the group of every pattern [n], ``groups`` for none.
    """
    queries = len(gradients[0].query)
    found = [torch.zeros(groups + 1, queries, dtype=torch.float64) for _ in gradients]
    primary = {own.spec.weight: own for own in reversed(gradients)}  # a weight of several uses counts once
    for first, last in _chunks(source, gradients, *steps):
        parts = [_met(source, own, first, last, numbered, groups) for own in gradients]
        keys, place = torch.unique(torch.cat([part[0] for part in parts]), return_inverse=True)
        norms = torch.zeros(len(keys), dtype=torch.float64)
        counted = [float(primary[own.spec.weight] is own) for own in gradients]
        norms.index_add_(0, place, torch.cat([part[2] * one for part, one in zip(parts, counted, strict=True)]))
        begin = 0
        for total, (own, dots, _) in zip(found, parts, strict=True):
            at = place[begin : begin + len(own)]
            begin += len(own)
            total.index_add_(0, own % (groups + 1), dots / norms[at].sqrt().clamp(min=1e-300)[:, None])
    return [total[:-1].T for total in found]


def _met(
    source: RowSource, asked: Gradient, first: int, last: int, numbered: Callable[[Rows], Tensor], groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Per sample and step: a number that tells it, minus its product with every query [m, q], its squared norm [m]."""
    blocks = list(source.blocks(asked.spec.name, first_step=first, last_step=last, block_rows=2**30))
    if not blocks:
        nothing = torch.zeros(0, dtype=torch.float64)
        return nothing.long(), nothing.reshape(0, len(asked.query)), nothing
    rows = extended(asked.spec, blocks[0].joined(*blocks[1:]))
    squares, group = norms_of(rows)
    key = torch.empty(len(squares), dtype=torch.int64)
    key[group] = rows.step * (groups + 1) + numbered(rows)
    return key, -asked.in_few_pairs().met(rows, group, len(squares)), squares


def _chunks(source: RowSource, gradients: Sequence[Gradient], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Steps, so many that no layer has very many rows in them."""
    most = max(source.count(own.spec.name) for own in gradients)
    each = max(1, ROWS * (last - first + 1) // max(1, most))
    for begin in range(first, last + 1, each):
        yield begin, min(last, begin + each - 1)
