"""The one way results look: named columns that print as a readable table."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import matplotlib.axes
    import pandas as pd

__all__ = ["Table"]

SHOWN = 40  # rows of a printed table; the rest is counted, not shown


class Table:
    """Named columns of equal length.

    ``table["weight"]`` is the column as a numpy array; iterating gives one dict per row. ``bars`` names the columns
    that :meth:`plot` labels its bars with and the one it draws.
    """

    def __init__(
        self,
        columns: Mapping[str, Sequence[Any] | np.ndarray],
        *,
        title: str = "",
        footer: str = "",
        bars: tuple[Sequence[str], str] | None = None,
    ) -> None:
        self._columns = {name: np.asarray(values) for name, values in columns.items()}
        self.title = title
        self.footer = footer
        self._bars = bars

    @property
    def columns(self) -> list[str]:
        """The column names."""
        return list(self._columns)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._columns[name]

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), ()))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in zip(*(values.tolist() for values in self._columns.values()), strict=True):
            yield dict(zip(self._columns, row, strict=True))

    def where(self, **equal: Any) -> Table:
        """The rows whose columns equal the given values."""
        chosen = np.ones(len(self), dtype=bool)
        for name, value in equal.items():
            chosen &= self._columns[name] == value
        cut = {name: values[chosen] for name, values in self._columns.items()}
        return Table(cut, title=self.title, footer=self.footer, bars=self._bars)

    def to_pandas(self) -> pd.DataFrame:
        """The table as a pandas DataFrame (needs ``dualhook[pandas]``)."""
        import pandas as pd

        return pd.DataFrame(self._columns)

    def plot(self, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
        """Draw the table's main column as bars (needs ``dualhook[plot]``); returns the Axes."""
        from dualhook.report.bars import draw_bars

        labels, value = self._bars or (self.columns[:-1], self.columns[-1])
        return draw_bars(self, labels, value, ax)

    def to_text(self, rows: int | None = None) -> str:
        """The printed table, all of it or its first ``rows``."""
        shown = len(self) if rows is None else rows
        cells = [[_cell(value) for value in values[:shown].tolist()] for values in self._columns.values()]
        widths = [max(map(len, [name, *column])) for name, column in zip(self._columns, cells, strict=True)]
        right = [np.issubdtype(values.dtype, np.number) for values in self._columns.values()]

        def line(texts: Sequence[str]) -> str:
            aligned = (t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True))
            return "  ".join(aligned).rstrip()

        lines = [self.title] if self.title else []
        lines += [line(list(self._columns)), line(["─" * width for width in widths])]
        lines += [line(row) for row in zip(*cells, strict=True)]
        if len(self) > shown:
            lines.append(f"… {len(self) - shown:,} more rows: .to_text() shows them all")
        return "\n".join([*lines, self.footer] if self.footer else lines)

    def __repr__(self) -> str:
        return self.to_text(SHOWN)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self._columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_cell(value))}</td>" for value in row.values()) + "</tr>"
            for row, _ in zip(self, range(SHOWN), strict=False)
        )
        note = f"{len(self):,} rows. {self.footer}".strip()
        title, note = html.escape(self.title), html.escape(note)
        return f"<table><caption>{title}</caption><tr>{head}</tr>{body}</table><p>{note}</p>"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if value == value else "nan"
    return str(value)
