"""The paper's statistics, of tables of totals: votes of classes, how often they are right, how uneven totals are.

Letters: ``q`` query, ``g`` group (a class, a task). A total is one of four definitions: ``weight``, ``abs_weight``
(``sum |key · query|``, the paper's), ``contribution``, ``abs_contribution``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dualhook.errors import DualHookError
from dualhook.summaries import UNKNOWN
from dualhook.table import Table

__all__ = ["agreement", "spread", "votes"]

DEFINITIONS = ("weight", "abs_weight", "contribution", "abs_contribution")


def votes(totals: Table, column: str, by: str) -> Table:
    """The group with the largest total ``by`` of each query and layer of ``totals``; of equal ones the first.

    Patterns without a group have no vote. ``share`` is the total over the sum of all groups' absolute totals: 1 where
    one group has everything. Columns query, layer, the column, by, total, share.
    """
    rows = []
    for query, layer, own in _each(totals, column):
        total = own[by]
        best, whole = int(np.argmax(total)), float(np.abs(total).sum())
        share = float(total[best]) / whole if whole else 0.0
        rows.append((query, layer, own[column].tolist()[best], by, float(total[best]), share))
    names = ("query", "layer", column, "by", "total", "share")
    return Table(
        {name: [row[n] for row in rows] for n, name in enumerate(names)},
        title=f"votes of {column} by {by}",
        bars=(("query", "layer", column), "share"),
    )


def agreement(
    ballots: Sequence[Table],
    column: str,
    targets: Sequence[Any] | np.ndarray | Tensor,
    outputs: Sequence[Any] | np.ndarray | Tensor,
) -> Table:
    """How often votes are the queries' targets and the model's outputs: the paper's predictive power.

    Separately for all predictions, for correct ones (output and target are the same) and for wrong ones; shares of
    ``queries``, None where there are none. Columns layer, by, predictions, queries, equals_target, equals_output.

    Raises:
        DualHookError: not one target and one output for every query.
    """
    target, output = (np.asarray(v.cpu() if isinstance(v, Tensor) else v) for v in (targets, outputs))
    size = 1 + max((int(ballot["query"].max(initial=-1)) for ballot in ballots), default=-1)
    for name, given in (("targets", target), ("outputs", output)):
        if given.shape != (size,):
            raise DualHookError(f"{name} of shape {list(given.shape)}: expected one for each of the {size} queries")
    correct = target == output
    rows = []
    for ballot in ballots:
        for layer in dict.fromkeys(ballot["layer"].tolist()):
            own = ballot.where(layer=layer)
            query, vote = own["query"], own[column]
            kinds = {"all": np.ones(len(own), dtype=bool), "correct": correct[query], "wrong": ~correct[query]}
            for kind, among in kinds.items():
                shares = [
                    float((vote == truth[query])[among].mean()) if among.any() else None for truth in (target, output)
                ]
                rows.append((layer, str(own["by"][0]), kind, int(among.sum()), *shares))
    names = ("layer", "by", "predictions", "queries", "equals_target", "equals_output")
    return Table(
        {name: [row[n] for row in rows] for n, name in enumerate(names)},
        title=f"how often the vote of {column} is the target and the output",
        bars=(("layer", "by", "predictions"), "equals_output"),
    )


def spread(totals: Table, column: str) -> Table:
    """The variance of the groups' totals over the square of their mean absolute value, by each definition.

    0 where all groups have the same total, ``g - 1`` where one of ``g`` has everything. Columns query, layer, weight,
    abs_weight, contribution, abs_contribution.
    """
    rows = []
    for query, layer, own in _each(totals, column):
        scale = [float(np.abs(own[name]).mean()) for name in DEFINITIONS]
        found = [
            float(own[name].var()) / mean**2 if mean else 0.0 for name, mean in zip(DEFINITIONS, scale, strict=True)
        ]
        rows.append((query, layer, *found))
    names = ("query", "layer", *DEFINITIONS)
    return Table(
        {name: [row[n] for row in rows] for n, name in enumerate(names)},
        title=f"normalised variance of totals by {column}",
        bars=(("query", "layer"), "abs_weight"),
    )


def _each(totals: Table, column: str) -> Iterator[tuple[int, str, Table]]:
    """The groups of every query and layer, those without a value left out."""
    known = np.array([value != UNKNOWN for value in totals[column].tolist()], dtype=bool)
    query, layer = totals["query"], totals["layer"]
    for q in np.unique(query).tolist():
        for name in dict.fromkeys(layer[query == q].tolist()):
            own = known & (query == q) & (layer == name)
            if own.any():
                yield q, name, Table({column: totals[column][own]} | {d: totals[d][own] for d in DEFINITIONS})
