"""What a pass gathers: the strongest patterns, totals per group, the receipt. All of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dualhook.query.scores import LayerQuery, Scores
from dualhook.records import Rows

__all__ = ["Criterion", "GroupSums", "Receipt", "TopPatterns", "TopPatternsBy"]

Criterion = Literal["weight", "abs_weight", "contribution", "abs_contribution"]
CRITERIA = ("weight", "abs_weight", "contribution", "abs_contribution")


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
        self._behind = {"rank": -torch.inf if largest else torch.nan, "pattern": torch.iinfo(torch.int64).max}
        self._first = 0  # pattern number of the block that was seen last

    def fresh(self) -> TopPatterns:
        return TopPatterns(self.k, self.by, self.largest)

    def add(self, scores: Scores, among: Tensor | None = None) -> None:
        """Take in a block, or those of its patterns ``among`` [m] which to choose."""
        rank = criterion(scores, self.by)
        rank = rank if among is None else rank[:, among.to(rank.device)]
        ahead = self._ahead(rank, scores.rows.first)
        query, index = ahead.nonzero().unbind(1)
        self._first = scores.rows.first
        if not len(query):
            return
        chosen, counts = torch.unique_consecutive(query.cpu(), return_counts=True)
        row = torch.repeat_interleave(counts)
        at = row, torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        best = {}
        ranked, index = rank[query, index], index if among is None else among.to(index.device)[index]
        for name, values in self._fields(scores, ranked, query, index).items():
            found = values.new_full((len(chosen), int(counts.max())), self._behind.get(name, 0))
            found[at] = values
            best[name] = torch.cat([self._best[name][chosen], found], 1) if self._best else found
        best = self._first_of(best)
        every = len(chosen) == len(ahead)  # as long as they are fewer than k
        self._best = best if every else {n: v.index_copy(0, chosen, best[n]) for n, v in self._best.items()}

    def found(self) -> dict[str, Tensor]:
        return self._best

    def merge(self, found: dict[str, Tensor]) -> None:
        if found and self._best:
            found = self._first_of({name: torch.cat([own, found[name]], 1) for name, own in self._best.items()})
        self._best = found or self._best

    def result(self, queries: int) -> dict[str, Tensor]:
        """The fields, each [q, at most k], best first."""
        empty = torch.zeros((queries, 0))
        return {name: self._best.get(name, empty) for name in self.FIELDS}

    def _ahead(self, rank: Tensor, first: int) -> Tensor:
        """Which patterns of a block, ``rank`` [q, n] from number ``first`` on, may be among the ``k`` best so far."""
        held = self._best.get("rank")
        if held is None or held.shape[1] < self.k:
            if rank.shape[1] <= self.k:
                return torch.ones_like(rank, dtype=torch.bool)
            last = rank.topk(self.k, dim=1, largest=self.largest).values[:, -1:]
            return ~(rank < last) if self.largest else ~(rank > last)
        last = held[:, -1:].to(rank.device)
        if first >= self._first:  # the earlier one of equals stays; a replay shows the newest patterns first
            return ~(rank <= last) if self.largest else ~(rank >= last)  # NaN is the largest, as in sort
        return ~(rank < last) if self.largest else ~(rank > last)

    def _first_of(self, best: dict[str, Tensor]) -> dict[str, Tensor]:
        """The ``k`` that come first of candidates [q, m], in order."""
        for name, descending in (("pattern", False), ("rank", self.largest)):  # equal ones by their number
            order = best[name].sort(dim=1, descending=descending, stable=True).indices
            order = order if name == "pattern" else order[:, : self.k]
            best = {field: values.gather(1, order) for field, values in best.items()}
        return best

    def _fields(self, scores: Scores, rank: Tensor, query: Tensor, index: Tensor) -> dict[str, Tensor]:
        """What is kept of the patterns with a ``rank`` [m] and an ``index`` [m] in the block, each for one query."""
        rows, weight = scores.rows, scores.weight[query, index].cpu()
        contribution, index = scores.contribution_of(query, index).cpu(), index.cpu()
        found = {"rank": rank.cpu(), "pattern": index + rows.first, "weight": weight, "contribution": contribution}
        return found | {name: getattr(rows, name)[index] for name in ("sample", "step", "position")}


class TopPatternsBy:
    """The same within every group of patterns; meant for few groups."""

    def __init__(self, k: int, by: Criterion, largest: bool, group_of: Callable[[Rows], Tensor]) -> None:
        self._settings = k, by, largest
        self._group_of = group_of
        self._tops: dict[int, TopPatterns] = {}

    def fresh(self) -> TopPatternsBy:
        return TopPatternsBy(*self._settings, self._group_of)

    def add(self, scores: Scores) -> None:
        groups = self._group_of(scores.rows)
        for group in torch.unique(groups).tolist():
            self._top(group).add(scores, (groups == group).nonzero()[:, 0])

    def found(self) -> dict[int, dict[str, Tensor]]:
        return {group: top.found() for group, top in self._tops.items()}

    def merge(self, found: dict[int, dict[str, Tensor]]) -> None:
        for group, best in found.items():
            self._top(group).merge(best)

    def result(self, queries: int) -> dict[int, dict[str, Tensor]]:
        """By group, ascending: the fields, each [q, at most k], best first."""
        return {group: self._tops[group].result(queries) for group in sorted(self._tops)}

    def _top(self, group: int) -> TopPatterns:
        return self._tops.setdefault(group, TopPatterns(*self._settings))


class GroupSums:
    """Totals of weight and contribution, signed and absolute, per group of patterns; groups that occur take room.

    ``fields`` are those of them that are wanted: the others are not computed.
    """

    FIELDS: tuple[Criterion, ...] = ("weight", "abs_weight", "contribution", "abs_contribution")

    def __init__(
        self, queries: int, group_of: Callable[[Rows], Tensor], fields: tuple[Criterion, ...] = FIELDS
    ) -> None:
        self._queries = queries
        self._group_of = group_of
        self._fields = fields
        none = torch.zeros(0, dtype=torch.int64)
        self._summed = [_Summed(none, none, torch.zeros((len(fields), queries, 0), dtype=torch.float64))]

    def fresh(self) -> GroupSums:
        return GroupSums(self._queries, self._group_of, self._fields)

    def add(self, scores: Scores) -> None:
        groups = self._group_of(scores.rows)
        group, place = torch.unique(groups, return_inverse=True)
        totals = torch.zeros((len(self._fields), self._queries, len(group)), dtype=torch.float64)
        for total, name in zip(totals, self._fields, strict=True):
            total.index_add_(1, place, criterion(scores, name).cpu().double())
        self.merge(_Summed(group, torch.bincount(place, minlength=len(group)), totals))

    def found(self) -> _Summed:
        self._merge()
        return self._summed[0]

    def merge(self, found: _Summed) -> None:
        self._summed.append(found)
        if sum(len(later.group) for later in self._summed[1:]) > len(self._summed[0].group):
            self._merge()  # seldom enough that each group is moved a few times only

    def result(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The groups [g] that occur, ascending, how many patterns each has [g], and the totals by name [q, g]."""
        summed = self.found()
        return summed.group, summed.count, dict(zip(self._fields, summed.totals, strict=True))

    def _merge(self) -> None:
        parts = [(each.group, each.count, each.totals) for each in self._summed]
        self._summed = [_Summed(*(torch.cat(part, -1) for part in zip(*parts, strict=True))).by_group()]


@dataclass(frozen=True)
class _Summed:
    """Totals [f, q, g] of ``count`` patterns [g] of each ``group`` [g]."""

    group: Tensor
    count: Tensor
    totals: Tensor

    def by_group(self) -> _Summed:
        """The same with each group once, ascending."""
        group, place = torch.unique(self.group, return_inverse=True)
        count = torch.zeros_like(group).index_add_(0, place, self.count)
        totals = self.totals.new_zeros(*self.totals.shape[:2], len(group)).index_add_(2, place, self.totals)
        return _Summed(group, count, totals)


class Cancellation:
    """Sums of contributions, signed and absolute [q]."""

    def __init__(self, queries: int) -> None:
        self.signed = torch.zeros(queries, dtype=torch.float64)
        self.absolute = torch.zeros(queries, dtype=torch.float64)

    def fresh(self) -> Cancellation:
        return Cancellation(len(self.signed))

    def add(self, scores: Scores) -> None:
        self.signed += scores.contribution.sum(1, dtype=torch.float64).cpu()
        self.absolute += scores.contribution.abs().sum(1, dtype=torch.float64).cpu()

    def found(self) -> Cancellation:
        return self

    def merge(self, found: Cancellation) -> None:
        self.signed += found.signed
        self.absolute += found.absolute


class Receipt:
    """Does the sum add up? The share of the trained output that the parts explain, and the cancellation."""

    def __init__(self, asked: LayerQuery) -> None:
        self._asked = asked
        self.sums = Cancellation(len(asked))
        """What a pass has to gather for it."""
        self.parts: Mapping[str, Tensor] = {}
        """What the layer answers by parts [q, p, o], see :attr:`Pass.parts`; set when the pass is through."""

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
        return torch.where(self.sums.absolute == 0, 1.0, self.sums.absolute / self.sums.signed.abs())

    def along_direction(self) -> dict[str, Tensor]:
        """What every part puts into the prediction, ``direction · part`` [q]."""
        direction = self._asked.direction.double()
        return {name: (part * direction).sum((1, 2)) for name, part in self.parts.items()}
