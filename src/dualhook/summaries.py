"""What a pass over the patterns can be asked for: rankings, totals per group, rankings within groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dualhook.errors import DualHookError, RuleError
from dualhook.query import Collector, GroupSums, LayerQuery, TopPatterns, TopPatternsBy
from dualhook.query.scores import CRITERIA, Criterion
from dualhook.records import Rows

__all__ = ["UNKNOWN", "Grouping", "Ranking", "RankingBy", "Summary", "Totals", "check_criterion"]

Columns = Mapping[str, np.ndarray]
UNKNOWN = "unknown"  # the group of patterns that have no value
MOST_GROUPS = 1000  # of a ranking within groups: each has its own k patterns per query


class Grouping:
    """A column as groups: ``code(rows)`` [n] numbers the group of every pattern, ``labels`` name them.

    ``code`` can be pickled.
    """

    def __init__(self, labels: Sequence[Any], code: Callable[[Rows], Tensor]) -> None:
        self.labels = labels
        self.code = code


Groupings = Callable[[str, str], Grouping]
"""The groups of a layer's patterns by a column."""


class Summary(Protocol):
    """One question to every pattern of a layer."""

    @property
    def title(self) -> str:
        """What the table is."""
        ...

    @property
    def bars(self) -> tuple[Sequence[str], str]:
        """What its bars are labelled with, and what they show."""
        ...

    def start(self, asked: LayerQuery, grouping: Groupings) -> tuple[Collector, Callable[[], Columns]]:
        """What a pass has to gather, and how that becomes columns when it is through."""
        ...


@dataclass(frozen=True)
class Ranking:
    """The ``k`` patterns per query that a criterion puts first, see :meth:`~dualhook.Attention.top`."""

    k: int
    by: Criterion = "contribution"
    largest: bool = True

    def __post_init__(self) -> None:
        check_criterion(self.by)
        if not isinstance(self.k, int) or self.k < 1:
            raise DualHookError(f"k={self.k!r}: expected at least 1")

    @property
    def title(self) -> str:
        return f"the {self.k} {'largest' if self.largest else 'smallest'} by {self.by}, per query and layer"

    @property
    def bars(self) -> tuple[Sequence[str], str]:
        return ("layer", "sample", "step"), self.by.removeprefix("abs_")

    def start(self, asked: LayerQuery, grouping: Groupings) -> tuple[Collector, Callable[[], Columns]]:
        if asked.made_of.unknown and self.by.endswith("contribution"):
            raise RuleError(asked.made_of.unknown)
        top = TopPatterns(self.k, self.by, self.largest)

        def columns() -> Columns:
            return _ranked(top.result(len(asked)), asked.name)

        return top, columns


@dataclass(frozen=True)
class RankingBy(Ranking):
    """The same within each group of a column, see :meth:`~dualhook.Attention.top_by`."""

    column: str = "label"

    @property
    def title(self) -> str:
        return f"{super().title} and {self.column}"

    @property
    def bars(self) -> tuple[Sequence[str], str]:
        return ("layer", self.column, "sample", "step"), self.by.removeprefix("abs_")

    def start(self, asked: LayerQuery, grouping: Groupings) -> tuple[Collector, Callable[[], Columns]]:
        _, _ = super().start(asked, grouping)
        groups = grouping(asked.name, self.column)
        if len(groups.labels) > MOST_GROUPS:
            raise DualHookError(
                f"column {self.column!r} makes {len(groups.labels):,} groups: expected at most {MOST_GROUPS:,} to rank "
                "the patterns of each; sum_by(column, top=k) ranks groups"
            )
        top = TopPatternsBy(self.k, self.by, self.largest, groups.code)

        def columns() -> Columns:
            parts = []
            for group, result in top.result(len(asked)).items():
                ranked = dict(_ranked(result, asked.name))
                label = _typed(_labels(groups)[np.full(len(ranked["query"]), group)])
                parts.append({"query": ranked.pop("query"), "layer": ranked.pop("layer"), self.column: label} | ranked)
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}

        return top, columns


@dataclass(frozen=True)
class Totals:
    """Totals per group of one or several columns, see :meth:`~dualhook.Attention.sum_by`.

    ``top``: of each query and layer only the groups that come first by the total ``by`` (None: all).
    """

    columns: tuple[str, ...]
    top: int | None = None
    by: Criterion = "contribution"
    largest: bool = True

    def __post_init__(self) -> None:
        check_criterion(self.by)
        if not self.columns:
            raise DualHookError("column=[]: expected at least one column to group by")
        if self.top is not None and (not isinstance(self.top, int) or self.top < 1):
            raise DualHookError(f"top={self.top!r}: expected at least 1, or None for all groups")

    @property
    def title(self) -> str:
        whole = f"totals by {', '.join(self.columns)}"
        kind = "largest" if self.largest else "smallest"
        return whole if self.top is None else f"{whole}, the {self.top} {kind} by {self.by}"

    @property
    def bars(self) -> tuple[Sequence[str], str]:
        return ("layer", *self.columns), "contribution" if self.top is None else self.by

    def start(self, asked: LayerQuery, grouping: Groupings) -> tuple[Collector, Callable[[], Columns]]:
        groups = [grouping(asked.name, name) for name in self.columns]
        sizes = [max(1, len(group.labels)) for group in groups]
        sums = GroupSums(len(asked), partial(_combined, [group.code for group in groups], sizes))

        def columns() -> Columns:
            codes, counts, totals = sums.result()
            shape = (len(asked), len(codes))
            head: dict[str, np.ndarray] = {
                "query": np.broadcast_to(np.arange(shape[0])[:, None], shape),
                "layer": np.full(shape, asked.name, dtype=object),
            }
            for name, group, place in zip(self.columns, groups, np.unravel_index(codes.numpy(), sizes), strict=True):
                head[name] = np.broadcast_to(_typed(_labels(group)[place]), shape)
            tail = {"patterns": np.broadcast_to(counts.numpy(), shape)} if len(self.columns) > 1 else {}
            values = head | {name: total.numpy() for name, total in totals.items()} | tail
            chosen = self.chosen(values)
            if chosen is not None:
                values = {name: np.take_along_axis(value, chosen, 1) for name, value in values.items()}
            return {name: value.reshape(-1) for name, value in values.items()}

        return sums, columns

    def chosen(self, values: Columns) -> np.ndarray | None:
        """Which groups of each query to keep [q, m], of totals [q, g]; None: all."""
        if self.top is None:
            return None
        rank = -values[self.by] if self.largest else values[self.by]
        return np.argsort(rank, axis=1, kind="stable")[:, : self.top]


def check_criterion(by: str) -> None:
    """Raises: DualHookError: ``by`` is none of the four definitions."""
    if by not in CRITERIA:
        raise DualHookError(f"by={by!r}: expected one of {', '.join(CRITERIA)}")


def _ranked(result: Mapping[str, Tensor], layer: str) -> Columns:
    """The fields [q, k] of a ranking as columns."""
    fields = {name: values.numpy() for name, values in result.items()}
    queries, ranks = np.indices(fields["pattern"].shape)
    head = {"query": queries, "layer": np.full(queries.shape, layer, dtype=object), "rank": ranks + 1}
    return {name: values.reshape(-1) for name, values in (head | fields).items()}


def _combined(codes: Sequence[Callable[[Rows], Tensor]], sizes: Sequence[int], rows: Rows) -> Tensor:
    """The combination of groups [n] that every pattern is in, numbered with the last changing fastest."""
    found = torch.zeros(len(rows), dtype=torch.int64)
    for code, size in zip(codes, sizes, strict=True):
        found = found * size + code(rows)
    return found


def _labels(group: Grouping) -> np.ndarray:
    labels = np.empty(len(group.labels), dtype=object)
    labels[:] = list(group.labels)
    return labels


def _typed(labels: np.ndarray) -> np.ndarray:
    """Numbers as a numeric array, anything else as it is."""
    return np.array(labels.tolist()) if all(isinstance(label, (int, float)) for label in labels) else labels
