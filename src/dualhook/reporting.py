"""``memory.report(...)``: some predictions and what they rest on, asked in one pass per layer and written as a page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dualhook.attention import Attention
from dualhook.errors import DualHookError
from dualhook.model import Positions, Target, model_inputs
from dualhook.query.scores import Criterion
from dualhook.report.page import Answers, Estimate, Query, TrainingText, page_data, to_html
from dualhook.summaries import Ranking, Totals
from dualhook.table import Table

if TYPE_CHECKING:
    from dualhook.memory import DualMemory

__all__ = ["write_report"]

MOST_SUMMED = 200_000  # samples, or patterns of a text, that are summed over their repeats
MOST_BARS = 200  # groups of a column that are drawn
AHEAD = 16  # patterns of a ranking for each place of a text that is listed
MOST_RANKED = 4096  # patterns of a ranking, in which an image comes again every epoch
RANKED: tuple[Criterion, ...] = ("contribution", "weight")  # from both ends, which hold the absolute rankings too
GROUPS = ("label", "class", "document", "task")  # columns that are shown where they are


def write_report(
    memory: DualMemory,
    model: nn.Module,
    inputs: Any = None,
    path: str | os.PathLike[str] = "report.html",
    *,
    images: Any = None,
    passages: TrainingText | None = None,
    labels: Sequence[int] | np.ndarray | Tensor | None = None,
    classes: Sequence[str] | None = None,
    column: str | None = None,
    query_images: Any = None,
    title: str = "What these predictions rest on",
    k: int = 8,
    target: Target = None,
    positions: Positions = None,
    layers: str | Iterable[str] | None = None,
    method: Any = "exact",
    influence: Literal["auto", "decayed", "cosine"] | None = "auto",
    cache: bool = False,
    **named: Any,
) -> Path:
    """Write what some predictions attend to as one HTML file that needs no network.

    One pass per layer; some dozens of queries make a page of a few megabytes.

    Args:
        memory: this memory.
        model: the trained model, as for :meth:`attend`.
        inputs: what it is asked, as for :meth:`attend`.
        path: the file to write; an earlier one is replaced.
        images: the training images by dataset row: a data set, a list, a tensor [n, c, h, w], …; items may be
            tensors, arrays or PIL images, alone or first in a tuple. Needs Pillow (``dualhook[plot]``).
        passages: the training text (``Passages`` of the integration of transformers). The inputs are then token ids,
            and every position of a single prompt is a query unless ``positions`` says otherwise.
        labels: the true class of each query.
        classes: names of the classes by number.
        column: the memory's column whose totals are drawn and which votes; default the first of label, class,
            document that there is. A column ``task`` is drawn beside it.
        query_images: the queries as they are to be shown, by number; default the inputs, where they are images.
        title: the heading.
        k: training samples listed per query, layer and ranking.
        target: as for :meth:`attend`.
        positions: as for :meth:`attend`.
        layers: as for :meth:`attend`.
        method: as for :meth:`attend`.
        influence: how to estimate which samples (tokens of a text) would have changed each prediction, apart from the
            exact contributions: ``"decayed"``, the better one, which fits first and keeps what it has fitted beside the
            memory; ``"cosine"``, one pass more, for lists; None: not at all. Default: ``"cosine"``, and where that has
            no answer (samples without names, an average of the weights, …) the page says why.
        cache: as for :meth:`attend`.
        **named: keyword arguments of the model in place of ``inputs``.

    Returns:
        The file's path.

    Raises:
        DualHookError: no such column, not one label per query, images that cannot be shown, and as :meth:`attend`.
    """
    inputs = model_inputs(inputs, named)
    prompts = _prompts(inputs) if passages is not None else []
    if passages is not None and positions is None and len(prompts) == 1:
        positions = range(len(prompts[0]))
    attention = memory.attend(
        model, inputs, target=target, positions=positions, layers=layers, method=method, cache=cache
    )
    if column is not None and column not in memory.columns:
        raise DualHookError(f"no column {column!r}: expected one of {', '.join(memory.columns)}")
    shown = _columns(memory, column)
    names = _Names(memory, classes, shown[0] if shown else None, images)
    truths = _truths(labels, len(attention), names)
    pictures = query_images if query_images is not None else _pictures(inputs) if images is not None else None
    if pictures is not None and len(pictures) != len(attention):
        raise DualHookError(f"{len(pictures)} query images: expected one for each of the {len(attention)} queries")
    samples = len(memory.samples)
    found = _ask(memory, attention, k, shown, samples=samples, by_place=passages is not None)
    asked = {"target": target, "positions": positions, "layers": layers}
    answers = Answers(
        title=title,
        facts=_facts(memory, attention, samples, method),
        layers=attention.layers,
        queries=[
            _query(row, names, passages, truths[n], None if pictures is None else pictures[n])
            for n, row in enumerate(attention.queries)
        ],
        receipt=attention.receipt,
        parts=attention.parts,
        single=found.single,
        summed=found.summed,
        steps=found.steps,
        totals=found.totals,
        k=k,
        estimate=_estimate(memory, model, inputs, influence, k, asked, by_place=passages is not None),
        images=images,
        text=passages,
        sequences=[passages.pieces(ids) for ids in prompts] if passages is not None else (),
        group_name=names.group,
        sample_group=names.of_sample,
    )
    written = Path(path)
    written.write_text(to_html(page_data(answers)), encoding="utf-8")
    return written


@dataclass(frozen=True)
class _Found:
    single: Table
    summed: Table | None
    steps: Table
    totals: Mapping[str, Table]


@dataclass(frozen=True)
class _Ends(Totals):
    """Of each query and layer the groups at the end of any ranking, some of them several times."""

    def chosen(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        ways = [(name, largest) for name in RANKED for largest in (True, False)]
        ways += [("abs_weight", True), ("abs_contribution", True)]
        found = [Totals(self.columns, self.top, name, largest).chosen(values) for name, largest in ways]
        return np.concatenate([part for part in found if part is not None], axis=1)


def _ask(
    memory: DualMemory, attention: Attention, k: int, shown: Sequence[str], *, samples: int, by_place: bool
) -> _Found:
    """Everything that the page shows, in one pass per layer; more where few samples fill many places of a ranking."""
    patterns = max(map(memory.patterns, attention.layers))
    # a first layer weighs an image the same in every epoch, so that it fills as many places
    kept = AHEAD * k if by_place else min(k * (1 + patterns // max(1, samples)), MOST_RANKED)

    def ranked() -> list[Ranking]:
        return [Ranking(kept, by, largest) for by in RANKED for largest in (True, False)]

    thing = ("sample", "position") if by_place else ("sample",)
    things = patterns if by_place and samples else samples
    summed = [_Ends(thing, k)] if 0 < things <= MOST_SUMMED else []
    totals = [Totals((name,)) for name in ("step", *shown)]
    answers = attention.gather(*ranked(), *totals, *summed)
    first, steps, rest = answers[:4], answers[4], answers[5:]
    distinct = [_of_distinct(table, thing, k) for table in first]
    while any(_is_short(own, k) and (table["rank"] == kept).any() for table, own in zip(first, distinct, strict=True)):
        kept *= 4
        first = attention.gather(*ranked())
        distinct = [_of_distinct(table, thing, k) for table in first]
    by_column = {name: table for name, table in zip(shown, rest, strict=False) if _groups(table, name) <= MOST_BARS}
    columns = {name: np.concatenate([table[name] for table in distinct]) for name in distinct[0].columns}
    return _Found(Table(columns), rest[len(shown)] if summed else None, steps, by_column)


def _estimate(
    memory: DualMemory, model: nn.Module, inputs: Any, method: Any, k: int, asked: Mapping[str, Any], *, by_place: bool
) -> Estimate | None:
    """What would have changed the predictions; None: that is not to be said."""
    if method is None:
        return None
    chosen: Any = "cosine" if method == "auto" else method
    about = "number asked about" if callable(asked["target"]) else "margin"
    try:
        found = memory.influence(model, inputs, method=chosen, per="token" if by_place else "sample", **asked)
    except DualHookError as error:
        if method != "auto":
            raise
        return Estimate(about, chosen, missing=str(error))
    return Estimate(about, found.meaning, found.top(k), found.bottom(k))


def _groups(table: Table, column: str) -> int:
    return len(set(table[column].tolist()))


def _of_distinct(table: Table, thing: Sequence[str], k: int) -> Table:
    """The first ``k`` rows of each query and layer of a ranking that name different samples; unknown ones' all do."""
    layer = np.unique(table["layer"], return_inverse=True)[1]
    pattern = np.where(table["sample"] < 0, table["pattern"], -1)
    _, first = np.unique(
        np.stack([table["query"], layer, *(table[name] for name in thing), pattern]), axis=1, return_index=True
    )
    first.sort()
    asked = table["query"][first] * (1 + layer.max(initial=0)) + layer[first]
    order = asked.argsort(kind="stable")
    begins = np.searchsorted(asked[order], asked[order])
    chosen = np.sort(first[order[np.arange(len(order)) - begins < k]])
    return Table({name: table[name][chosen] for name in table.columns})


def _is_short(distinct: Table, k: int) -> bool:
    """Whether fewer than ``k`` rows are of some query and layer."""
    return len(distinct) < k * len(set(zip(distinct["query"].tolist(), distinct["layer"].tolist(), strict=True)))


class _Names:
    """What classes, groups and samples are called."""

    def __init__(self, memory: DualMemory, classes: Sequence[str] | None, column: str | None, images: Any) -> None:
        self._classes = classes
        self._values = memory._columns.of_samples(column) if column else None
        self._images = images

    def group(self, value: Any) -> str:
        if self._classes is not None and isinstance(value, (int, float)) and 0 <= value < len(self._classes):
            return str(self._classes[int(value)])
        return str(value)

    def of_sample(self, sample: int) -> str | None:
        if self._values is not None:
            return self.group(self._values[sample]) if sample < len(self._values) else None
        item = self._images[sample] if self._images is not None else None
        if isinstance(item, tuple) and len(item) > 1 and np.ndim(item[1]) == 0:
            return self.group(item[1].item() if isinstance(item[1], Tensor) else item[1])
        return None


def _columns(memory: DualMemory, column: str | None) -> list[str]:
    """The columns to draw, the one that votes first."""
    there = [name for name in GROUPS if name in memory.columns]
    first = [column] if column is not None else there[:1]
    return list(dict.fromkeys([*first, *(name for name in there if name == "task")]))


def _query(row: Mapping[str, Any], names: _Names, text: TrainingText | None, truth: str | None, picture: Any) -> Query:
    number = row.get("target")
    if number is None:
        output = "the function asked about"
    else:
        output = text.pieces([number])[0] if text is not None else names.group(number)
    return Query(
        name=f"query {row['query'] + 1}",
        output=output,
        score=row["score"],
        truth=truth,
        probability=row.get("probability"),
        picture=picture,
        sequence=row.get("sequence"),
        position=row.get("position"),
    )


def _truths(labels: Any, queries: int, names: _Names) -> list[str | None]:
    if labels is None:
        return [None] * queries
    values = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if values.shape != (queries,):
        raise DualHookError(f"labels of shape {list(values.shape)}: expected one for each of the {queries} queries")
    return [names.group(value) for value in values.tolist()]


def _pictures(inputs: Any) -> Tensor | None:
    """The inputs as pictures, where they are: [q, c, h, w], [q, h, w], or rows that are square."""
    if isinstance(inputs, Mapping):
        inputs = tuple(inputs.values())
    first = inputs[0] if isinstance(inputs, (tuple, list)) and len(inputs) else inputs
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return None
    square = first.ndim == 2 and round(first.shape[1] ** 0.5) ** 2 == first.shape[1]
    return first if square or first.ndim == 3 or (first.ndim == 4 and first.shape[1] in (1, 3, 4)) else None


def _prompts(inputs: Any) -> list[list[int]]:
    """The real tokens of each sequence."""
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim != 2:
        raise DualHookError("a report with passages is of token ids: expected inputs with input_ids [sequence, token]")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return [own[seen].tolist() for own, seen in zip(ids, real, strict=True)]


def _facts(memory: DualMemory, attention: Attention, samples: int, method: str) -> dict[str, Any]:
    return {
        "memory": "/".join(str(memory.path).replace(os.sep, "/").rsplit("/", 2)[-2:]),
        "steps": memory.steps,
        "samples": samples,
        "patterns": [memory.patterns(layer) for layer in attention.layers],
        "optimizer": ", ".join(dict.fromkeys(str(name) for name in memory.info()["optimizer"].tolist())),
        "preview": method == "preview",
    }
