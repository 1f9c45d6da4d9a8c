"""Tables as lists of rows: to CSV and Markdown and back, and their mean and deviation over seeds."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> Rows:
    """Numbers come back as numbers, an empty cell as None."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def over_seeds(tables: Sequence[Rows], keys: Sequence[str]) -> Rows:
    """Mean and deviation (of the sample; of one seed there is none) of every number, by the columns ``keys``.

    A seed without a value, None, does not count; ``seeds`` says how many tables a row is of.
    """
    groups: dict[tuple[Any, ...], Rows] = {}
    for table in tables:
        for row in table:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = []
    for group, rows in groups.items():
        summary: dict[str, Any] = dict(zip(keys, group, strict=True)) | {"seeds": len(rows)}
        for name in [name for name in rows[0] if name not in keys]:
            values = [row[name] for row in rows if row[name] is not None]
            summary[name] = statistics.fmean(values) if values else None
            summary[f"{name}_deviation"] = statistics.stdev(values) if len(values) > 1 else None
        found.append(summary)
    return found


def to_markdown(rows: Rows, title: str) -> str:
    """A table; a number and its deviation over seeds stand in one cell."""
    if not rows:
        return ""
    names = [name for name in rows[0] if not name.endswith("_deviation")]
    lines = [f"### {title}", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row, name) for name in names) + " |" for row in rows]
    return "\n".join([*lines, "", ""])


def _cell(row: Mapping[str, Any], name: str) -> str:
    deviation = row.get(f"{name}_deviation")
    text = "" if row[name] is None else f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name])
    return text if deviation is None else f"{text} ± {deviation:.2g}"


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None
