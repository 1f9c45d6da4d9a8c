"""Rankings by a first look in 16 bits: bounds on all scores, and exact ones of the few that may be among the best.

A product of numbers rounded to bfloat16 is off by no more than a share of both vectors' norms (Cauchy-Schwarz); with
that for a bound, none of the best is missed, and what is ranked are the exact scores, worked out in float64. Only for
processors that multiply bfloat16 faster than float32, and for many queries of wide layers: with few of them, to round
the keys takes as long as the products, and in narrow layers to compare the bounds.

Letters: ``n`` pattern of a block, ``m`` pair of a query and a pattern, ``q`` query, ``d`` component of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from dualhook.query.scores import LayerQuery
from dualhook.query.slots import dots
from dualhook.records import Rows

__all__ = ["BlockScreen", "Screening", "pays"]

LEAST_QUERIES, LEAST_FACTORS = 32, 3 * 2**13  # and components of all queries: less is answered sooner without
ROUNDING = 2.0**-8  # of a number in bfloat16, as a share of it
SLACK = 2.0**-50  # components so small that their squares underflow; a norm is never taken for less than of such
OVERFLOWS = 2.0**126  # products that may be rounded to infinity say nothing
TINY = 2.0**-126  # smaller numbers are not rounded to a share of themselves
SHORT = (torch.float32, torch.float16, torch.bfloat16)  # what rows are exact in float64 of, and their sums in float32


def pays(queries: int, width: int, device: str) -> bool:
    """Whether a first look at a block takes less time than all scores of queries [q, d]."""
    much = queries >= LEAST_QUERIES and queries * width >= LEAST_FACTORS
    return much and torch.device(device).type == "cpu" and _multiplies_short()


@cache
def _multiplies_short() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32, and sums the products up in float32."""
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return False
    terms = torch.full((LEAST_QUERIES, 1 + 2**12), 2.0**-12, dtype=torch.bfloat16)
    terms[:, 0] = 1.0  # a sum in bfloat16 would stay there
    return bool((terms @ torch.ones_like(terms).T == 2.0).all())


class Room:
    """Memory that is used again for every block: to be handed fresh one takes longer than to fill it.

    What lies there is gone when the same ``name`` is asked for again.
    """

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def of(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor with whatever was left in it."""
        count, flat = math.prod(shape), self._flat.get(name)
        if flat is None or len(flat) < count or flat.dtype != dtype:
            flat = self._flat[name] = torch.empty(count, dtype=dtype)
        return flat[:count].view(*shape)


@dataclass(frozen=True)
class _Short:
    """Vectors [n, d] in bfloat16, and what their norms [n] do not exceed by more than their own rounding."""

    values: Tensor
    norm: Tensor

    @classmethod
    def of(cls, vectors: Tensor, room: Room) -> _Short:
        """Rows of a block."""
        norm = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float32).add_(SLACK * math.sqrt(vectors.shape[1]))
        if vectors.dtype == torch.bfloat16:
            return cls(vectors, norm)
        return cls(room.of("rows", vectors.shape, torch.bfloat16).copy_(vectors), norm)

    @classmethod
    def of_queries(cls, vectors: Tensor) -> _Short:
        """Queries; of those that are zero throughout, products are exact."""
        found = cls.of(vectors.float(), Room())
        return cls(found.values, found.norm.where((vectors != 0).any(1), 0.0))

    def products(self, others: _Short, name: str, room: Room) -> tuple[Tensor, Tensor]:
        """With other vectors, roughly, and how far the exact ones may be from that, both [q, n].

        Either factor and the result are rounded to bfloat16, the sum is in float32.
        """
        share = 3.1 * ROUNDING + (self.values.shape[1] + 8) * 2.0**-23
        shape = len(self.values), len(others.values)
        rough = torch.mm(self.values, others.values.T, out=room.of(f"{name} products", shape, torch.bfloat16))
        error = torch.outer(share * self.norm, others.norm, out=room.of(f"{name} errors", shape, torch.float32))
        largest, other = float(self.norm.max()), float(others.norm.max())
        if not max(largest, other, largest * other) < OVERFLOWS:
            error.fill_(torch.inf)
        return rough, error


class Screening:
    """A question of one position per query, as a first look needs it.

    ``contributions``: whether they are the products of keys and output gradients with coefficients by step.
    """

    def __init__(self, asked: LayerQuery, *, contributions: bool) -> None:
        self.made_of, self.contributions, self.room = asked.made_of, contributions, Room()
        self.query = asked.query[:, 0].float().double()
        self.direction = asked.direction[:, 0].float().double()

    @classmethod
    def of(cls, asked: LayerQuery, *, replayed: bool) -> Screening | None:
        """Of a question to patterns whose contributions a replay has found, or not; None: it cannot be."""
        made_of = asked.made_of
        plain = made_of.is_plain and not replayed
        several = asked.query.shape[1] > 1 or asked.slot is not None or asked.present is not None
        if several or not (plain or (replayed and made_of.only_replays)):
            return None
        return cls(asked, contributions=plain)

    def over(self, rows: Rows) -> BlockScreen | None:
        """The look at a block; None: it cannot be had."""
        same = rows.slot is None and rows.constant is None
        return BlockScreen(self, rows) if same and {rows.key.dtype, rows.output_grad.dtype} <= set(SHORT) else None

    @cached_property
    def short_query(self) -> _Short:
        return _Short.of_queries(self.query)

    @cached_property
    def short_direction(self) -> _Short:
        return _Short.of_queries(self.direction)


class BlockScreen:
    """What a question in 16 bits says of a block of rows, and exact scores of single pairs [m] in float32.

    It is good until there is one for the next block.
    """

    def __init__(self, question: Screening, rows: Rows) -> None:
        self._question, self._rows, self._room = question, rows, question.room

    def bounds(self, quantity: str) -> tuple[Tensor, Tensor] | None:
        """What weights or contributions are not below and not above, both [q, n]; None: unknown."""
        if quantity == "weight":
            return self._weight
        return self._contribution if self._question.contributions else None

    def of_pairs(self, quantity: str, query: Tensor, pattern: Tensor) -> Tensor | None:
        """Exact ones [m] of some of the block's patterns [m], each to one query of [m]; None: unknown."""
        question, made_of = self._question, self._question.made_of
        products = dots(question.query, query, self._rows.key, pattern)
        if quantity == "weight":
            return (products if made_of.bias is None else products + 1.0).float()
        if not question.contributions:
            return None
        along = dots(question.direction, query, self._rows.output_grad, pattern)
        weight, bias = self._coefficients(pattern)
        products *= weight
        return (products if bias is None else products + bias).mul_(along).neg_().float()

    @cached_property
    def _products(self) -> tuple[Tensor, Tensor]:
        return self._question.short_query.products(_Short.of(self._rows.key, self._room), "key", self._room)

    @cached_property
    def _along(self) -> tuple[Tensor, Tensor]:
        short = _Short.of(self._rows.output_grad, self._room)
        return self._question.short_direction.products(short, "output_grad", self._room)

    @cached_property
    def _weight(self) -> tuple[Tensor, Tensor]:
        return self._around("weight", *self._products, 0.0 if self._question.made_of.bias is None else 1.0)

    @cached_property
    def _contribution(self) -> tuple[Tensor, Tensor]:
        weight, bias = self._coefficients(slice(None))
        faint = _denormal(weight) if bias is None else _denormal(weight) | _denormal(bias)
        weight = weight.float()
        products, error = self._products
        along, along_error = self._along
        attended = torch.mul(products, weight, out=self._room.of("attended", products.shape, torch.float32))
        if bias is not None:
            attended += bias.float()
        rough = torch.mul(attended, along, out=self._room.of("rough", products.shape, torch.float32)).neg_()
        # (a + da) (g + dg) is off by up to (|a| + |da|) (|g| + |dg|) - |a g|
        size = self._room.of("size", products.shape, torch.float32).copy_(along).abs_()
        most = torch.mul(error, weight.abs(), out=self._room.of("most", products.shape, torch.float32))
        most.add_(attended.abs_()).mul_(size + along_error).addcmul_(attended, size, value=-1).add_(TINY)
        if faint.any():
            most[:, faint] = torch.inf
        return self._around("contribution", rough, most)

    def _around(self, name: str, rough: Tensor, error: Tensor, more: float = 0.0) -> tuple[Tensor, Tensor]:
        lower = torch.sub(rough, error, out=self._room.of(f"{name} lower", rough.shape, torch.float32))
        upper = torch.add(rough, error, out=self._room.of(f"{name} upper", rough.shape, torch.float32))
        return (lower.add_(more), upper.add_(more)) if more else (lower, upper)

    def _coefficients(self, pattern: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        """Of weight and bias, by pattern, float64."""
        made_of = self._question.made_of
        step = self._rows.step[pattern] - made_of.first_step
        return made_of.weight[step], None if made_of.bias is None else made_of.bias[step]


def _denormal(coefficients: Tensor) -> Tensor:
    """Which of them are not zero, but too small for float32 to hold them to their full precision."""
    return (coefficients != 0) & (coefficients.abs() < TINY)
