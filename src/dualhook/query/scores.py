"""What a layer is asked, and one block of its patterns against all queries.

Letters: ``n`` pattern of a block, ``q`` query, ``p`` position of a query (a call of the layer or a place in a
sequence), ``i`` input, ``o`` output, ``t`` step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from dualhook.query.parts import Composition
from dualhook.query.slots import constants, dots, met, products
from dualhook.records import Piece, Rows

__all__ = ["CRITERIA", "Criterion", "LayerQuery", "Scores", "Screen"]

Criterion = Literal["weight", "abs_weight", "contribution", "abs_contribution"]
CRITERIA = ("weight", "abs_weight", "contribution", "abs_contribution")


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
    slot: Tensor | None = None
    """Which slot of the layer's columns every query fills [q, p], -1 for one that is only padding; None: all."""
    size: Tensor | None = None
    """``|W| |x| + |b|`` [q, p, o]: what the rounding of ``output`` goes with; None: its own size."""
    memory: str = ""
    """What tells the memory and the weights asked about from others: part of the :attr:`key`."""
    present: Tensor | None = None
    """Which positions count [q, p]; the others are zeros that fill up queries of fewer. None: all."""

    @cached_property
    def layer_key(self) -> str:
        """What tells the layer at this horizon from others."""
        return hashlib.sha256(f"{self.memory} {self.name} {self.made_of.horizon}".encode()).hexdigest()[:32]

    @cached_property
    def key(self) -> str:
        """What tells this question from others."""
        made_of = self.made_of
        method = f"{made_of.preview} {made_of.sealed is not None}"
        found = hashlib.sha256(f"{self.memory} {self.name} {made_of.horizon} {method}".encode())
        for values in (self.query, self.direction):
            found.update(f"{values.dtype} {list(values.shape)}".encode())
            found.update(values.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:32]

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.made_of.spec.name

    def __len__(self) -> int:
        return int(self.query.shape[0])

    def of(self, pieces: Sequence[Piece]) -> LayerQuery:
        """The same question to some pieces of the patterns: what a worker needs to answer it, and no more."""
        return replace(
            self,
            made_of=self.made_of.of(pieces),
            query=self.query.clone(),  # of views the whole would travel
            direction=self.direction.clone(),
            slot=None if self.slot is None else self.slot.clone(),
            present=None if self.present is None else self.present.clone(),
            output=self.query.new_zeros(0),
            size=None,
            memory="",
        )

    def on(self, device: torch.device) -> LayerQuery:
        """The same on another device, as far as scores need it."""

        def moved(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device)

        return replace(
            self,
            made_of=self.made_of.on(device),
            query=self.query.to(device),
            direction=self.direction.to(device),
            slot=moved(self.slot),
            present=moved(self.present),
        )


class Screen(Protocol):
    """A first look at a block: bounds on all scores, and exact ones of few."""

    def bounds(self, quantity: str) -> tuple[Tensor, Tensor] | None:
        """What weights or contributions are not below and not above, both [q, n]; None: unknown."""
        ...

    def of_pairs(self, quantity: str, query: Tensor, pattern: Tensor) -> Tensor | None:
        """Exact ones [m] of some of the block's patterns [m], each to one query of [m]; None: unknown."""
        ...


class Scores:
    """One block of rows against all queries; each quantity is computed when a collector asks for it.

    It is computed on the ``device`` that the question is on, in float32 at least; ``rows`` stay where they are. With a
    ``screen`` no more is computed than it leaves open.
    """

    def __init__(
        self, asked: LayerQuery, rows: Rows, replayed: Tensor | None = None, screen: Screen | None = None
    ) -> None:
        self._asked = asked
        self._screen = screen
        self.rows = rows
        self._replayed = None if replayed is None else replayed.to(asked.query.device)
        self._dtype = torch.promote_types(rows.key.dtype, torch.float32)

    @cached_property
    def _keys(self) -> Rows:
        """The rows where they are multiplied, without output gradients: to bring these there takes its time."""
        return replace(self.rows, output_grad=self.rows.output_grad[:, :0]).on(self._asked.query.device)

    @cached_property
    def _rows(self) -> Rows:
        """The rows where they are multiplied."""
        return replace(self._keys, output_grad=self.rows.output_grad.to(self._asked.query.device))

    @cached_property
    def _products(self) -> Tensor:
        """``key · query`` [q, p, n]; not to be written to."""
        return products(self._asked.query, self._asked.slot, self._keys, self._dtype)

    @cached_property
    def _constants(self) -> Tensor | None:
        """The same of the bias's constant [q, p, n] or [n]; None: 1."""
        return constants(self._asked.slot, self._keys, self._dtype)

    @cached_property
    def _terms(self) -> list[tuple[Tensor, Tensor]]:
        """What sums to minus the layer's change: attention with coefficient [q, p, n], output gradients [n, o]."""
        made_of, d = self._asked.made_of, self._rows.output_grad.to(self._dtype)
        step = self._rows.step - made_of.first_step
        bias = None if made_of.bias is None else made_of.bias[step].to(self._dtype)
        if bias is not None and self._constants is not None:
            bias = bias * self._constants
        weight, factor, sealed = made_of.weight[step].to(self._dtype), made_of.factor, made_of.sealed
        if sealed is not None:
            keys, gradients = sealed.key(self._rows), sealed.output_grad(self._rows).to(self._dtype)
        elif factor is not None:
            keys = self._rows.key.to(self._dtype) * met(self._rows, factor.column[step]).to(self._dtype)
            gradients = d * factor.row[step].to(self._dtype)
        else:  # the bias is one more key component
            attended = self._products * weight
            return [(attended if bias is None else attended + bias, d)]
        keyed = replace(self._rows, key=keys)
        own = (products(self._asked.query, self._asked.slot, keyed, self._dtype) * weight, gradients)
        return [own] if bias is None else [own, (bias.expand_as(self._products), d)]

    @cached_property
    def weight(self) -> Tensor:
        """Attention weights ``key · query``, the bias's constant 1 included [q, n]."""
        if self._asked.made_of.bias is None:
            return _over_positions(self._products)
        ones: Tensor | float = self._constants if self._constants is not None else 1.0
        if self._asked.present is not None:
            ones = ones * self._asked.present[..., None].to(self._dtype)
        return _over_positions(self._products + ones)

    @cached_property
    def contribution(self) -> Tensor:
        """``direction · value (key · query)`` [q, n]; sums to what training has put into the direction."""
        if self._replayed is not None and self._asked.made_of.only_replays:
            return self._replayed
        along = self._asked.direction
        terms = [_over_positions(_against(along, d, self._dtype).mul_(attended)) for attended, d in self._terms]
        by_step = sum(terms[1:], terms[0]).neg_()
        return by_step if self._replayed is None else by_step + self._replayed

    def by(self, criterion: Criterion) -> Tensor:
        """One of the four ways to rank patterns [q, n]."""
        values: Tensor = getattr(self, criterion.removeprefix("abs_"))
        return values.abs() if criterion.startswith("abs_") else values

    def bounds(self, criterion: Criterion) -> tuple[Tensor, Tensor]:
        """What a criterion is not below and not above, both [q, n]; the same tensor twice where it was computed."""
        found = None if self._screen is None else self._screen.bounds(criterion.removeprefix("abs_"))
        if found is None:
            return (exact := self.by(criterion)), exact
        if not criterion.startswith("abs_"):
            return found
        lower, upper = found
        return torch.maximum(lower, -upper).clamp_(min=0.0), torch.maximum(-lower, upper)

    def of_pairs(self, criterion: Criterion, query: Tensor, pattern: Tensor) -> Tensor:
        """A criterion [m] of some of the block's patterns [m], each to one query of [m]."""
        quantity = criterion.removeprefix("abs_")
        found = None if self._screen is None else self._screen.of_pairs(quantity, query, pattern)
        if found is None:
            found = self._contribution_of(query, pattern) if quantity == "contribution" else self.weight[query, pattern]
        return found.abs() if criterion.startswith("abs_") else found

    def _contribution_of(self, query: Tensor, pattern: Tensor) -> Tensor:
        """Contributions [m] of pairs.

        Unless the block's contributions are asked for otherwise, the other output gradients are not read.
        """
        made_of = self._asked.made_of
        known = self._replayed is not None or "contribution" in vars(self)
        if known or self._asked.query.shape[1] > 1 or not made_of.is_plain:
            return self.contribution[query, pattern]
        dtype = self._dtype
        step = self._keys.step[pattern] - made_of.first_step
        attended = self._products[query, 0, pattern] * made_of.weight[step].to(dtype)
        if made_of.bias is not None:
            bias, constant = made_of.bias[step].to(dtype), self._constants
            if constant is not None:
                bias = bias * (constant[pattern] if constant.ndim == 1 else constant[query, 0, pattern])
            attended += bias
        along = dots(self._asked.direction[:, 0].to(dtype), query, self.rows.output_grad, pattern)
        return along.mul_(attended).neg_()

    def output(self) -> Tensor:
        """What the block's coefficients by step add to the layer's output [q, p, o]."""
        terms = [attended @ d for attended, d in self._terms]
        return -torch.stack(terms).sum(0) if len(terms) > 1 else -terms[0]


def _against(query: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Products of [q, p, d] with [n, d], as [q, p, n]."""
    return (query.to(dtype).reshape(-1, query.shape[-1]) @ rows.to(dtype).T).reshape(*query.shape[:2], -1)


def _over_positions(scores: Tensor) -> Tensor:
    """The sum over a query's positions [q, n] of scores [q, p, n]; of one position the scores themselves."""
    return scores[:, 0] if scores.shape[1] == 1 else scores.sum(1)
