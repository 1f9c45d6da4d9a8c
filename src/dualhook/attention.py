"""What a prediction attends to: the answer object of :meth:`DualMemory.attend`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualhook.errors import DualHookError, LayerError, RuleError
from dualhook.progress import ReplayProgress
from dualhook.query import (
    KEPT,
    Answer,
    Answers,
    Collector,
    GroupSums,
    LayerQuery,
    Receipt,
    TopPatterns,
    Workers,
    scan,
    seal,
)
from dualhook.query.collectors import CRITERIA, Criterion
from dualhook.records import Rows, RowSource
from dualhook.table import Table

__all__ = ["Attention", "Grouping"]


class Grouping:
    """A column as groups: ``code(rows)`` [n] numbers the group of every pattern, ``labels`` name them.

    ``code`` can be pickled.
    """

    def __init__(self, labels: Sequence[Any], code: Callable[[Rows], Tensor]) -> None:
        self.labels = labels
        self.code = code


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
    ) -> Table:
        """The ``k`` patterns per query and layer that come first (``largest=False``: last) by a criterion.

        ``by`` is ``"weight"``, ``"abs_weight"``, ``"contribution"`` or ``"abs_contribution"``. Columns query, layer,
        rank, pattern, sample (-1: not known), step, position, weight, contribution.

        Raises:
            DualHookError: an unknown criterion, layer, or a ``k`` below 1.
            RuleError: contributions of a layer whose optimiser's rule is not registered any more; its attention weights
                can be ranked.
        """
        if by not in CRITERIA:
            raise DualHookError(f"by={by!r}: expected one of {', '.join(CRITERIA)}")
        if not isinstance(k, int) or k < 1:
            raise DualHookError(f"k={k!r}: expected at least 1")
        found = []
        for asked in self._asked(layers):
            if asked.made_of.unknown and by.endswith("contribution"):
                raise RuleError(asked.made_of.unknown)
            top = TopPatterns(k, by, largest)
            self._pass(asked, top)
            result = {name: values.numpy() for name, values in top.result(len(asked)).items()}
            queries, ranks = np.indices(result["pattern"].shape)
            head = {"query": queries, "layer": np.full(queries.shape, asked.name, dtype=object), "rank": ranks + 1}
            found.append({name: values.reshape(-1) for name, values in (head | result).items()})
        return self._by_query(
            found,
            title=f"the {k} {'largest' if largest else 'smallest'} by {by}, per query and layer",
            bars=(("layer", "sample", "step"), by.removeprefix("abs_")),
        )

    def sum_by(self, column: str | Sequence[str], *, layers: str | Iterable[str] | None = None) -> Table:
        """Totals of weight and contribution per group of patterns.

        ``column`` is ``"step"``, ``"sample"``, ``"position"``, a column given to ``recorder.batch`` or one added by
        ``memory.add_column``. Columns query, layer, the column, weight, abs_weight, contribution, abs_contribution;
        the contributions of a query and layer add up to what the patterns put into the prediction (NaN for a layer
        whose optimiser's rule is not registered any more). Several columns, such as ``("sample", "position")``, make a
        group of every combination that occurs, with one more column that counts its patterns.

        Raises:
            DualHookError: an unknown column.
        """
        names = [column] if isinstance(column, str) else list(dict.fromkeys(column))
        if not names:
            raise DualHookError("column=[]: expected at least one column to group by")
        found = []
        for asked in self._asked(layers):
            groups = [self._grouping(asked.name, name) for name in names]
            sizes = [max(1, len(group.labels)) for group in groups]
            sums = GroupSums(len(asked), partial(_combined, [group.code for group in groups], sizes))
            self._pass(asked, sums)
            codes, counts, totals = sums.result()
            shape = (len(asked), len(codes))
            head = {
                "query": np.broadcast_to(np.arange(shape[0])[:, None], shape),
                "layer": np.full(shape, asked.name, dtype=object),
            }
            for name, group, place in zip(names, groups, np.unravel_index(codes.numpy(), sizes), strict=True):
                labels = np.empty(len(group.labels), dtype=object)
                labels[:] = list(group.labels)
                head[name] = np.broadcast_to(_typed(labels[place]), shape)
            tail = {"patterns": np.broadcast_to(counts.numpy(), shape)} if len(names) > 1 else {}
            values = head | {name: total.numpy() for name, total in totals.items()} | tail
            found.append({name: value.reshape(-1) for name, value in values.items()})
        return self._by_query(found, title=f"totals by {', '.join(names)}", bars=(("layer", *names), "contribution"))

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
        return self._by_query(parts, title="receipt", bars=(("query", "layer"), "explained"), footer=False)

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
        footer: bool = True,
    ) -> Table:
        """One table of the layers' parts, ordered by query."""
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.argsort(columns["query"], kind="stable")
        note = self._missing
        if footer:
            explained = torch.cat([receipt.explained for receipt in self._receipts.values()])
            cancelled = torch.cat([receipt.cancellation for receipt in self._receipts.values()])
            preview = any(asked.made_of.preview and asked.made_of.replays for asked in self._layers.values())
            note = (
                f"{'preview, not exact; ' if preview else ''}receipt: explained at least {explained.min():.6f}, "
                f"cancellation {cancelled.min():.3g} to {cancelled.max():.3g}"
                f"{'; ' if self._missing else ''}{self._missing}"
            )
        return Table({n: values[order] for n, values in columns.items()}, title=title, footer=note, bars=bars)


def _combined(codes: Sequence[Callable[[Rows], Tensor]], sizes: Sequence[int], rows: Rows) -> Tensor:
    """The combination of groups [n] that every pattern is in, numbered with the last changing fastest."""
    found = torch.zeros(len(rows), dtype=torch.int64)
    for code, size in zip(codes, sizes, strict=True):
        found = found * size + code(rows)
    return found


def _typed(labels: np.ndarray) -> np.ndarray:
    """Numbers as a numeric array, anything else as it is."""
    return np.array(labels.tolist()) if all(isinstance(label, (int, float)) for label in labels) else labels
