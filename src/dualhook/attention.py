"""What a prediction attends to: the answer object of :meth:`DualMemory.attend`."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dualhook.errors import DualHookError, LayerError
from dualhook.host import asked_on_host
from dualhook.index import KeyIndex
from dualhook.progress import ReplayProgress
from dualhook.query import (
    KEPT,
    Answer,
    Answers,
    Collector,
    LayerQuery,
    Receipt,
    Scores,
    Workers,
    scan,
    seal,
)
from dualhook.query.scores import CRITERIA, Criterion
from dualhook.records import RowSource
from dualhook.statistics import agreement, spread, votes
from dualhook.summaries import Grouping, Ranking, RankingBy, Summary, Totals, check_criterion
from dualhook.table import Table

if TYPE_CHECKING:
    import matplotlib.axes

__all__ = ["Attention"]


@asked_on_host
class Attention:
    """The attention of some queries over every training pattern, computed when asked.

    The first answer of any kind also brings the receipt (:attr:`receipt`): each question is one pass over the
    patterns of its layers, in memory that does not grow with their number. Under optimisers that have to be replayed
    the contributions of all patterns are kept as long as they take no more than a quarter of ``memory.replay_bytes``,
    so that further questions need no replay.

    - attention weight: ``key · query``, the constant 1 of a trained bias included; signed
    - contribution: ``direction · value (key · query)``: what the pattern put into the prediction, in logits
    """

    def __init__(
        self,
        source: RowSource,
        layers: Sequence[LayerQuery],
        grouping: Callable[[str, str], Grouping],
        *,
        queries: Table,
        progress: ReplayProgress,
        keep: object = None,
        files: Answers | None = None,
        missing: str = "",
        workers: Workers,
    ) -> None:
        self._missing = missing
        self._workers = workers
        self._files = files
        self._answers: dict[str, Answer] = {}
        self._source = source
        self._progress = progress
        self._layers = {asked.name: asked for asked in layers}
        self._grouping = grouping
        self._queries = queries
        self._keep = keep  # what the source's files need to stay
        self._receipts: dict[str, Receipt] = {}

    @property
    def layers(self) -> list[str]:
        """The layers asked."""
        return list(self._layers)

    @property
    def queries(self) -> Table:
        """What is asked: columns query, target (class, token) and score; of sequences sequence, position, probability.

        score is the number that contributions are parts of: the logit of ``target``, or what a function made of the
        output. Positions count the sequence's real tokens from 0; probability is that of ``target`` under a softmax.
        """
        return self._queries

    def __len__(self) -> int:
        return len(next(iter(self._layers.values())))

    def top(
        self,
        k: int = 10,
        *,
        by: Criterion = "contribution",
        largest: bool = True,
        layers: str | Iterable[str] | None = None,
        index: KeyIndex | None = None,
    ) -> Table:
        """The ``k`` patterns per query and layer that come first (``largest=False``: last) by a criterion.

        ``by`` is ``"weight"``, ``"abs_weight"``, ``"contribution"`` or ``"abs_contribution"``. Columns query, layer,
        rank, pattern, sample (-1: not known), step, position, weight, contribution.

        With an ``index`` (:meth:`DualMemory.index`) the largest by ``"weight"`` are found without a pass over all
        patterns: their numbers are exact, but some others may be missing, which the footer says. There is no receipt
        then, and no contribution (NaN) where a replay would have to find it.

        Raises:
            DualHookError: an unknown criterion, layer, or a ``k`` below 1; an index of something else, or asked for
                anything but the largest weights.
            RuleError: contributions of a layer whose optimiser's rule is not registered any more; its attention weights
                can be ranked.
        """
        ranking = Ranking(k, by, largest)
        return self.gather(ranking, layers=layers)[0] if index is None else self._near(index, ranking, layers)

    def top_by(
        self,
        column: str,
        k: int = 10,
        *,
        by: Criterion = "contribution",
        largest: bool = True,
        layers: str | Iterable[str] | None = None,
    ) -> Table:
        """The same within every group of a column of at most 1,000 groups: the strongest patterns of each class.

        Columns as of :meth:`top`, the column behind layer; ``step`` shows when in training they came.

        Raises:
            DualHookError: as :meth:`top`, and an unknown column or one of too many groups.
        """
        return self.gather(RankingBy(k, by, largest, column), layers=layers)[0]

    def sum_by(
        self,
        column: str | Sequence[str],
        *,
        top: int | None = None,
        by: Criterion = "contribution",
        largest: bool = True,
        layers: str | Iterable[str] | None = None,
    ) -> Table:
        """Totals of weight and contribution per group of patterns.

        ``column`` is ``"step"``, ``"sample"``, ``"position"``, a column given to ``recorder.batch`` or one added by
        ``memory.add_column``. Columns query, layer, the column, weight, abs_weight, contribution, abs_contribution;
        the contributions of a query and layer add up to what the patterns put into the prediction (NaN for a layer
        whose optimiser's rule is not registered any more). Several columns, such as ``("sample", "position")``, make a
        group of every combination that occurs, with one more column that counts its patterns.

        ``top`` keeps the groups of each query and layer whose total ``by`` comes first (``largest=False``: last):
        ``sum_by("sample", top=10)`` names the training samples that count most over all their repeats.

        Raises:
            DualHookError: an unknown column or criterion, or a ``top`` below 1.
        """
        names = (column,) if isinstance(column, str) else tuple(dict.fromkeys(column))
        return self.gather(Totals(names, top, by, largest), layers=layers)[0]

    def vote(
        self, column: str = "label", *, by: Criterion = "abs_weight", layers: str | Iterable[str] | None = None
    ) -> Table:
        """The group that each query's patterns speak for, the one with the largest total.

        It changes with the definition ``by``; ``"abs_weight"`` is the paper's. Columns query, layer, the column, by,
        total, share, as of :func:`~dualhook.statistics.votes`.

        Raises:
            DualHookError: an unknown column or criterion.
        """
        check_criterion(by)
        return votes(self.sum_by(column, layers=layers), column, by)

    def predictive_power(
        self,
        column: str = "label",
        *,
        targets: Sequence[Any] | np.ndarray | Tensor,
        outputs: Sequence[Any] | np.ndarray | Tensor | None = None,
        layers: str | Iterable[str] | None = None,
    ) -> Table:
        """How often the vote, by each definition, is the target and how often the model's output.

        ``targets`` are the true groups of the queries, ``outputs`` those that the model gives (default the classes
        asked about, which are the predicted ones unless ``target`` was given). Columns layer, by, predictions (all,
        correct, wrong), queries, equals_target, equals_output, as of :func:`~dualhook.statistics.agreement`.

        Raises:
            DualHookError: an unknown column, or not one target and output per query.
        """
        given = self._queries["target"] if outputs is None else outputs
        totals = self.sum_by(column, layers=layers)
        return agreement([votes(totals, column, by) for by in CRITERIA], column, targets, given)

    def spread(self, column: str = "label", *, layers: str | Iterable[str] | None = None) -> Table:
        """How unevenly the totals of a query lie over the groups: normalised variance.

        Columns query, layer, weight, abs_weight, contribution, abs_contribution, as of
        :func:`~dualhook.statistics.spread`.
        """
        return spread(self.sum_by(column, layers=layers), column)

    def gather(self, *summaries: Summary, layers: str | Iterable[str] | None = None) -> list[Table]:
        """Several questions (:mod:`dualhook.summaries`) in one pass per layer; a table each."""
        found: list[list[Mapping[str, np.ndarray]]] = [[] for _ in summaries]
        for asked in self._asked(layers):
            started = [summary.start(asked, self._grouping) for summary in summaries]
            self._pass(asked, *(collector for collector, _ in started))
            for parts, (_, columns) in zip(found, started, strict=True):
                parts.append(columns())
        return [
            self._by_query(parts, title=summary.title, bars=summary.bars)
            for parts, summary in zip(found, summaries, strict=True)
        ]

    @property
    def receipt(self) -> Table:
        """Does it add up? Columns query, layer, explained, cancellation.

        explained: ``1 - |W q - a W_0 q - sum| / |W q - a W_0 q|``, 1 where origin and patterns are the whole output.
        cancellation: sum of absolute contributions over the absolute value of their sum; 100 to 700 is normal, and
        says that single contributions are large terms of a small difference.
        """
        self._complete()
        parts = [
            {
                "query": np.arange(len(asked)),
                "layer": np.full(len(asked), name, dtype=object),
                "explained": self._receipts[name].explained.numpy(),
                "cancellation": self._receipts[name].cancellation.numpy(),
            }
            for name, asked in self._layers.items()
        ]
        return self._by_query(parts, title="receipt", bars=(("query", "layer"), "explained"), note=self._missing)

    @property
    def parts(self) -> Table:
        """What a layer's answer is made of, along the direction: columns query, layer, part, contribution.

        Parts are ``origin`` (the untrained weights, decayed, with the optimiser's state where recording began),
        ``patterns`` (the sum of all contributions), under optimisers with a replayed rule ``weight-decay`` (what
        coupled weight decay put into the weights through the preconditioner) and ``rounding`` (of the optimiser
        itself), and ``residual``: what is left of the layer's output.
        """
        self._complete()
        rows = []
        for name, asked in self._layers.items():
            along = self._receipts[name].along_direction()
            whole = (asked.direction.double() * asked.output.double()).sum((1, 2))
            along["residual"] = whole - sum(along.values(), torch.zeros(()))
            rows += [(q, name, part, float(values[q])) for q in range(len(asked)) for part, values in along.items()]
        rows.sort(key=lambda row: row[0])
        names = ("query", "layer", "part", "contribution")
        table = {column: [row[k] for row in rows] for k, column in enumerate(names)}
        return Table(table, title="parts", bars=(("layer", "part"), "contribution"))

    @property
    def explained(self) -> Table:
        """The receipt's explained share: columns query, layer, explained."""
        return self._of_receipt("explained")

    @property
    def cancellation(self) -> Table:
        """The receipt's cancellation: columns query, layer, cancellation."""
        return self._of_receipt("cancellation")

    def plot(self, query: int = 0, k: int = 5, ax: matplotlib.axes.Axes | None = None) -> matplotlib.axes.Axes:
        """Draw one query's ``k`` largest contributions per layer (needs ``dualhook[plot]``); returns the Axes."""
        return self.top(k).where(query=query).plot(ax)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self._queries._repr_html_()}"

    def __repr__(self) -> str:
        return f"Attention of {len(self)} queries in {', '.join(self._layers)}: ask .top(10), .sum_by(...), .receipt"

    def _of_receipt(self, name: str) -> Table:
        whole = self.receipt
        return Table({c: whole[c] for c in ("query", "layer", name)}, title=name, bars=(("query", "layer"), name))

    def _asked(self, layers: str | Iterable[str] | None) -> list[LayerQuery]:
        names = list(self._layers) if layers is None else [layers] if isinstance(layers, str) else list(layers)
        for name in names:
            if name not in self._layers:
                raise LayerError(f"layer {name!r} was not asked: this attention has {', '.join(self._layers)}")
        return [self._layers[name] for name in names]

    def _near(self, index: KeyIndex, ranking: Ranking, layers: str | Iterable[str] | None) -> Table:
        """What an index finds first."""
        if ranking.by != "weight" or not ranking.largest:
            raise DualHookError("an index knows the largest attention weights: ask by='weight', or without index=")
        parts = []
        for asked in self._asked(index.layer if layers is None else layers):
            index.check(asked)
            numbers, rows = index.nearest(asked.query.sum(1), ranking.k)
            replayed = None
            if asked.made_of.replays or asked.made_of.sealed is not None:
                asked = replace(asked, made_of=replace(asked.made_of, sealed=None))
                replayed = torch.full((len(asked), len(rows)), torch.nan)
            top, columns = ranking.start(asked, self._grouping)
            top.add(Scores(asked, rows, replayed))
            found = columns()
            parts.append({**found, "pattern": numbers.numpy()[found["pattern"]]})
        note = f"approximate: {index!r}; no receipt{'; ' if self._missing else ''}{self._missing}"
        return self._by_query(parts, title=ranking.title, bars=ranking.bars, note=note)

    def _complete(self) -> None:
        """Every layer's receipt."""
        for asked in self._layers.values():
            if asked.name not in self._receipts:
                self._pass(asked)

    def _pass(self, asked: LayerQuery, *collectors: Collector) -> None:
        asked = self._sealed(asked)
        receipt = None if asked.name in self._receipts else Receipt(asked)
        answer = self._answer(asked)
        with self._progress.over(self._source, [] if answer else [asked.made_of], len(asked)):
            through = scan(
                self._source,
                asked,
                [*collectors, *([receipt.sums] if receipt else [])],
                outputs=receipt is not None,
                answer=answer,
                unfinished=self._files,
                workers=self._workers,
            )
        if receipt:
            receipt.parts = through.parts
            self._receipts[asked.name] = receipt
        if through.answer is not None and answer is None:
            if self._files is not None:
                self._files.put(asked.key, through.answer.tensors())
            held = sum(kept.nbytes for kept in self._answers.values()) + through.answer.nbytes
            if held <= asked.made_of.replay_bytes // KEPT:
                self._answers[asked.name] = through.answer

    def _sealed(self, asked: LayerQuery) -> LayerQuery:
        """The question to rows that are sealed beside the memory, where that can be."""
        if self._files is not None and asked.made_of.replays:
            replaying = self._progress.over(self._source, [asked.made_of])
            made_of = seal(self._source, asked.made_of, self._files, asked.layer_key, replaying)
            if made_of is not asked.made_of:
                asked = self._layers[asked.name] = replace(asked, made_of=made_of)
        return asked

    def _answer(self, asked: LayerQuery) -> Answer | None:
        """What an earlier replay has found."""
        if asked.name in self._answers or self._files is None or not asked.made_of.replays:
            return self._answers.get(asked.name)
        found = self._files.get(asked.key)
        return Answer.of(found, queries=len(asked), patterns=self._source.count(asked.name))

    def _by_query(
        self,
        parts: Sequence[Mapping[str, np.ndarray]],
        *,
        title: str,
        bars: tuple[Sequence[str], str],
        note: str | None = None,
    ) -> Table:
        """One table of the layers' parts, ordered by query, with a ``note``, by default of what receipts say."""
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.argsort(columns["query"], kind="stable")
        if note is None:
            explained = torch.cat([receipt.explained for receipt in self._receipts.values()])
            cancelled = torch.cat([receipt.cancellation for receipt in self._receipts.values()])
            preview = any(asked.made_of.preview and asked.made_of.replays for asked in self._layers.values())
            note = (
                f"{'preview, not exact; ' if preview else ''}receipt: explained at least {explained.min():.6f}, "
                f"cancellation {cancelled.min():.3g} to {cancelled.max():.3g}"
                f"{'; ' if self._missing else ''}{self._missing}"
            )
        return Table({n: values[order] for n, values in columns.items()}, title=title, footer=note, bars=bars)
