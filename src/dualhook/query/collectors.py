"""What a pass gathers: the strongest patterns, totals per group, the receipt. All of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dualhook.query.streaming import LayerQuery, Scores
from dualhook.records import Rows

__all__ = ["Collector", "Criterion", "GroupSums", "Receipt", "TopPatterns"]

Criterion = Literal["weight", "abs_weight", "contribution", "abs_contribution"]
CRITERIA = ("weight", "abs_weight", "contribution", "abs_contribution")


class Collector(Protocol):
    """Something that sees every block of a pass once."""

    def add(self, scores: Scores) -> None:
        """Take one block."""
        ...


def criterion(scores: Scores, by: Criterion) -> Tensor:
    """One of the four ways to rank patterns [q, n]."""
    values: Tensor = getattr(scores, by.removeprefix("abs_"))
    return values.abs() if by.startswith("abs_") else values


class TopPatterns:
    """The ``k`` patterns per query that a criterion puts first; equal ones in the order of their recording."""

    FIELDS = ("pattern", "sample", "step", "position", "weight", "contribution")

    def __init__(self, k: int, by: Criterion, largest: bool) -> None:
        self.k = k
        self.by = by
        self.largest = largest
        self._best: dict[str, Tensor] = {}
        self._first = 0  # pattern number of the block that was seen last

    def add(self, scores: Scores) -> None:
        found = self._candidates(scores)
        if self._best:  # a replay shows the newest patterns first
            newer = scores.rows.first >= self._first
            pair = (self._best, found) if newer else (found, self._best)
            found = {name: torch.cat([part[name] for part in pair], 1) for name in found}
        self._first = scores.rows.first
        # stable: earlier patterns stand first among equals
        order = found["rank"].sort(dim=1, descending=self.largest, stable=True).indices[:, : self.k]
        self._best = {name: values.gather(1, order) for name, values in found.items()}

    def result(self, queries: int) -> dict[str, Tensor]:
        """The fields, each [q, at most k], best first."""
        empty = torch.zeros((queries, 0))
        return {name: self._best.get(name, empty) for name in self.FIELDS}

    def _candidates(self, scores: Scores) -> dict[str, Tensor]:
        rank = criterion(scores, self.by)
        k = min(self.k, rank.shape[1])
        limit, index = rank.topk(k, dim=1, largest=self.largest)
        limit = limit[:, -1:]
        level = rank == limit
        if int(level.sum()) > int((rank.gather(1, index) == limit).sum()):  # equals were cut off: keep the earliest
            better = rank > limit if self.largest else rank < limit
            index = torch.where(better, 2, level.long()).sort(dim=1, descending=True, stable=True).indices[:, :k]
        index = index.sort(dim=1).values
        rows = scores.rows
        fields = {
            "rank": rank.gather(1, index),
            "pattern": index + rows.first,
            "weight": scores.weight.gather(1, index),
            "contribution": scores.contribution.gather(1, index),
        }
        return fields | {name: getattr(rows, name)[index] for name in ("sample", "step", "position")}


class GroupSums:
    """Totals of weight and contribution, signed and absolute, per group of patterns; groups that occur take room."""

    FIELDS = ("weight", "abs_weight", "contribution", "abs_contribution")

    def __init__(self, queries: int, group_of: Callable[[Rows], Tensor]) -> None:
        self._group_of = group_of
        none = torch.zeros(0, dtype=torch.int64)
        self._summed = [_Summed(none, none, torch.zeros((len(self.FIELDS), queries, 0), dtype=torch.float64))]

    def add(self, scores: Scores) -> None:
        groups = self._group_of(scores.rows)
        totals = [criterion(scores, name).double() for name in self.FIELDS]  # type: ignore[arg-type]
        self._summed.append(_Summed(groups, torch.ones_like(groups), torch.stack(totals)).by_group())
        if sum(len(later.group) for later in self._summed[1:]) > len(self._summed[0].group):
            self._merge()  # seldom enough that each group is moved a few times only

    def result(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The groups [g] that occur, ascending, how many patterns each has [g], and the totals by name [q, g]."""
        self._merge()
        summed = self._summed[0]
        return summed.group, summed.count, dict(zip(self.FIELDS, summed.totals, strict=True))

    def _merge(self) -> None:
        parts = [(each.group, each.count, each.totals) for each in self._summed]
        self._summed = [_Summed(*(torch.cat(part, -1) for part in zip(*parts, strict=True))).by_group()]


@dataclass(frozen=True)
class _Summed:
    """Totals [4, q, g] of ``count`` patterns [g] of each ``group`` [g]."""

    group: Tensor
    count: Tensor
    totals: Tensor

    def by_group(self) -> _Summed:
        """The same with each group once, ascending."""
        group, place = torch.unique(self.group, return_inverse=True)
        count = torch.zeros_like(group).index_add_(0, place, self.count)
        totals = self.totals.new_zeros(*self.totals.shape[:2], len(group)).index_add_(2, place, self.totals)
        return _Summed(group, count, totals)


class Receipt:
    """Does the sum add up? The share of the trained output that the parts explain, and the cancellation."""

    def __init__(self, asked: LayerQuery) -> None:
        self._asked = asked
        self._signed = torch.zeros(len(asked), dtype=torch.float64)
        self._absolute = torch.zeros(len(asked), dtype=torch.float64)
        self.parts: Mapping[str, Tensor] = {}
        """What the layer answers by parts [q, p, o], see :attr:`Pass.parts`; set when the pass is through."""

    def add(self, scores: Scores) -> None:
        self._signed += scores.contribution.sum(1, dtype=torch.float64)
        self._absolute += scores.contribution.abs().sum(1, dtype=torch.float64)

    @property
    def explained(self) -> Tensor:
        """``1 - |W q - a W_0 q - sum| / |W q - a W_0 q|`` per query [q]; the sum holds patterns and weight decay.

        1 where training changed the output by no more than the steps' rounding of ``W q`` itself.
        """
        output = self._asked.output.double()
        trained = output - self.parts["origin"]
        rebuilt = self.parts["patterns"] + self.parts.get("weight-decay", 0.0)
        left, whole = self._size(trained - rebuilt), self._size(trained)
        steps = self._asked.made_of.horizon + 1  # every step has rounded the weight once
        size = self._size(output if self._asked.size is None else self._asked.size.double())
        rounding = 4 * torch.finfo(self._asked.query.dtype).eps * steps**0.5 * size
        nothing = torch.maximum(left, whole) <= rounding
        return torch.where(nothing, 1.0, 1.0 - left / whole)

    def _size(self, values: Tensor) -> Tensor:
        """The norm [q] of what stands at the positions that count."""
        present = self._asked.present
        counted = values if present is None else values * present[..., None]
        norm: Tensor = counted.flatten(1).norm(dim=1)
        return norm

    @property
    def cancellation(self) -> Tensor:
        """Sum of absolute contributions over the absolute value of their sum [q]."""
        return torch.where(self._absolute == 0, 1.0, self._absolute / self._signed.abs())

    def along_direction(self) -> dict[str, Tensor]:
        """What every part puts into the prediction, ``direction · part`` [q]."""
        direction = self._asked.direction.double()
        return {name: (part * direction).sum((1, 2)) for name, part in self.parts.items()}
