"""Influence by cosines: between a query's gradient and that of every sample in every step, all layers together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dualhook.query.curvature import extended, norms_of
from dualhook.query.gradients import Gradient
from dualhook.records import Rows, RowSource

__all__ = ["cosine_scores", "norms_of_queries"]

ROWS = 2**15  # of a layer, read at a time; but one step at least


def cosine_scores(
    source: RowSource,
    gradients: Sequence[Gradient],
    steps: tuple[int, int],
    numbered: Callable[[Rows], Tensor],
    owner: Tensor,
) -> list[Tensor]:
    """Layer by layer [q, u], float64: minus a query's products with a sample's gradients, over the norms of the latter.

    One gradient a step. All layers together, over the query's own norm as well, are the cosines.

    ``steps`` are the first and the last. ``numbered`` gives the unit of every pattern [n], ``u`` for none, ``owner``
    [u] the number of its sample: a token's part of the gradient is divided by the norm of its whole sample's.
    """
    queries, groups = len(gradients[0].query), len(owner)
    found = [torch.zeros(groups + 1, queries, dtype=torch.float64) for _ in gradients]
    primary = {own.spec.weight: own for own in reversed(gradients)}  # a weight of several uses counts once
    for first, last in _chunks(source, gradients, *steps):
        parts = [_met(source, own, first, last, numbered, owner) for own in gradients]
        keys = torch.unique(torch.cat([part.key for part in parts]))
        norms = torch.zeros(len(keys), dtype=torch.float64)
        for own, part in zip(gradients, parts, strict=True):
            if primary[own.spec.weight] is own:
                norms.index_add_(0, torch.searchsorted(keys, part.key), part.square)
        norms = norms.sqrt().clamp(min=1e-300)
        for total, part in zip(found, parts, strict=True):
            total.index_add_(0, part.unit, part.dots / norms[torch.searchsorted(keys, part.key[part.of])][:, None])
    return [total[:-1].T for total in found]


def norms_of_queries(gradients: Sequence[Gradient]) -> Tensor:
    """The norm [q] of every query's gradient on all weights together, float64; above 0."""
    squares = torch.zeros(len(gradients[0].query), dtype=torch.float64)
    for weight in dict.fromkeys(own.spec.weight for own in gradients):
        uses = [own for own in gradients if own.spec.weight == weight]
        first, *rest = [own.rows if len(uses) == 1 else own.seen_from(uses[0].spec) for own in uses]
        rows, of_weight = first.joined(*rest), torch.zeros_like(squares)
        own_squares, group = norms_of(rows)
        of_weight[rows.sample] = own_squares[group]  # the same for all of a query's rows
        squares += of_weight
    return squares.sqrt().clamp(min=1e-300)


@dataclass(frozen=True)
class _Met:
    """The gradients of samples in single steps [m]: a ``key`` that tells them, their ``square`` norms.

    And those of their units [v]: ``unit``, which sample and step they are ``of``, minus the products ``dots`` [v, q].
    """

    key: Tensor
    square: Tensor
    unit: Tensor
    of: Tensor
    dots: Tensor


def _met(
    source: RowSource, asked: Gradient, first: int, last: int, numbered: Callable[[Rows], Tensor], owner: Tensor
) -> _Met:
    """What a layer's rows of some steps make with every query."""
    asked, units, known = asked.in_few_pairs(), len(owner) + 1, int(owner.max()) + 1
    owner = torch.cat([owner, owner.new_tensor([known])])
    none = torch.zeros(0, dtype=torch.int64)
    parts = [_Met(none, none.double(), none, none, none.double().reshape(0, len(asked.query)))]
    before = 0
    for block in _of_whole_steps(source.blocks(asked.spec.name, first_step=first, last_step=last, block_rows=2**30)):
        rows = extended(asked.spec, block)
        square, group = norms_of(rows)
        unit = numbered(rows)
        key = torch.empty(len(square), dtype=torch.int64)
        key[group] = rows.step * (known + 1) + owner[unit]
        pair, place = torch.unique(group * units + unit, return_inverse=True)
        dots = -asked.met(rows, place, len(pair))
        parts.append(_Met(key, square, pair % units, before + pair // units, dots))
        before += len(square)
    return _Met(*(torch.cat([getattr(part, own.name) for part in parts]) for own in fields(_Met)))


def _of_whole_steps(blocks: Iterable[Rows]) -> Iterator[Rows]:
    """Blocks in ascending order, those joined that share a step, as the blocks of several processes do."""
    held: list[Rows] = []
    for block in blocks:
        if held and held[-1].step[-1] < block.step[0]:
            yield held[0].joined(*held[1:])
            held = []
        held.append(block)
    if held:
        yield held[0].joined(*held[1:])


def _chunks(source: RowSource, gradients: Sequence[Gradient], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Steps, so many that no layer has very many rows in them."""
    most = max(source.count(own.spec.name) for own in gradients)
    each = max(1, ROWS * (last - first + 1) // max(1, most))
    for begin in range(first, last + 1, each):
        yield begin, min(last, begin + each - 1)
