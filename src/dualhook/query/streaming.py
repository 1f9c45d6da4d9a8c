"""One pass over a layer's patterns: what every block of rows contributes to every query.

Letters: ``n`` pattern of a block, ``q`` query, ``p`` position of a query (a call of the layer or a place in a
sequence), ``i`` input, ``o`` output, ``t`` step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dualhook.query.parts import Composition
from dualhook.query.preview import Preview
from dualhook.query.replay import Replay
from dualhook.query.scoring import ReplayScores
from dualhook.records import Rows, RowSource

if TYPE_CHECKING:
    from dualhook.query.collectors import Collector

__all__ = ["BLOCK_ROWS", "LayerQuery", "Pass", "Scores", "dual_output", "scan", "scan_known"]

BLOCK_ROWS = 4096
BLOCK_SCORES = 2**24  # numbers of one score matrix: many queries make the blocks shorter


@dataclass(frozen=True)
class LayerQuery:
    """What one layer is asked: its inputs ``query`` [q, p, i] and the ``direction`` [q, p, o] that counts.

    A query with several positions (the layer is called several times for one prediction, or along a sequence) is
    answered by the sum over them. ``output`` [q, p, o] is what the trained layer really gives, for the receipt.
    """

    made_of: Composition
    query: Tensor
    direction: Tensor
    output: Tensor

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.made_of.spec.name

    def __len__(self) -> int:
        return int(self.query.shape[0])


class Scores:
    """One block of rows against all queries; each quantity is computed when a collector asks for it."""

    def __init__(
        self, asked: LayerQuery, rows: Rows, replayed: Tensor | None = None, known: Tensor | None = None
    ) -> None:
        self._asked = asked
        self.rows = rows
        self._known = known
        self._replayed = replayed
        self._dtype = _computing_dtype(rows)

    @cached_property
    def _products(self) -> Tensor:
        """``key · query`` [q, p, n]."""
        return _against(self._asked.query, self.rows.key, self._dtype)

    @cached_property
    def _terms(self) -> list[tuple[Tensor, Tensor]]:
        """What sums to minus the layer's change: attention with coefficient [q, p, n], output gradients [n, o]."""
        made_of, step, d = self._asked.made_of, self.rows.step, self.rows.output_grad.to(self._dtype)
        products, bias = self._products, None if made_of.bias is None else made_of.bias[step].to(self._dtype)
        weight, factor = made_of.weight[step].to(self._dtype), made_of.factor
        if factor is None:  # the bias is one more key component
            attended = products * weight
            return [(attended if bias is None else attended + bias, d)]
        keys = self.rows.key.to(self._dtype) * factor.column[step].to(self._dtype)
        attended = _against(self._asked.query, keys, self._dtype) * weight
        own = (attended, d * factor.row[step].to(self._dtype))
        return [own] if bias is None else [own, (bias.expand_as(products), d)]

    @cached_property
    def weight(self) -> Tensor:
        """Attention weights ``key · query``, the bias's constant 1 included [q, n]."""
        positions = self._asked.query.shape[1]
        return self._products.sum(1) + (0 if self._asked.made_of.bias is None else positions)

    @cached_property
    def contribution(self) -> Tensor:
        """``direction · value (key · query)`` [q, n]; sums to what training has put into the direction."""
        if self._known is not None:
            return self._known
        if self._replayed is not None and self._asked.made_of.only_replays:
            return self._replayed
        along = self._asked.direction
        terms = [(attended * _against(along, d, self._dtype)).sum(1) for attended, d in self._terms]
        by_step = -torch.stack(terms).sum(0) if len(terms) > 1 else -terms[0]
        return by_step if self._replayed is None else by_step + self._replayed

    def output(self) -> Tensor:
        """What the block's coefficients by step add to the layer's output [q, p, o]."""
        terms = [attended @ d for attended, d in self._terms]
        return -torch.stack(terms).sum(0) if len(terms) > 1 else -terms[0]


class Pass:
    """One pass over the patterns of a layer, in whatever order what it is made of asks for.

    ``outputs=True`` also adds up what the layer answers, part by part: :attr:`parts`.
    """

    def __init__(self, source: RowSource, asked: LayerQuery, *, scores: bool = True, outputs: bool = True) -> None:
        self._source = source
        self._asked = asked
        self._outputs = outputs
        self._by_step = torch.zeros((*asked.query.shape[:2], asked.made_of.origin_weight.shape[0]), dtype=torch.float64)
        self._scores = ReplayScores(asked.query, asked.direction) if scores and asked.made_of.replays else None

    def __iter__(self) -> Iterator[Scores]:
        for rows, replayed in self._blocks():
            scores = Scores(self._asked, rows, replayed)
            yield scores
            if self._outputs and not self._asked.made_of.only_replays:
                self._by_step += scores.output()

    @property
    def parts(self) -> Mapping[str, Tensor]:
        """What the layer answers by parts, float64 [q, p, o], once the pass is through; they sum to its output.

        ``origin``, ``patterns``, and where there was coupled weight decay or the optimiser's own rounding under a
        replayed rule, ``weight-decay`` and ``rounding``.
        """
        made_of, query = self._asked.made_of, self._asked.query.double()
        found = {"origin": origin_output(made_of, self._asked.query), "patterns": self._by_step}
        for share in made_of.replays:
            assert share.totals is not None
            for name in ("origin", "patterns", "weight_decay", "rounding"):
                part = getattr(share.totals, name)
                if name in ("origin", "patterns") or part.any():
                    added = query @ part.T if part.ndim == 2 else part.expand(*query.shape[:2], -1)
                    label = name.replace("_", "-")
                    found[label] = found[label] + added if label in found else added
        return found

    def _blocks(self) -> Iterator[tuple[Rows, Tensor | None]]:
        asked = self._asked
        if asked.made_of.replays:
            replay = self._replay(asked.made_of)
            unknown = any(share.totals is None for share in asked.made_of.replays)
            totals = self._outputs and (unknown or asked.made_of.preview)
            yield from replay.backward(self._scores, totals=totals, tick=asked.made_of.tick)
            if totals:
                for share, found in zip(asked.made_of.replays, replay.sums(), strict=True):
                    share.totals = found
                if isinstance(replay, Preview):
                    self._by_step += replay.output.reshape(self._by_step.shape)
            return
        for block in _plain_blocks(self._source, asked):
            yield block, None

    def _replay(self, made_of: Composition) -> Replay | Preview:
        if made_of.preview:
            return Preview(self._source, made_of.spec.name, made_of.replays)
        return Replay(self._source, made_of.spec.name, made_of.replays, budget=made_of.replay_bytes)


def scan(source: RowSource, asked: LayerQuery, collectors: Sequence[Collector], *, outputs: bool = True) -> Pass:
    """Show every block of the layer's patterns to the collectors; the pass that is through."""
    through = Pass(source, asked, outputs=outputs)
    for scores in through:
        for collector in collectors:
            collector.add(scores)
    return through


def scan_known(
    source: RowSource, asked: LayerQuery, contribution: Tensor, first: int, collectors: Sequence[Collector]
) -> None:
    """Show the collectors contributions [q, n] that are known already, of the patterns from number ``first`` on."""
    for rows in _plain_blocks(source, asked):
        start = rows.first - first
        scores = Scores(asked, rows, known=contribution[:, start : start + len(rows)])
        for collector in collectors:
            collector.add(scores)


def _plain_blocks(source: RowSource, asked: LayerQuery) -> Iterator[Rows]:
    """The layer's rows oldest first, in blocks for so many queries."""
    rows = max(1, min(BLOCK_ROWS, BLOCK_SCORES // max(1, asked.query.shape[0] * asked.query.shape[1])))
    return source.blocks(asked.name, last_step=asked.made_of.horizon, block_rows=rows)


def dual_output(source: RowSource, made_of: Composition, query: Tensor) -> Tensor:
    """The layer's output for inputs [..., i] in dual form: origin, plus attention over every training pattern."""
    flat = query.reshape(1, -1, query.shape[-1])
    asked = LayerQuery(made_of.unsummed(), flat, flat, flat)
    through = Pass(source, asked, scores=False)
    for _ in through:
        pass
    total = sum(through.parts.values(), torch.zeros(()))
    return total.reshape(*query.shape[:-1], -1).to(query.dtype)


def origin_output(made_of: Composition, query: Tensor) -> Tensor:
    """What the origin alone answers as far as no replay is needed to know it, float64 [q, p, o]."""
    output = query.double() @ made_of.origin_weight.T
    return output if made_of.origin_bias is None else output + made_of.origin_bias


def _against(query: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Products of [q, p, d] with [n, d], as [q, p, n]."""
    return (query.to(dtype).reshape(-1, query.shape[-1]) @ rows.to(dtype).T).reshape(*query.shape[:2], -1)


def _computing_dtype(rows: Rows) -> torch.dtype:
    return torch.promote_types(rows.key.dtype, torch.float32)
