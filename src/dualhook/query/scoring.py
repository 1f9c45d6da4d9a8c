"""What replayed patterns contribute to queries: a coefficient per entry of the weight, met by every query.

For one step with output gradients ``d`` [n, o], keys ``x`` [n, i] and coefficient ``C`` of the gradient ``dᵀ x``, the
contribution of row n to a query ``x*`` along a direction ``u`` is ``-sum_oi u_o d_no C_oi x_ni x*_i``. Zeros of ``u``
(units that a ReLU has switched off) and of ``x*`` are left out: most of the work is there. What is left of ``C`` meets
the keys first: it has fewer outputs than the step has rows, so that the smaller tensors are multiplied one by one. The
positions of a query are summed before that, into the gradient ``sum_p u_p x*_pᵀ``, where many of them meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from dualhook.maps import spread
from dualhook.optimizers import Side
from dualhook.query.parts import ReplayShare
from dualhook.records import Rows

__all__ = ["BlockScores", "ReplayQuestion", "ReplayScores", "RowScores"]

DENSE = 0.75  # share of non-zeros above which picking them costs more than it saves
TOGETHER = 2**14  # coefficients a query, all inputs counted, up to which queries are answered in one product
MEETING = 2**13  # the same that positions of a query have in common, from which on they are summed first
FLAT = 2**22  # coefficients of a block, all queries counted, up to which their places, or gradients, are kept
TRANSPOSED = 4  # queries from which it pays to have keys by input


@dataclass
class _Query:
    """One query in a block: the ``inputs`` and ``outputs`` that it fills (None: all), and its values there."""

    number: int
    inputs: Tensor | None
    outputs: Tensor | None
    query: Tensor
    direction: Tensor

    def part_of(self, coefficient: Tensor) -> Tensor:
        """What is left of the coefficients [o, i]."""
        own = coefficient if self.outputs is None else coefficient.index_select(0, self.outputs)
        return own if self.inputs is None else own.index_select(1, self.inputs)


@dataclass
class _Position(_Query):
    """A query [i] of one position, with its direction [o]."""

    entries: Tensor | None = None
    """Where they meet in the coefficients, laid out flat."""

    def of(self, coefficient: Tensor) -> Tensor:
        """What is left of the coefficients, times the query [o, i]."""
        if self.entries is None:
            return self.part_of(coefficient) * self.query
        flat = coefficient.view(-1).index_select(0, self.entries)
        return flat.view(len(self.direction), -1).mul_(self.query)


@dataclass
class _Sequence(_Query):
    """A query [p, i] of several positions, with its directions [p, o]."""

    gradient: Tensor | None = None
    """``directionᵀ query`` [o, i]; None: it is made each time."""

    def of(self, coefficient: Tensor) -> Tensor:
        """What is left of the coefficients, times the gradient [o, i]."""
        gradient = self.direction.T @ self.query if self.gradient is None else self.gradient
        return self.part_of(coefficient) * gradient


class RowScores(Protocol):
    """What a replay asks of every step's rows in a block of output units."""

    queries: int

    def of(self, rows: Rows, values: Tensor | float, scale: float, side: Side) -> Tensor:
        """Something [queries, n] for the coefficient ``scale · values`` of the rows' gradient."""
        ...


class ReplayQuestion(Protocol):
    """What is asked of a replay: :class:`ReplayScores`, or another."""

    @property
    def shape(self) -> Sequence[int]:
        """How many answers there are for every row, and for how many positions."""
        ...

    def of(self, share: ReplayShare, units: slice, dtype: torch.dtype) -> RowScores:
        """The same for a block of output units."""
        ...


class ReplayScores:
    """Queries [q, p, i] and their directions [q, p, o] on a layer with replayed parameters."""

    def __init__(self, query: Tensor, direction: Tensor, slot: Tensor | None = None, slots: int = 1) -> None:
        self.shape = query.shape[:2]
        self._slots = slots
        self._query = query.reshape(-1, query.shape[-1])
        self._direction = direction.reshape(-1, direction.shape[-1])
        self._slot = None if slot is None else slot.reshape(-1)

    @cached_property
    def _inputs(self) -> list[Tensor | None]:
        return [_nonzero(one) for one in self._query]

    def flat(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Queries [q · p, i] and directions [q · p, o]."""
        return self._query.to(dtype), self._direction.to(dtype)

    def each(self) -> Iterator[ReplayScores]:
        """The same for every query alone."""
        queries, positions = self.shape
        for query in range(queries):
            own = slice(query * positions, (query + 1) * positions)
            slot = None if self._slot is None else self._slot[None, own]
            yield ReplayScores(self._query[None, own], self._direction[None, own], slot, self._slots)

    def of(self, share: ReplayShare, units: slice, dtype: torch.dtype) -> BlockScores:
        """Ready for a block of output units of a share."""
        query, direction = self._query.to(dtype), self._direction[:, units].to(dtype)
        if self._slot is None:
            ndim = 1 if share.is_bias else 2
            return BlockScores(int(self.shape[0]), query, direction, lambda: self._inputs, units, ndim)
        # only what the queries fill matters, unless a matrix mixes the columns
        used = torch.unique(self._slot) if share.separable else torch.arange(self._slots)
        used = used[used >= 0]
        query = torch.ones_like(query[:, :1]) if share.is_bias else query
        wide = spread(query, self._slot, used)
        columns = None
        if share.separable:
            columns = (used[:, None] * query.shape[1] + torch.arange(query.shape[1])).reshape(-1)
        chosen = Chosen(used, query.shape[1], columns, share.is_bias)
        return BlockScores(
            int(self.shape[0]), wide, direction, lambda: [_nonzero(one) for one in wide], units, 2, chosen
        )


@dataclass(frozen=True)
class Chosen:
    """The slots that queries fill, and their columns of a matrix (None: all)."""

    slots: Tensor
    width: int
    columns: Tensor | None
    is_bias: bool

    def keys(self, rows: Rows) -> Tensor:
        """Keys [n, columns]."""
        if self.is_bias:
            one = torch.ones(len(rows), 1, dtype=rows.output_grad.dtype)
            one = one if rows.constant is None else rows.constant[:, None].to(one.dtype)
            return one.expand(-1, len(self.slots)) if rows.slot is None else spread(one, rows.slot, self.slots)
        if rows.slot is not None:
            return spread(rows.key, rows.slot, self.slots)
        return rows.key if self.columns is None else rows.key.index_select(1, self.columns)


class BlockScores:
    """What rows contribute to the queries through some output units of a parameter."""

    def __init__(
        self,
        queries: int,
        query: Tensor,
        direction: Tensor,
        filled: Callable[[], list[Tensor | None]],
        units: slice,
        ndim: int,
        chosen: Chosen | None = None,
    ) -> None:
        self.queries = queries
        self._chosen = chosen
        self._q, self._u, self._units, self._ndim = query, direction, units, ndim
        self._pairs: Tensor | None = None
        self._sequences: list[_Sequence] | None = None
        if ndim == 1:  # a bias answers all positions alike
            self._u = direction.reshape(queries, -1, direction.shape[1]).sum(1)
            return
        active = torch.nonzero(direction)  # [pairs, (query and position, output)]
        apart = int(direction.reshape(queries, -1, direction.shape[1]).any(1).sum())  # positions that meet count once
        if (len(active) - apart) * query.shape[1] > MEETING * queries:
            self._sequences = self._as_sequences()
            return
        if active.shape[0] * query.shape[1] <= TOGETHER * len(direction):
            self._pairs = active
            return
        inputs = filled()
        own = [
            _Position(k, inputs[k], _nonzero(u), query[k] if inputs[k] is None else query[k][inputs[k]], u)
            for k, u in enumerate(direction)
        ]
        for one in own:
            if one.outputs is not None:
                one.direction = one.direction[one.outputs]
        self._positions = [one for one in own if len(one.direction) and len(one.query)]
        if sum(one.direction.numel() * one.query.numel() for one in self._positions) <= FLAT:
            for one in self._positions:
                if one.inputs is not None and one.outputs is not None:
                    one.entries = (one.outputs[:, None] * query.shape[1] + one.inputs).reshape(-1).int()

    def of(self, rows: Rows, values: Tensor | float, scale: float, side: Side) -> Tensor:
        """Contributions [q, n] for the coefficient ``scale · values`` of the rows' gradient."""
        d, u = rows.output_grad[:, self._units].to(self._u.dtype), self._u
        if self._ndim == 1:
            found = (u * values) @ d.T
            return (found if rows.constant is None else found.mul_(rows.constant.to(found.dtype))).mul_(-scale)
        x = (rows.key if self._chosen is None else self._chosen.keys(rows)).to(u.dtype)
        if isinstance(values, Tensor) and side == "elementwise":
            columns = None if self._chosen is None else self._chosen.columns
            found = self._elementwise(d, x, values if columns is None else values.index_select(1, columns))
        else:
            q = self._q
            if not isinstance(values, Tensor):
                found, scale = (u @ d.T) * (q @ x.T), scale * values
            elif side == "left":
                found = (u @ values @ d.T) * (q @ x.T)
            else:
                found = (u @ d.T) * (q @ values.T @ x.T)
            found = self._summed(found)
        return found.mul_(-scale)

    def _as_sequences(self) -> list[_Sequence]:
        """The queries with the inputs and outputs that their positions fill."""
        found = []
        for k, (query, direction) in enumerate(
            zip(self._q.chunk(self.queries), self._u.chunk(self.queries), strict=True)
        ):
            inputs, outputs = _nonzero(query.abs().sum(0)), _nonzero(direction.abs().sum(0))
            query = query if inputs is None else query.index_select(1, inputs)
            direction = direction if outputs is None else direction.index_select(1, outputs)
            if query.numel() and direction.numel():
                found.append(_Sequence(k, inputs, outputs, query, direction))
        if sum(own.direction.shape[1] * own.query.shape[1] for own in found) <= FLAT:
            for own in found:
                own.gradient = own.direction.T @ own.query
        return found

    def _summed(self, found: Tensor) -> Tensor:
        """The sum over every query's positions [q, n]."""
        return found.reshape(self.queries, -1, found.shape[1]).sum(1)

    def _elementwise(self, d: Tensor, x: Tensor, coefficient: Tensor) -> Tensor:
        if self._sequences is not None:
            return self._by_sequence(self._sequences, d, x, coefficient)
        if self._pairs is not None:
            return self._summed(self._by_pair(self._pairs, d, x, coefficient))
        return self._summed(self._by_position(d, x, coefficient))

    def _by_sequence(self, sequences: Sequence[_Sequence], d: Tensor, x: Tensor, coefficient: Tensor) -> Tensor:
        found = d.new_zeros(self.queries, len(d))
        for one in sequences:
            met = one.of(coefficient) @ _columns(x, one.inputs, by_column=False).T  # [o, n]
            torch.sum(met.mul_(_columns(d, one.outputs, by_column=False).T), 0, out=found[one.number])
        return found

    def _by_pair(self, pairs: Tensor, d: Tensor, x: Tensor, coefficient: Tensor) -> Tensor:
        query, outputs = pairs.unbind(1)
        met = (coefficient.index_select(0, outputs) * self._q.index_select(0, query)) @ x.T  # [pairs, n]
        met *= d.T.index_select(0, outputs)
        return d.new_zeros(len(self._u), len(d)).index_add_(0, query, met.mul_(self._u[query, outputs, None]))

    def _by_position(self, d: Tensor, x: Tensor, coefficient: Tensor) -> Tensor:
        found = d.new_zeros(len(self._u), len(d))
        many = len(self._positions) >= TRANSPOSED
        if many:
            x, d = x.T.contiguous().T, d.T.contiguous().T
        for one in self._positions:
            met = one.of(coefficient) @ _columns(x, one.inputs, many).T  # [o, n]
            met *= _columns(d, one.outputs, many).T
            torch.mv(met.T, one.direction, out=found[one.number])
        return found


def _nonzero(values: Tensor) -> Tensor | None:
    """Where a vector is not zero; None if that is nearly everywhere."""
    found = values.nonzero().squeeze(1)
    return None if len(found) > DENSE * len(values) else found


def _columns(rows: Tensor, chosen: Tensor | None, by_column: bool) -> Tensor:
    """Some columns of rows; ``by_column``: the rows lie column by column in memory."""
    if chosen is None:
        return rows
    return rows.T.index_select(0, chosen).T if by_column else rows.index_select(1, chosen)
