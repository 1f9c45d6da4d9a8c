"""Rows held in memory as a source of patterns, and the dense computation over them; importable in other processes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from dualhook.query import Composition
from dualhook.records import LayerSpec, Rows

I, O = 3, 2


class Held:
    """A row source over rows in memory, cut into segments anywhere."""

    def __init__(self, rows: Rows, cuts: list[int]) -> None:
        self.rows = rows
        self.cuts = [0, *sorted(cuts), len(rows)]

    def blocks(self, layer: str, *, last_step: int, block_rows: int, first_step: int = 0):
        for start, stop in zip(self.cuts[:-1], self.cuts[1:], strict=True):
            for first in range(start, stop, block_rows):
                last = min(stop, first + block_rows)
                keep = slice(first, last)
                part = Rows(self.rows.key[keep], self.rows.output_grad[keep], self.rows.step[keep],
                            self.rows.sample[keep], self.rows.position[keep], first=first)  # fmt: skip
                known = part.step <= last_step
                yield Rows(part.key[known], part.output_grad[known], part.step[known], part.sample[known],
                           part.position[known], first=first)  # fmt: skip

    def pieces(self, layer: str, *, last_step: int, first_step: int = 0):
        for start, stop in zip(self.cuts[:-1], self.cuts[1:], strict=True):
            rows = self.rows.part(start, stop)
            if len(rows := replace(rows.where(rows.step <= last_step), first=start)):
                yield HeldPiece(rows)

    def worked_on(self, patterns: int) -> None:
        pass


@dataclass(frozen=True)
class HeldPiece:
    """Some of its rows."""

    rows: Rows

    @property
    def first(self) -> int:
        return self.rows.first

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def first_step(self) -> int:
        return int(self.rows.step.min())

    @property
    def last_step(self) -> int:
        return int(self.rows.step.max())

    def blocks(self, block_rows: int):
        for start in range(0, len(self.rows), block_rows):
            yield self.rows.part(start, min(len(self.rows), start + block_rows))


@st.composite
def cases(draw: st.DrawFn):
    count = draw(st.integers(0, 40))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    coarse = draw(st.booleans())  # small whole numbers: many ties

    def values(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, dtype=torch.float64)
        return (drawn * 1.5).round() if coarse else drawn

    horizon = draw(st.integers(1, 6))
    step = torch.randint(1, horizon + 1, (count,)).sort().values
    rows = Rows(values(count, I), values(count, O), step, torch.randint(-1, 5, (count,)), torch.randint(0, 3, (count,)))
    bias = draw(st.booleans())
    spec = LayerSpec("fc", I, O, "fc.weight", "fc.bias" if bias else None)
    made_of = Composition(
        spec, values(horizon + 1), values(O, I), values(horizon + 1) if bias else None, values(O) if bias else None
    )
    queries, positions = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    query, direction = values(queries, positions, I), values(queries, positions, O)
    cuts = draw(st.lists(st.integers(0, count), max_size=4))
    block_rows = draw(st.integers(1, 9))
    return rows, made_of, query, direction, Held(rows, cuts), block_rows


def dense(rows: Rows, made_of: Composition, query: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention weights [q, n], contributions [q, n] and the layer's output [q, p, o]."""
    ones = torch.ones(len(rows), 1, dtype=torch.float64)
    augmented = made_of.bias is not None
    keys = torch.cat([rows.key, ones], 1) if augmented else rows.key
    q = torch.cat([query, torch.ones_like(query[..., :1])], -1) if augmented else query
    weight = torch.einsum("ni,qpi->qn", keys, q)
    scaled = torch.cat([rows.key * made_of.weight[rows.step][:, None], ones * made_of.bias[rows.step][:, None]], 1) \
        if augmented else rows.key * made_of.weight[rows.step][:, None]  # fmt: skip
    contribution = -torch.einsum("qpo,no,ni,qpi->qn", direction, rows.output_grad, scaled, q)
    matrix = torch.cat([made_of.origin_weight, made_of.origin_bias[:, None]], 1) if augmented else made_of.origin_weight
    total = matrix - rows.output_grad.T @ scaled
    return weight, contribution, q @ total.T


def ranked(weight: Tensor, contribution: Tensor, by: str, largest: bool, k: int) -> Tensor:
    """The patterns [q, at most k] that a criterion puts first, equal ones in the order of recording."""
    rank = {"weight": weight, "contribution": contribution}[by.removeprefix("abs_")]
    rank = rank.abs() if by.startswith("abs_") else rank
    return rank.sort(dim=1, descending=largest, stable=True).indices[:, :k]


def sample_group(rows: Rows) -> Tensor:
    return rows.sample + 1
