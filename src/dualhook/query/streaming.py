"""One pass over a layer's patterns: what every block of rows contributes to every query.

Letters: ``n`` pattern of a block, ``q`` query, ``p`` position of a query (a call of the layer or a place in a
sequence), ``i`` input, ``o`` output, ``t`` step.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dualhook.query.answers import Answer, Answers, Started, oldest_first
from dualhook.query.parts import Composition
from dualhook.query.preview import Preview
from dualhook.query.replay import BLOCK_BYTES, Replay
from dualhook.query.scoring import ReplayScores
from dualhook.query.slots import answered, constants, met, products
from dualhook.records import Rows, RowSource

if TYPE_CHECKING:
    from dualhook.query.collectors import Collector

__all__ = ["BLOCK_ROWS", "LayerQuery", "Pass", "Scores", "dual_output", "scan"]

BLOCK_ROWS = 4096
CACHED_SCORES = 2**15  # numbers of one score matrix that stays in the cache: many queries make the blocks shorter, …
LEAST_ROWS = 512  # … but not so short that products lose their speed …
BLOCK_SCORES = 2**24  # … unless the score matrix would grow large
KEPT = 4  # an answer of up to this part of the replay's budget is kept
SAVE_SECONDS = 30.0  # between two times that a long replay saves what it has


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
    slot: Tensor | None = None
    """Which slot of the layer's columns every query fills [q, p], -1 for one that is only padding; None: all."""
    size: Tensor | None = None
    """``|W| |x| + |b|`` [q, p, o]: what the rounding of ``output`` goes with; None: its own size."""
    memory: str = ""
    """What tells the memory and the weights asked about from others: part of the :attr:`key`."""
    present: Tensor | None = None
    """Which positions count [q, p]; the others are zeros that fill up queries of fewer. None: all."""

    @cached_property
    def layer_key(self) -> str:
        """What tells the layer at this horizon from others."""
        return hashlib.sha256(f"{self.memory} {self.name} {self.made_of.horizon}".encode()).hexdigest()[:32]

    @cached_property
    def key(self) -> str:
        """What tells this question from others."""
        made_of = self.made_of
        method = f"{made_of.preview} {made_of.sealed is not None}"
        found = hashlib.sha256(f"{self.memory} {self.name} {made_of.horizon} {method}".encode())
        for values in (self.query, self.direction):
            found.update(f"{values.dtype} {list(values.shape)}".encode())
            found.update(values.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:32]

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.made_of.spec.name

    def __len__(self) -> int:
        return int(self.query.shape[0])


class Scores:
    """One block of rows against all queries; each quantity is computed when a collector asks for it."""

    def __init__(self, asked: LayerQuery, rows: Rows, replayed: Tensor | None = None) -> None:
        self._asked = asked
        self.rows = rows
        self._replayed = replayed
        self._dtype = _computing_dtype(rows)

    @cached_property
    def _products(self) -> Tensor:
        """``key · query`` [q, p, n]; not to be written to."""
        return products(self._asked.query, self._asked.slot, self.rows, self._dtype)

    @cached_property
    def _constants(self) -> Tensor | None:
        """The same of the bias's constant [q, p, n] or [n]; None: 1."""
        return constants(self._asked.slot, self.rows, self._dtype)

    @cached_property
    def _terms(self) -> list[tuple[Tensor, Tensor]]:
        """What sums to minus the layer's change: attention with coefficient [q, p, n], output gradients [n, o]."""
        made_of, step, d = self._asked.made_of, self.rows.step, self.rows.output_grad.to(self._dtype)
        bias = None if made_of.bias is None else made_of.bias[step].to(self._dtype)
        if bias is not None and self._constants is not None:
            bias = bias * self._constants
        weight, factor, sealed = made_of.weight[step].to(self._dtype), made_of.factor, made_of.sealed
        if sealed is not None:
            keys, gradients = sealed.key(self.rows), sealed.output_grad(self.rows).to(self._dtype)
        elif factor is not None:
            keys = self.rows.key.to(self._dtype) * met(self.rows, factor.column[step]).to(self._dtype)
            gradients = d * factor.row[step].to(self._dtype)
        else:  # the bias is one more key component
            attended = self._products * weight
            return [(attended if bias is None else attended + bias, d)]
        keyed = replace(self.rows, key=keys)
        own = (products(self._asked.query, self._asked.slot, keyed, self._dtype) * weight, gradients)
        return [own] if bias is None else [own, (bias.expand_as(self._products), d)]

    @cached_property
    def weight(self) -> Tensor:
        """Attention weights ``key · query``, the bias's constant 1 included [q, n]."""
        if self._asked.made_of.bias is None:
            return _over_positions(self._products)
        ones: Tensor | float = self._constants if self._constants is not None else 1.0
        if self._asked.present is not None:
            ones = ones * self._asked.present[..., None].to(self._dtype)
        return _over_positions(self._products + ones)

    @cached_property
    def contribution(self) -> Tensor:
        """``direction · value (key · query)`` [q, n]; sums to what training has put into the direction."""
        if self._replayed is not None and self._asked.made_of.only_replays:
            return self._replayed
        along = self._asked.direction
        terms = [_over_positions(_against(along, d, self._dtype).mul_(attended)) for attended, d in self._terms]
        by_step = sum(terms[1:], terms[0]).neg_()
        return by_step if self._replayed is None else by_step + self._replayed

    def contribution_of(self, query: Tensor, pattern: Tensor) -> Tensor:
        """Contributions [m] of some of the block's patterns [m], each to one query of [m].

        Where they are few, and the block's contributions not asked for otherwise, other output gradients are not read.
        """
        known = self._replayed is not None or "contribution" in vars(self)
        if known or self._asked.query.shape[1] > 1 or len(pattern) >= len(self.rows):
            return self.contribution[query, pattern]
        along, found = self._asked.direction[query, 0].to(self._dtype), torch.zeros(len(query), dtype=self._dtype)
        for attended, d in self._terms:
            found -= (along * d[pattern]).sum(1).mul_(attended[query, 0, pattern])
        return found

    def output(self) -> Tensor:
        """What the block's coefficients by step add to the layer's output [q, p, o]."""
        terms = [attended @ d for attended, d in self._terms]
        return -torch.stack(terms).sum(0) if len(terms) > 1 else -terms[0]


class Pass:
    """One pass over the patterns of a layer, in whatever order what it is made of asks for.

    ``outputs=True`` also adds up what the layer answers, part by part: :attr:`parts`. What a replay has found is the
    :attr:`answer`, if there is room; a pass that is given one replays nothing. ``unfinished`` is where a long replay
    puts what it has, so that it goes on from there if it is asked again after an interruption.
    """

    def __init__(
        self,
        source: RowSource,
        asked: LayerQuery,
        *,
        scores: bool = True,
        outputs: bool = True,
        answer: Answer | None = None,
        unfinished: Answers | None = None,
    ) -> None:
        self.answer = answer
        self._unfinished = unfinished
        self._previewed: Tensor | None = None  # what previewed patterns add to the output
        self._source = source
        self._asked = asked
        self._outputs = outputs
        self._by_step = torch.zeros((*asked.query.shape[:2], asked.made_of.origin_weight.shape[0]), dtype=torch.float64)
        self._scores = None
        if scores and asked.made_of.replays:
            self._scores = ReplayScores(asked.query, asked.direction, asked.slot, asked.made_of.spec.slots)

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
        found = {"origin": origin_output(self._asked), "patterns": self._by_step}
        for label, added in (self._replayed_parts() if self.answer is None else self.answer.parts).items():
            found[label] = found[label] + added if label in found else added
        if (rounding := self._asked.made_of.rounding) is not None:
            found["rounding"] = found.get("rounding", 0.0) + answered(self._asked.query, self._asked.slot, rounding)
        return found

    def _replayed_parts(self) -> dict[str, Tensor]:
        """What the replayed parameters add to the layer's output, by parts."""
        found = dict[str, Tensor]()
        for share in self._asked.made_of.replays:
            assert share.totals is not None
            for name in ("origin", "patterns", "weight_decay", "rounding"):
                part = getattr(share.totals, name)
                if name in ("origin", "patterns") or part.any():
                    added = self._added(part, is_bias=share.parameter != self._asked.made_of.spec.weight)
                    label = name.replace("_", "-")
                    found[label] = found[label] + added if label in found else added
        if self._previewed is not None:
            found["patterns"] = found["patterns"] + self._previewed
        return found

    def _added(self, part: Tensor, *, is_bias: bool) -> Tensor:
        """What a matrix or a bias adds to the output [q, p, o]."""
        return bias_output(self._asked, part) if is_bias else answered(self._asked.query, self._asked.slot, part)

    def _blocks(self) -> Iterator[tuple[Rows, Tensor | None]]:
        asked = self._asked
        if asked.made_of.replays and self.answer is None:
            yield from self._replayed()
            return
        queries = max(1, asked.query.shape[0] * asked.query.shape[1])
        rows = min(BLOCK_ROWS, max(LEAST_ROWS, CACHED_SCORES // queries), max(1, BLOCK_SCORES // queries))
        yield from self._scanned(rows, None if self.answer is None else self.answer.contribution)

    def _scanned(self, rows: int, scores: Tensor | None, first_step: int = 0) -> Iterator[tuple[Rows, Tensor | None]]:
        """The patterns from ``first_step`` on in blocks, oldest first, with their part of ``scores`` [q, n]."""
        start = 0
        horizon = self._asked.made_of.horizon
        for block in self._source.blocks(self._asked.name, first_step=first_step, last_step=horizon, block_rows=rows):
            yield block, None if scores is None else scores[:, start : start + len(block)]
            start += len(block)

    def _replayed(self) -> Iterator[tuple[Rows, Tensor | None]]:
        asked = self._asked
        shares, budget = asked.made_of.replays, asked.made_of.replay_bytes
        totals = self._outputs and (asked.made_of.preview or any(share.totals is None for share in shares))
        size = len(asked) * self._source.count(asked.name) * max(share.bytes_per_entry for share in shares)
        scores: list[tuple[int, Tensor]] | None = [] if self._scores is not None and size <= budget // KEPT else None
        replay: Replay | Preview
        if asked.made_of.preview:
            replay = Preview(self._source, asked.name, shares)
            through = replay.backward(self._scores, totals=totals)
        else:
            replay = Replay(self._source, asked.name, shares, budget=budget)
            through = self._resumed(replay, totals, scores)
        for rows, found in through:
            if scores is not None and found is not None:
                scores.append((rows.first, found))
            yield rows, found
        if totals:
            for share, summed in zip(shares, replay.sums(), strict=True):
                share.totals = summed
            if isinstance(replay, Preview):
                self._previewed = replay.output.reshape(self._by_step.shape)
        if scores and (totals or not asked.made_of.preview) and all(share.totals is not None for share in shares):
            self.answer = Answer(oldest_first(scores), self._replayed_parts())

    def _resumed(
        self, replay: Replay, totals: bool, scores: list[tuple[int, Tensor]] | None
    ) -> Iterator[tuple[Rows, Tensor | None]]:
        """A replay that goes on from where an earlier one was cut off, and saves now and then how far it is."""
        asked, files = self._asked, self._unfinished if scores is not None else None
        place = f"{asked.key}-{BLOCK_BYTES}-{int(totals)}" if files is not None else ""
        started = Started.of(files.get(place)) if files is not None else Started.none()
        if started.scores is not None and scores is not None:
            yield from self._scanned(BLOCK_ROWS, started.scores, started.step + 1)
        saved = time.monotonic()

        def between(step: int) -> None:
            nonlocal saved
            if files is not None and scores is not None and time.monotonic() - saved >= SAVE_SECONDS:
                files.put(place, Started(step, oldest_first(scores), replay.state()).tensors())
                saved = time.monotonic()

        yield from replay.backward(
            self._scores, totals=totals, tick=asked.made_of.tick, between=between, state=started.state,
            upto=started.upto,
        )  # fmt: skip
        if files is not None:
            files.drop(place)


def scan(
    source: RowSource,
    asked: LayerQuery,
    collectors: Sequence[Collector],
    *,
    outputs: bool = True,
    answer: Answer | None = None,
    unfinished: Answers | None = None,
) -> Pass:
    """Show every block of the layer's patterns to the collectors; the pass that is through."""
    through = Pass(source, asked, outputs=outputs, answer=answer, unfinished=unfinished)
    for scores in through:
        for collector in collectors:
            collector.add(scores)
    return through


def dual_output(source: RowSource, made_of: Composition, query: Tensor) -> Tensor:
    """The layer's output for inputs [..., i] in dual form: origin, plus attention over every training pattern."""
    flat = query.reshape(1, -1, query.shape[-1])
    asked = LayerQuery(made_of.unsummed(), flat, flat, flat)
    through = Pass(source, asked, scores=False)
    for _ in through:
        pass
    total = sum(through.parts.values(), torch.zeros(()))
    return total.reshape(*query.shape[:-1], -1).to(query.dtype)


def origin_output(asked: LayerQuery) -> Tensor:
    """What the origin alone answers as far as no replay is needed to know it, float64 [q, p, o]."""
    output = answered(asked.query, asked.slot, asked.made_of.origin_weight)
    bias = asked.made_of.origin_bias
    return output if bias is None else output + bias_output(asked, bias)


def bias_output(asked: LayerQuery, bias: Tensor) -> Tensor:
    """What a bias [o], or [o, slots], adds to the output [q, p, o]."""
    if asked.slot is None:
        return bias.expand(*asked.query.shape[:2], -1)
    return bias.T[asked.slot.clamp(min=0)]


def _against(query: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Products of [q, p, d] with [n, d], as [q, p, n]."""
    return (query.to(dtype).reshape(-1, query.shape[-1]) @ rows.to(dtype).T).reshape(*query.shape[:2], -1)


def _over_positions(scores: Tensor) -> Tensor:
    """The sum over a query's positions [q, n] of scores [q, p, n]; of one position the scores themselves."""
    return scores[:, 0] if scores.shape[1] == 1 else scores.sum(1)


def _computing_dtype(rows: Rows) -> torch.dtype:
    return torch.promote_types(rows.key.dtype, torch.float32)
