"""What a pass gathers: the strongest patterns, totals per group, the receipt. All of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualhook.query.scores import Criterion, LayerQuery, Scores
from dualhook.records import Rows

__all__ = ["GroupSums", "Receipt", "TopPatterns", "TopPatternsBy", "rankings"]

NEW = "new"  # among the fields of a ranking: the place among the candidates of the block at hand …
KNOWN = -1  # … or that all is known of a pattern


class Bar:
    """The criterion [q, 1] and the number of the last of ``k`` patterns per query, which others have to be ahead of.

    Shared by all that rank patterns for one question; what one of them knows spares the others candidates. That it may
    not have heard of the newest best does no harm.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def lift(self, rank: Tensor, pattern: Tensor, largest: bool) -> None:
        """Hear of the last of ``k``."""
        if (last := self._last) is not None:
            ahead = rank > last[0] if largest else (rank < last[0]) | last[0].isnan()
            ahead |= (rank == last[0]) & (pattern < last[1])
            rank, pattern = torch.where(ahead, rank, last[0]), torch.where(ahead, pattern, last[1])
        self._last = rank.clone(), pattern.clone()  # views would keep all of the best

    def least(self, first: int, largest: bool) -> Tensor | None:
        """What patterns from number ``first`` on must not be behind [q, 1]; None: all are welcome."""
        if self._last is None:
            return None
        rank, pattern = self._last
        above = torch.nextafter(rank, torch.full_like(rank, torch.inf if largest else -torch.inf))
        return torch.where(pattern < first, above, rank)  # the earlier one of equals stays


class TopPatterns:
    """The ``k`` patterns per query that a criterion puts first; equal ones in the order of their recording."""

    FIELDS = ("pattern", "sample", "step", "position", "weight", "contribution")

    def __init__(self, k: int, by: Criterion, largest: bool, bar: Bar | None = None) -> None:
        self.k = k
        self.by = by
        self.largest = largest
        self._bar = bar or Bar()
        self._best: dict[str, Tensor] = {}
        behind = {"rank": -torch.inf if largest else torch.nan, "pattern": torch.iinfo(torch.int64).max}
        self._behind = {**behind, NEW: KNOWN}

    def fresh(self) -> TopPatterns:
        return TopPatterns(self.k, self.by, self.largest, self._bar)

    def add(self, scores: Scores, among: Tensor | None = None) -> None:
        """Take in a block, or those of its patterns ``among`` [m] which to choose."""
        ahead = self._ahead(*self._bounds(scores, among), scores.rows.first)
        query, index = ahead.nonzero().unbind(1)
        if not len(query):
            return
        index = index if among is None else among.to(index.device)[index]
        found = self._found(scores, query, index)
        counts = torch.bincount(query.cpu(), minlength=len(ahead))
        full = self._held() == self.k
        chosen = counts.nonzero()[:, 0] if full else torch.arange(len(ahead))
        counts = counts[chosen]
        row = torch.repeat_interleave(counts)
        at = row, torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
        best = {}
        for name, values in found.items():
            table = values.new_full((len(chosen), int(counts.max())), self._behind.get(name, 0))
            table[at] = values
            best[name] = torch.cat([self._best[name][chosen], table], 1) if self._best else table
        best = self._first_of(best)
        self._complete(best, scores, query, index)
        self._keep({n: v.index_copy(0, chosen, best[n]) for n, v in self._best.items()} if full else best)

    def leaves_few(self, scores: Scores, among: Tensor | None = None) -> bool:
        """Whether bounds alone leave few patterns of a block that may be among the first."""
        worst, best = self._bounds(scores, among)
        if worst.shape[1] <= self.k:
            return True
        last = self._last_of(worst)
        left = best > last if self.largest else best < last  # scores that are exactly alike are told by their numbers
        # a pair takes about as long as 30 scores of a product
        return int(left.sum()) <= len(worst) * (4 * self.k + worst.shape[1] // 32)

    def found(self) -> dict[str, Tensor]:
        return self._best

    def merge(self, found: dict[str, Tensor]) -> None:
        if found and self._best:
            found = self._first_of({name: torch.cat([own, found[name]], 1) for name, own in self._best.items()})
        self._keep(found or self._best)

    def result(self, queries: int) -> dict[str, Tensor]:
        """The fields, each [q, at most k], best first."""
        empty = torch.zeros((queries, 0))
        return {name: self._best.get(name, empty) for name in self.FIELDS}

    def _held(self) -> int:
        """How many patterns there are of each query, or how much room."""
        return self._best["rank"].shape[1] if self._best else 0

    def _keep(self, best: dict[str, Tensor]) -> None:
        self._best = best
        if self._held() == self.k:
            self._bar.lift(best["rank"][:, -1:], best["pattern"][:, -1:], self.largest)

    def _bounds(self, scores: Scores, among: Tensor | None) -> tuple[Tensor, Tensor]:
        """The worst and the best that patterns of a block, or some of them, can rank, both [q, m]."""
        lower, upper = scores.bounds(self.by)
        if among is not None:
            among, exact = among.to(lower.device), lower is upper
            lower = lower[:, among]
            upper = lower if exact else upper[:, among]
        return (lower, upper) if self.largest else (upper, lower)

    def _last_of(self, worst: Tensor) -> Tensor:
        """The last of the ``k`` first."""
        return worst.topk(self.k, dim=1, largest=self.largest).values[:, -1:]

    def _not_behind(self, best: Tensor, last: Tensor) -> Tensor:
        """NaN is the largest, as in sort."""
        return torch.lt(best, last).logical_not_() if self.largest else torch.gt(best, last).logical_not_()

    def _ahead(self, worst: Tensor, best: Tensor, first: int) -> Tensor:
        """Which patterns of a block may be among the ``k`` first so far, by the worst and best [q, n] they can rank.

        The block begins with pattern number ``first``.
        """
        last = self._bar.least(first, self.largest)
        if last is None and worst.shape[1] <= self.k:
            return torch.ones_like(worst, dtype=torch.bool)
        return self._not_behind(best, self._last_of(worst) if last is None else last.to(best.device))

    def _first_of(self, best: dict[str, Tensor]) -> dict[str, Tensor]:
        """The ``k`` that come first of candidates [q, m], in order."""
        for name, descending in (("pattern", False), ("rank", self.largest)):  # equal ones by their number
            order = best[name].sort(dim=1, descending=descending, stable=True).indices
            order = order if name == "pattern" else order[:, : self.k]
            best = {field: values.gather(1, order) for field, values in best.items()}
        return best

    def _found(self, scores: Scores, query: Tensor, index: Tensor) -> dict[str, Tensor]:
        """What is known of new patterns with an ``index`` [m] in the block, each for one ``query`` [m]."""
        rank, rows, index = scores.of_pairs(self.by, query, index).cpu(), scores.rows, index.cpu()
        found = {"rank": rank, "pattern": index + rows.first, NEW: torch.arange(len(index))}
        found |= {name: getattr(rows, name)[index] for name in ("sample", "step", "position")}
        return found | {"weight": rank, "contribution": rank}  # what is not ranked by is completed later

    def _complete(self, best: dict[str, Tensor], scores: Scores, query: Tensor, index: Tensor) -> None:
        """Work out what is not known yet of the new ones that have stayed."""
        new = best[NEW] != KNOWN
        chosen = best[NEW][new].to(query.device)
        best[NEW][new] = KNOWN
        for name in ("weight", "contribution"):
            if name != self.by:
                best[name][new] = scores.of_pairs(name, query[chosen], index[chosen]).to(best[name])


class TopPatternsBy:
    """The same within every group of patterns; meant for few groups."""

    def __init__(
        self, k: int, by: Criterion, largest: bool, group_of: Callable[[Rows], Tensor],
        bars: dict[int, Bar] | None = None,
    ) -> None:  # fmt: skip
        self._settings = k, by, largest
        self._group_of = group_of
        self._bars = {} if bars is None else bars
        self._tops: dict[int, TopPatterns] = {}

    def fresh(self) -> TopPatternsBy:
        return TopPatternsBy(*self._settings, self._group_of, self._bars)

    def add(self, scores: Scores) -> None:
        for group, among in self._groups(scores):
            self._top(group).add(scores, among)

    def leaves_few(self, scores: Scores) -> bool:
        """Whether bounds alone leave few patterns of a block that may be among the first of their group."""
        return all(TopPatterns(*self._settings).leaves_few(scores, among) for _, among in self._groups(scores))

    def found(self) -> dict[int, dict[str, Tensor]]:
        return {group: top.found() for group, top in self._tops.items()}

    def merge(self, found: dict[int, dict[str, Tensor]]) -> None:
        for group, best in found.items():
            self._top(group).merge(best)

    def result(self, queries: int) -> dict[int, dict[str, Tensor]]:
        """By group, ascending: the fields, each [q, at most k], best first."""
        return {group: self._tops[group].result(queries) for group in sorted(self._tops)}

    def _groups(self, scores: Scores) -> Iterator[tuple[int, Tensor]]:
        """The groups of a block, each with its patterns."""
        groups = self._group_of(scores.rows)
        for group in torch.unique(groups).tolist():
            yield group, (groups == group).nonzero()[:, 0]

    def _top(self, group: int) -> TopPatterns:
        if group not in self._tops:
            self._tops[group] = TopPatterns(*self._settings, self._bars.setdefault(group, Bar()))
        return self._tops[group]


def rankings(collectors: Sequence[object]) -> list[TopPatterns | TopPatternsBy]:
    """The collectors, if none of them looks at more than the best: bounds on other scores will do. Else none."""
    found = [own for own in collectors if isinstance(own, (TopPatterns, TopPatternsBy))]
    return found if len(found) == len(collectors) else []


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
            total.index_add_(1, place, scores.by(name).cpu().double())
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
