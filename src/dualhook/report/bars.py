"""Bars for any result table."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from dualhook.table import Table

__all__ = ["draw_bars"]

UNITS = {
    "weight": "attention weight, key · query",
    "abs_weight": "|attention weight|, |key · query|",
    "contribution": "contribution / logit",
    "abs_contribution": "|contribution| / logit",
    "explained": "explained share of the trained output",
    "cancellation": "cancellation, Σ|contribution| / |Σ contribution|",
    "share": "share of all groups' absolute totals",
    "equals_output": "share of predictions whose output the vote is",
}


def draw_bars(table: Table, labels: Sequence[str], value: str, ax: Axes | None = None) -> Axes:
    """Horizontal bars of one column, labelled by others, the first row on top; None counts as no bar."""
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 0.6 + 0.25 * len(table)), layout="constrained")
    names = [" · ".join(str(row[label]) for label in labels) for row in table]
    lengths = [0.0 if length is None else length for length in table[value].tolist()]
    ax.barh(range(len(table)), lengths, color=["#2f6db5" if v >= 0 else "#c8553d" for v in lengths])
    ax.set_yticks(range(len(table)), names)
    ax.invert_yaxis()
    ax.axvline(0, color="#444444", linewidth=0.8)
    ax.set_xlabel(UNITS.get(value, value))
    ax.set_ylabel(" · ".join(labels))
    if table.title:
        ax.set_title(table.title, fontsize="medium")
    return ax
