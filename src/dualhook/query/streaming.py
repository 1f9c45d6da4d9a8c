"""One pass over a layer's patterns, by tasks or by a replay, and what it adds up to.

Letters: ``n`` pattern, ``q`` query, ``p`` position of a query, ``i`` input, ``o`` output.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from dualhook.query.answers import Answer, Answers, Started, oldest_first
from dualhook.query.collectors import TopPatterns, TopPatternsBy, rankings
from dualhook.query.parts import Composition
from dualhook.query.preview import Preview
from dualhook.query.replay import BLOCK_BYTES, Replay
from dualhook.query.scores import LayerQuery, Scores
from dualhook.query.scoring import ReplayScores
from dualhook.query.screening import pays
from dualhook.query.slots import answered
from dualhook.query.tasks import HERE, Collector, Task, Workers
from dualhook.records import Piece, Rows, RowSource

__all__ = ["BLOCK_ROWS", "Pass", "dual_output", "scan"]

TASK_ROWS = 2**15  # patterns of a task, at least
BLOCK_ROWS = 16384
CACHED_SCORES = (
    2**17
)  # numbers of one score matrix that stays in the processor's cache: many queries make the blocks shorter, …
LEAST_ROWS = 512  # … but not so short that products lose their speed …
BLOCK_SCORES = 2**24  # … unless the score matrix would grow large
SCREENED_ROWS, SCREENED_SCORES = 2**11, 2**19  # of a block that is looked at in 16 bits first
KEPT = 4  # an answer of up to this part of the replay's budget is kept
SAVE_SECONDS = 30.0  # between two times that a long replay saves what it has


class Pass:
    """One pass over the patterns of a layer, in whatever order what it is made of asks for.

    ``outputs=True`` also adds up what the layer answers, part by part: :attr:`parts`. What a replay has found is the
    :attr:`answer`, if there is room; a pass that is given one replays nothing. ``unfinished`` is where a long replay
    puts what it has, so that it goes on from there if it is asked again after an interruption. ``workers`` do what
    is no replay.
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
        workers: Workers = HERE,
    ) -> None:
        self.answer = answer
        self._workers = workers
        self._unfinished = unfinished
        self._previewed: Tensor | None = None  # what previewed patterns add to the output
        self._source = source
        self._asked = asked
        self._outputs = outputs
        self._by_step = torch.zeros((*asked.query.shape[:2], asked.made_of.origin_weight.shape[0]), dtype=torch.float64)
        self._scores = None
        if scores and asked.made_of.replays:
            self._scores = ReplayScores(asked.query, asked.direction, asked.slot, asked.made_of.spec.slots)

    def run(self, collectors: Sequence[Collector]) -> None:
        """Show every block of patterns to the collectors."""
        if self._asked.made_of.replays and self.answer is None:
            for rows, replayed in self._replayed():
                scores = Scores(self._asked, rows, replayed)
                for collector in collectors:
                    collector.add(scores)
                if self._outputs and not self._asked.made_of.only_replays:
                    self._by_step += scores.output()
            return
        screened = self._is_screened(collectors)
        with self._workers.doing(self._tasks(collectors, screened=screened), screened=screened) as results:
            for done in results:
                for collector, found in zip(collectors, done.found, strict=True):
                    collector.merge(found)
                if done.output is not None:
                    self._by_step += done.output
                self._source.worked_on(done.patterns)

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

    def _is_screened(self, collectors: Sequence[Collector]) -> bool:
        """Whether a first look in 16 bits spares most scores, to judge by a block of new patterns and one of older."""
        query, ranked = self._asked.query, self._rankings(collectors)
        if not ranked or not pays(len(query), query.shape[-1], self._workers.device):
            return False
        tasks = list(islice(self._tasks(collectors, screened=True), 2))
        return bool(tasks) and all(task.leaves_few(ranked) for task in tasks)

    def _rankings(self, collectors: Sequence[Collector]) -> list[TopPatterns | TopPatternsBy]:
        """The collectors, if nothing in the pass looks at more than the best."""
        return [] if self._outputs else rankings(collectors)

    def _tasks(self, collectors: Sequence[Collector], *, screened: bool) -> Iterator[Task]:
        """The pass in runs of pieces, oldest first; if only the best are looked for, far apart."""
        asked, device = self._asked, self._workers.device
        queries = max(1, asked.query.shape[0] * asked.query.shape[1])
        cached = SCREENED_SCORES if screened else CACHED_SCORES if device == "cpu" else BLOCK_SCORES
        rows = min(BLOCK_ROWS, max(LEAST_ROWS, cached // queries), max(1, BLOCK_SCORES // queries))
        if screened:
            rows = min(rows, SCREENED_ROWS)
        outputs = self._outputs and not asked.made_of.only_replays
        runs = _numbered(_runs(self._source.pieces(asked.name, last_step=asked.made_of.horizon)))
        for start, pieces in _far_apart(list(runs)) if self._rankings(collectors) else runs:
            replayed = None
            if self.answer is not None:
                stop = start + sum(piece.count for piece in pieces)
                replayed = self.answer.contribution[:, start:stop].clone()
            fresh = [collector.fresh() for collector in collectors]
            yield Task(pieces, asked.of(pieces), fresh, rows, outputs, replayed, device, screened)

    def _scanned(self, rows: int, scores: Tensor, first_step: int) -> Iterator[tuple[Rows, Tensor]]:
        """The patterns from ``first_step`` on in blocks, oldest first, with their part of ``scores`` [q, n]."""
        start = 0
        horizon = self._asked.made_of.horizon
        for block in self._source.blocks(self._asked.name, first_step=first_step, last_step=horizon, block_rows=rows):
            yield block, scores[:, start : start + len(block)]
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
    workers: Workers = HERE,
) -> Pass:
    """Show every block of the layer's patterns to the collectors; the pass that is through."""
    through = Pass(source, asked, outputs=outputs, answer=answer, unfinished=unfinished, workers=workers)
    through.run(collectors)
    return through


def dual_output(source: RowSource, made_of: Composition, query: Tensor) -> Tensor:
    """The layer's output for inputs [..., i] in dual form: origin, plus attention over every training pattern."""
    flat = query.reshape(1, -1, query.shape[-1])
    asked = LayerQuery(made_of.unsummed(), flat, flat, flat)
    through = Pass(source, asked, scores=False)
    through.run([])
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


def _runs(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Consecutive pieces together until they are enough for a task; those of a large memory are by themselves."""
    waiting: list[Piece] = []
    count = 0
    for piece in pieces:
        waiting.append(piece)
        count += piece.count
        if count >= TASK_ROWS:
            yield waiting
            waiting, count = [], 0
    if waiting:
        yield waiting


def _numbered(runs: Iterator[list[Piece]]) -> Iterator[tuple[int, list[Piece]]]:
    """Runs with the number of patterns before each."""
    start = 0
    for pieces in runs:
        yield start, pieces
        start += sum(piece.count for piece in pieces)


def _far_apart(runs: list[tuple[int, list[Piece]]]) -> Iterator[tuple[int, list[Piece]]]:
    """The newest first, then always some between those so far: wherever the best are, they are soon met."""
    digits = len(runs).bit_length()
    backwards = (int(f"{place:0{digits}b}"[::-1], 2) for place in range(2**digits))
    return (runs[-1 - place] for place in backwards if place < len(runs))
