"""The report: one HTML file that needs nothing else, made of a memory's answers.

The page's data is one JSON object; :class:`Answers` says what it is made of. Letters: ``q`` query, ``l`` layer.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Protocol

import numpy as np

from dualhook.report.pictures import Pictures
from dualhook.table import Table

__all__ = ["DEFINITIONS", "Answers", "Estimate", "Query", "TrainingText", "page_data", "to_html"]

DEFINITIONS = ("contribution", "abs_contribution", "weight", "abs_weight")
LISTS = {  # what ranks a list, and whether from above
    "contribution": ("contribution", 1),
    "contribution_low": ("contribution", -1),
    "abs_contribution": ("abs_contribution", 1),
    "weight": ("weight", 1),
    "weight_low": ("weight", -1),
    "abs_weight": ("abs_weight", 1),
}
BINS = 60  # bars of the chart over training steps


class TrainingText(Protocol):
    """What a page asks of training text, such as ``Passages`` of the integration of transformers."""

    def around(self, sample: int, position: int) -> str:
        """A passage with its token marked: ``…the «token» and…``."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to a text."""
        ...


@dataclass(frozen=True)
class Query:
    """How a query is shown: names of classes or texts of tokens, a picture, its place in a sequence."""

    name: str
    output: str
    score: float
    truth: str | None = None
    probability: float | None = None
    picture: Any = None
    sequence: int | None = None
    position: int | None = None


@dataclass(frozen=True)
class Estimate:
    """The samples, or tokens, that have ``raised`` and ``lowered`` a prediction's ``about`` most, by an estimate.

    Tables of query, sample, (position), influence. ``missing`` says why there are none.
    """

    about: str
    meaning: str
    raised: Table | None = None
    lowered: Table | None = None
    missing: str = ""


@dataclass(frozen=True)
class Answers:
    """What a page shows."""

    title: str
    facts: Mapping[str, Any]
    layers: Sequence[str]
    queries: Sequence[Query]
    receipt: Table
    parts: Table
    single: Table
    """Patterns: query, layer, sample, position, step, weight, contribution; several rankings one after the other."""
    summed: Table | None
    """The same summed over repeats: query, layer, sample, (position), the four totals."""
    steps: Table
    """Totals by step."""
    totals: Mapping[str, Table]
    """Totals by column; the first one's groups are voted for."""
    k: int
    estimate: Estimate | None = None
    images: Any = None
    text: TrainingText | None = None
    sequences: Sequence[Sequence[str]] = ()
    """The tokens of each prompt."""
    group_name: Callable[[Any], str] = str
    """What a group of the first column is called."""
    sample_group: Callable[[int], str | None] = field(default=lambda sample: None)
    """The group that a training sample is in, by name."""


def page_data(answers: Answers) -> dict[str, Any]:
    """Everything that the page shows, as JSON has it; numbers to six digits."""
    pictures = Pictures()
    lists = _Lists(answers)
    single, summed = lists.of(answers.single, "single"), lists.of(answers.summed, "summed")
    estimated = lists.estimated()
    receipts = {
        (r["query"], r["layer"]): [_digits(r["explained"]), _digits(r["cancellation"])] for r in answers.receipt
    }
    parts: dict[tuple[int, str], dict[str, Any]] = {}
    for row in answers.parts:
        parts.setdefault((row["query"], row["layer"]), {})[row["part"]] = _digits(row["contribution"])
    totals = [_totals(answers, column, table) for column, table in answers.totals.items()]
    return {
        "title": answers.title,
        "facts": dict(answers.facts),
        "kind": "text" if answers.text is not None else "images" if answers.images is not None else "rows",
        "layers": list(answers.layers),
        "queries": [_query(query, pictures) for query in answers.queries],
        "sequences": [list(tokens) for tokens in answers.sequences],
        "receipt": [[receipts[at] for at in _names(answers, q)] for q in _count(answers)],
        "parts": [[parts[at] for at in _names(answers, q)] for q in _count(answers)],
        "top": [
            [{"single": single.get(at), "summed": summed.get(at)} for at in _names(answers, q)] for q in _count(answers)
        ],
        "influence": estimated,
        "samples": {str(sample): _sample(answers, sample, pictures) for sample in sorted(lists.samples)},
        "passages": lists.passages(),
        "totals": totals,
        "votes": _votes(totals[0]) if totals else None,
        "steps": _by_step(answers),
        "pictures": pictures.uris,
    }


def to_html(data: Mapping[str, Any]) -> str:
    """The page of some data, self-contained."""
    room = resources.files("dualhook.report")
    style, script, page = (room.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html"))
    written = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&":  # no text of the data ends the script element or begins a comment
        written = written.replace(sign, f"\\u{ord(sign):04x}")
    before, rest = page.replace("{{title}}", html.escape(str(data["title"]))).split("{{style}}")
    between, rest = rest.split("{{data}}")
    after, end = rest.split("{{script}}")
    return f"{before}{style}{between}{written}{after}{script}{end}"


class _Lists:
    """The entries of rankings, and which samples and passages they name."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self.samples: set[int] = set()
        self._places: set[tuple[int, int]] = set()

    def of(self, table: Table | None, kind: str) -> dict[tuple[int, str], dict[str, Any]]:
        """By query and layer ``entries`` (sample, position, step, weight, contribution), and lists of their numbers."""
        found: dict[tuple[int, str], dict[str, Any]] = {}
        rows: dict[tuple[int, str], dict[tuple[int, ...], dict[str, Any]]] = {}
        for row in table or ():
            thing = row["sample"], row.get("position", 0), row.get("step", 0)
            rows.setdefault((row["query"], row["layer"]), {}).setdefault(thing, row)
        for at, own in rows.items():
            found[at] = self._listed(list(own.values()), single=kind == "single")
        return found

    def estimated(self) -> dict[str, Any] | None:
        """Of each query the ends of an estimate that have the sign: sample, position (None: all of it), influence."""
        estimate = self._answers.estimate
        if estimate is None:
            return None
        found: dict[str, Any] = {name: getattr(estimate, name) for name in ("about", "meaning", "missing")}
        for name, table, way in (("raised", estimate.raised, 1), ("lowered", estimate.lowered, -1)):
            ends: list[list[Any]] = [[] for _ in self._answers.queries]
            for row in table or ():
                if way * row["influence"] > 0:
                    self._name(row["sample"], row.get("position", 0))
                    ends[row["query"]].append([row["sample"], row.get("position"), _digits(row["influence"])])
            found[name] = ends
        return found

    def passages(self) -> dict[str, str]:
        """The training text at every place that is named."""
        text = self._answers.text
        known = [(sample, position) for sample, position in sorted(self._places) if sample >= 0]
        return {} if text is None else {f"{s}:{p}": text.around(s, p) for s, p in known}

    def _listed(self, rows: Sequence[dict[str, Any]], *, single: bool) -> dict[str, Any]:
        numbers: dict[int, int] = {}
        entries: list[list[Any]] = []
        lists: dict[str, list[int]] = {}
        for name, (by, way) in LISTS.items():
            is_known = by in rows[0]
            rank = [row[by] if is_known else abs(row[by.removeprefix("abs_")]) for row in rows]
            chosen, seen = [], set()
            order = [
                (-way * value, row.get("step", 0), n) for n, (value, row) in enumerate(zip(rank, rows, strict=True))
            ]
            for *_, n in sorted(order):
                thing = self._thing(rows[n])
                if thing not in seen:
                    seen.add(thing)
                    chosen.append(n)
                if len(chosen) == self._answers.k:
                    break
            for n in chosen:
                if n not in numbers:
                    numbers[n] = len(entries)
                    entries.append(self._entry(rows[n], single=single))
            lists[name] = [numbers[n] for n in chosen]
        return {"entries": entries, "lists": lists}

    def _thing(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        """What is listed once: an image, a place of a text, or a pattern whose sample is not known."""
        if row["sample"] < 0:
            return row["sample"], row.get("position", 0), row.get("step", 0)
        return (row["sample"],) if self._answers.text is None else (row["sample"], row.get("position", 0))

    def _entry(self, row: Mapping[str, Any], *, single: bool) -> list[Any]:
        sample, position = row["sample"], row.get("position", 0)
        self._name(sample, position)
        step = row["step"] if single else None
        return [sample, position, step, _digits(row["weight"]), _digits(row["contribution"])]

    def _name(self, sample: int, position: int) -> None:
        self.samples.add(sample)
        self._places.add((sample, position))


def _query(query: Query, pictures: Pictures) -> dict[str, Any]:
    return {
        "name": query.name,
        "output": query.output,
        "truth": query.truth,
        "score": _digits(query.score),
        "probability": None if query.probability is None else _digits(query.probability),
        "picture": None if query.picture is None else pictures.number(query.picture),
        "sequence": query.sequence,
        "position": query.position,
    }


def _sample(answers: Answers, sample: int, pictures: Pictures) -> dict[str, Any]:
    known = answers.images is not None and sample >= 0
    return {
        "picture": pictures.number(answers.images[sample]) if known else None,
        "group": answers.sample_group(sample) if sample >= 0 else None,
    }


def _totals(answers: Answers, column: str, table: Table) -> dict[str, Any]:
    """``values`` [q][l][group] of the four definitions, zero where a layer has no pattern of the group."""
    labels = list(dict.fromkeys(table[column].tolist()))
    labels.sort(key=lambda label: (isinstance(label, str), label))
    number = {label: n for n, label in enumerate(labels)}
    at: dict[tuple[int, str], list[list[float | None]]] = {
        (q, layer): [[0.0] * len(DEFINITIONS) for _ in labels] for q in _count(answers) for layer in answers.layers
    }
    for row in table:
        at[row["query"], row["layer"]][number[row[column]]] = [_digits(row[name]) for name in DEFINITIONS]
    first = column == next(iter(answers.totals))
    names = [answers.group_name(label) if first else str(label) for label in labels]
    return {"column": column, "groups": names, "values": [[at[p] for p in _names(answers, q)] for q in _count(answers)]}


def _votes(totals: Mapping[str, Any]) -> dict[str, Any]:
    """By definition the number of the group [q][l] with the largest total; of those without a value none."""
    known = np.array([name != "unknown" for name in totals["groups"]])
    values = np.array(totals["values"], dtype=np.float64)
    if not known.any():
        return {}
    found = np.where(known[:, None], values, -np.inf).argmax(2)
    return {name: found[..., n].tolist() for n, name in enumerate(DEFINITIONS)}


def _by_step(answers: Answers) -> dict[str, Any]:
    """Totals in stretches of training: ``first`` and ``last`` step of each, ``values`` [q][l][stretch]."""
    steps = answers.steps["step"]
    low, high = (int(steps.min()), int(steps.max())) if len(steps) else (0, 0)
    edges = np.unique(np.linspace(low, high + 1, min(BINS, high - low + 1) + 1).round().astype(np.int64))
    bins = np.searchsorted(edges, steps, side="right") - 1
    layer = np.array([answers.layers.index(name) for name in answers.steps["layer"].tolist()], dtype=np.int64)
    shape = (len(answers.queries), len(answers.layers), max(1, len(edges) - 1))
    cell = np.ravel_multi_index((answers.steps["query"], layer, bins), shape) if len(steps) else steps
    sums = [np.bincount(cell, answers.steps[d], math.prod(shape)).reshape(shape) for d in DEFINITIONS]
    values = np.stack(sums, -1)
    digits = [[[[_digits(v) for v in cells] for cells in own] for own in by_layer] for by_layer in values.tolist()]
    return {"first": edges[:-1].tolist(), "last": (edges[1:] - 1).tolist(), "values": digits}


def _digits(value: float) -> float | None:
    """Six significant digits; NaN and infinity, which JSON does not have, as None."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _count(answers: Answers) -> Iterable[int]:
    return range(len(answers.queries))


def _names(answers: Answers, query: int) -> list[tuple[int, str]]:
    return [(query, layer) for layer in answers.layers]
