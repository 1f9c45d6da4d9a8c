"""Replay: an optimiser's steps run again over the recorded rows, forward for its state, backward for the coefficients.

A layer is replayed in stretches of steps, newest first, so that a pass sees every row with the coefficient it has at
the horizon. The state before a stretch comes from checkpoints: on the way forward through a long run a few are made,
and each part between two of them is taken the same way, which bounds the memory for any number of steps. Within a
stretch the output units go through in blocks, side by side in threads; a block and the order of all sums do not depend
on how many threads there are, nor on the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from dualhook.query.block import Block, Place, Shelf, StepRows, joined
from dualhook.query.parts import ReplayShare, Totals
from dualhook.query.scoring import ReplayQuestion
from dualhook.records import Rows, RowSource

__all__ = ["Replay"]

T = TypeVar("T")
CHECKPOINTS = 24  # made on one way forward, at most
STEP_ROWS = 2**20  # read at a time; a step's rows are joined
BLOCK_BYTES = 2**21  # of the weights of the output units that go through a stretch together


class Replay:
    """The replayed parameters of one layer, over its rows.

    ``budget`` bounds the bytes held at a time, whatever the number of threads: half of it for the steps of a stretch,
    a quarter each for checkpoints and for contributions; but one step per thread and two checkpoints at least.
    """

    def __init__(self, source: RowSource, layer: str, shares: Sequence[ReplayShare], *, budget: int) -> None:
        self._source = source
        self._layer = layer
        self._shares = shares
        self._horizon = shares[0].horizon
        self._begins = min(share.begins for share in shares)
        self._budget = budget
        self._workers = torch.get_num_threads()
        self._blocks: list[Block] = []
        self._shelves: list[Shelf] = []  # one per thread, as it turns out
        states = max(1, max(len(share.tensors) for share in shares))
        size = sum(share.weight.numel() * share.bytes_per_entry for share in shares)
        self._checkpoints = max(2, min(CHECKPOINTS, budget // 4 // max(1, states * size)))

    def backward(
        self,
        scores: ReplayQuestion | None,
        *,
        totals: bool,
        counted: Callable[[Rows], Tensor] | None = None,
        tick: Callable[[int], None] | None = None,
        between: Callable[[int], None] | None = None,
        state: Mapping[str, Tensor] | None = None,
        upto: int | None = None,
    ) -> Iterator[tuple[Rows, Tensor | None]]:
        """Replay the layer from the horizon to its origin; yields every step's rows, newest first, and their scores.

        Scores are contributions [q, n]. With ``totals`` what each parameter is made of is summed along the way, for
        :meth:`sums`; ``counted`` masks the patterns [n] of a step that the sums are to hold. ``tick(k)`` is called
        when ``k`` entries of a weight have gone through one step, ``between(step)`` when everything after ``step`` is
        through: what :meth:`state` is then lets a later replay begin with ``upto=step`` and that ``state``.
        """
        self._counted, self._tick, self._between = counted, tick, between
        self._blocks = [
            Block(
                share,
                units,
                share.computed_in,
                totals=totals,
                scores=None if scores is None else scores.of(share, units, share.computed_in),
            )
            for share in self._shares
            for units in _units(share)
        ]
        kept = max(share.kept_bytes(units, totals=totals) for share in self._shares for units in _units(share))
        at_once = min(self._workers, max(sum(b.share is share for b in self._blocks) for share in self._shares))
        self._longest = max(1, self._budget // 2 // max(1, at_once * kept))
        if scores is not None:  # of a stretch, in every block that is under way and in the sum
            rows = self._source.count(self._layer) / max(1, self._horizon - self._begins)
            held = rows * int(scores.shape[0]) * max(share.bytes_per_entry for share in self._shares)
            self._longest = max(1, min(self._longest, int(self._budget // 4 / max(1.0, held * (at_once + 2)))))
        for k, block in enumerate(self._blocks if state is not None else ()):
            own = {name.partition("/")[2]: held for name, held in (state or {}).items() if name.startswith(f"{k}/")}
            block.restore(own)
        separable = all(share.separable for share in self._shares)
        with _mapping(self._workers if separable else 1) as self._map:
            yield from self._stretch(self._begins, self._horizon if upto is None else upto)
        for block in self._blocks:
            block.arrive()

    def sums(self) -> list[Totals]:
        """The totals of every share, once :meth:`backward` is through."""
        return [
            joined([block for block in self._blocks if block.share is share]).each(share.as_matrix)
            for share in self._shares
        ]

    def state(self) -> dict[str, Tensor]:
        """What the way back has brought so far, of all blocks."""
        return {f"{k}/{name}": held for k, block in enumerate(self._blocks) for name, held in block.state().items()}

    def forward(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Run to the horizon: every share's weight, and the state tensors of the optimiser that stepped last.

        Laid out as the parameters are.
        """
        found, self._counted = [], None
        blocks = [Block(share, slice(None), share.computed_in, totals=False, scores=None) for share in self._shares]
        for at in self._rows(self._begins, self._horizon):
            for block in blocks:
                block.forward([at], whole=True)
        for block in blocks:
            steps = list(block.share.steps)
            state = block.place.of(steps[-1].optimizer).tensors if steps else dict(block.share.tensors)
            own = {name: block.share.natural(value) for name, value in state.items()}
            found.append((block.share.natural(block.place.weight), own))
        return found

    def _stretch(self, begin: int, end: int) -> Iterator[tuple[Rows, Tensor | None]]:
        """The steps after ``begin`` up to ``end``, newest first; every block stands at ``begin``, and does so after."""
        if end - begin <= self._longest:
            yield from self._through(begin, end)
            return
        parts = min(self._checkpoints, -(-(end - begin) // self._longest))
        edges = [begin + (end - begin) * k // parts for k in range(parts + 1)]
        steps = list(self._rows(begin, edges[-2]))

        def forward(block: Block) -> list[Place]:
            return [block.place, *block.checkpoints(steps, edges)]

        places = list(self._map(forward, self._blocks))
        for low, high in reversed(list(pairwise(edges))):
            for block, own in zip(self._blocks, places, strict=True):
                block.place = own.pop()
            yield from self._stretch(low, high)

    def _through(self, begin: int, end: int) -> Iterator[tuple[Rows, Tensor | None]]:
        """One stretch: all blocks over the same rows."""
        steps = list(self._rows(begin, end))

        def through(block: Block) -> Tensor | None:
            shelf = self._shelves.pop() if self._shelves else Shelf()
            found = block.through(steps, shelf)
            self._shelves.append(shelf)
            if self._tick is not None:
                self._tick(block.place.weight.numel() * len(steps))
            return found

        total: Tensor | None = None
        for found in self._map(through, self._blocks):
            if found is not None:
                total = found if total is None else total.add_(found)
        stop = sum(len(at.rows) for at in steps)
        for at in reversed(steps):
            if len(at.rows):
                yield at.rows, None if total is None else total[:, stop - len(at.rows) : stop]
                stop -= len(at.rows)
        if self._between is not None:
            self._between(begin)

    def _rows(self, begin: int, end: int) -> Iterator[StepRows]:
        """Every step after ``begin`` up to ``end``, oldest first; steps without rows have none."""
        empty: Rows | None = None
        found: dict[int, Rows] = {}
        upcoming = begin + 1
        for block in self._source.blocks(self._layer, first_step=begin + 1, last_step=end, block_rows=STEP_ROWS):
            steps, counts = torch.unique_consecutive(block.step, return_counts=True)
            start = 0
            for step, count in zip(steps.tolist(), counts.tolist(), strict=True):
                part = block.part(start, start + count)
                found[step] = found[step].joined(part) if step in found else part
                start += count
            empty = block.part(0, 0) if empty is None else empty
            for step in range(upcoming, int(steps[-1]) if len(steps) else upcoming):
                yield self._chosen(step, found.pop(step, empty))
                upcoming = step + 1
        if empty is None:
            empty = self._none()
        for step in range(upcoming, end + 1):
            yield self._chosen(step, found.pop(step, empty))

    def _chosen(self, step: int, rows: Rows) -> StepRows:
        return StepRows(step, rows, rows if self._counted is None else rows.where(self._counted(rows)))

    def _none(self) -> Rows:
        """No rows, of the layer's widths."""
        weight = next((share.as_matrix(share.weight) for share in self._shares if not share.is_bias), None)
        outputs = self._shares[0].as_matrix(self._shares[0].weight).shape[0]
        no = torch.zeros(0, dtype=torch.int64)
        key = torch.zeros(0, 1 if weight is None else weight.shape[1], dtype=self._shares[0].computed_in)
        return Rows(key, key.new_zeros(0, outputs), no, no, no)


def _units(share: ReplayShare) -> list[slice]:
    """The output units in blocks of equal size, a power of two of them so that threads have equal work."""
    units, size = share.weight.shape[0], share.weight.numel() * share.bytes_per_entry
    parts = 1
    while share.separable and parts < units and parts * BLOCK_BYTES < size:
        parts *= 2
    parts = min(parts, units)
    if share.is_natural:
        return [slice(None)]
    return [slice(units * k // parts, units * (k + 1) // parts) for k in range(parts)]


@contextmanager
def _mapping(workers: int) -> Iterator[Callable[[Callable[[Block], T], Sequence[Block]], Iterator[T]]]:
    """A way to map over blocks: side by side in threads that compute on one processor each."""
    with ThreadPoolExecutor(workers) if workers > 1 else nullcontext() as pool:
        yield lambda do, blocks: _mapped(pool, do, blocks)


def _mapped(pool: Executor | None, do: Callable[[Block], T], blocks: Sequence[Block]) -> Iterator[T]:
    if pool is None:
        yield from map(do, blocks)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of threads that start from here on too
    try:
        yield from pool.map(do, blocks)
    finally:
        torch.set_num_threads(threads)
