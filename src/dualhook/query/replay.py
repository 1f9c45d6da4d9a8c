"""Replay: an optimiser's steps run again over the recorded rows, forward for its state, backward for the coefficients.

A layer is replayed in segments of steps, newest first, so that a pass sees every row with the coefficient it has at
the horizon. The state before a segment comes from checkpoints: on the way forward through a long stretch a few are
made, and each part between two of them is taken the same way, which bounds the memory for any number of steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from dualhook.optimizers import Adjoint, LinearStep, ParameterState, Side, advance, apply
from dualhook.query.parts import ReplayShare, StepTaken, Synchronization, Totals
from dualhook.records import SLOW, Rows, RowSource

__all__ = ["Replay", "Visit"]

CHECKPOINTS = 24  # made on one way forward, at most
BLOCK_BYTES = 2**22  # of the output units that go through a segment together: the state stays in the cache


Visit = Callable[[int, Rows, ReplayShare, "Tensor | float", Side, slice], None]
"""Sees a step, its rows, and the coefficient of the gradient they rebuild for some output units of a share."""


class _Place:
    """A parameter's weight and the state of every optimiser that has stepped on it, after some step.

    ``slow`` is the weight that Lookahead will go back to, where weights are carried along at all.
    """

    def __init__(self, weight: Tensor, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.weight = weight
        self.slow = weight
        self.states = {name: ParameterState(weight, dict(own)) for name, own in tensors.items()}

    def copy(self) -> _Place:
        """An independent copy."""
        own = {name: {n: v.clone() for n, v in state.tensors.items()} for name, state in self.states.items()}
        twin = _Place(self.weight.clone(), own)
        twin.slow = self.slow  # never written to
        return twin

    def of(self, optimizer: str) -> ParameterState:
        """The state of one optimiser; empty before its first step."""
        return self.states.setdefault(optimizer, ParameterState(self.weight, {}))


@dataclass
class _Done:
    """A step on the way forward, kept for the way back."""

    taken: StepTaken
    linear: LinearStep
    gradient: Tensor | None
    weight: Tensor | None  # before the step, where coupled decay looked at it


class _Run:
    """One share in a replay over a block of its output units."""

    def __init__(self, share: ReplayShare, units: slice, dtype: torch.dtype, *, totals: bool) -> None:
        self.share = share
        self.units = units
        self.dtype = dtype
        self.sums = totals
        weight = self._cut(share.weight)
        every = list(share.steps)
        first = every[0].optimizer if every else ""
        state = {name: self._cut(value) for name, value in share.tensors.items() if value.ndim and name != SLOW}
        self.place = _Place(weight, {first: state})
        self._origin = self.place.copy()
        self._slow_steps = {step for step in share.slow_steps if step >= share.begins}
        older = SLOW in share.tensors and share.begins not in self._slow_steps
        self._slow = self.place.slow = self._cut(share.tensors[SLOW]) if older else self._origin.weight
        self._from_slow: dict[int, float] = {}  # factors of earlier weights, from synchronisations after them
        self._carries = any(step.rule.reads_weight or step.rule.decay(step.entry) for step in every)
        self._adjoints: dict[str, Adjoint] = {}
        self._weight = 0.0  # factor of W where the way back has come to
        self._out: Tensor | None = None
        self.totals = Totals(*(torch.zeros(weight.shape, dtype=torch.float64) for _ in range(4)))

    def gradient(self, rows: Rows) -> Tensor:
        """What the rows of one step rebuild."""
        d = rows.output_grad[:, self.units].to(self.dtype)
        return d.T @ rows.key.to(self.dtype) if self.place.weight.ndim == 2 else d.sum(0)

    def forward(
        self,
        step: int,
        rows: Rows,
        counted: Rows,
        *,
        whole: bool = False,
        keep: list[_Done | Synchronization] | None = None,
    ) -> None:
        """Take the step's entries; ``counted`` are those of its rows that the totals are to hold."""
        taken = self.share.taken.get(step, ())
        if taken:
            self._take(taken, rows, counted, whole=whole or self._carries, keep=keep)
        if step in self._slow_steps:
            self.place.slow = self.place.weight.clone()

    def _take(
        self,
        taken: Sequence[StepTaken | Synchronization],
        rows: Rows,
        counted: Rows,
        *,
        whole: bool,
        keep: list[_Done | Synchronization] | None,
    ) -> None:
        gradient = self.gradient(rows)
        summed = None
        if keep is not None and self.sums:
            summed = gradient if counted is rows else self.gradient(counted)
        for one in taken:
            if isinstance(one, Synchronization):
                if whole:
                    self.place.weight.lerp_(self.place.slow, 1 - one.alpha)
                if keep is not None:
                    keep.append(one)
                continue
            state = self.place.of(one.optimizer)
            before = state.weight.clone() if keep is not None and self.sums and one.rule.decay(one.entry) else None
            linear = advance(one.rule, state, gradient, one.entry, whole=whole)
            if keep is not None:
                keep.append(_Done(one, linear, summed, before))

    def read(self, step: int) -> None:
        """Come back to the place after ``step``."""
        self._weight += float(self.share.readout[step])
        if step >= self.share.begins:
            self._weight += self._from_slow.pop(step, 0.0)

    def synchronize(self, done: Synchronization) -> None:
        """Take a synchronisation back: a part of the weight was that of an earlier step."""
        before = self._from_slow.get(done.slow_step, 0.0)
        self._from_slow[done.slow_step] = before + (1 - done.alpha) * self._weight
        self._weight *= done.alpha

    def back(self, done: _Done) -> tuple[Tensor | float, Side]:
        """Take one step back; the coefficient of its rebuilt gradient."""
        rule, entry, linear = done.taken.rule, done.taken.entry, done.linear
        adjoint = self._adjoints.setdefault(done.taken.optimizer, Adjoint())
        adjoint.weight = at_step = self._weight
        if self._out is None and isinstance(linear.factor, Tensor):
            self._out = torch.empty_like(linear.factor)
        coefficient = adjoint.back(linear, fresh=entry.fresh, out=self._out)
        self._weight = adjoint.weight
        side, scale = rule.side(self.place.weight), rule.gradient_scale(entry)
        if self.sums and done.gradient is not None:
            decay = rule.decay(entry)
            if decay and done.weight is not None:
                self.totals.weight_decay -= apply(coefficient, done.weight, side) * decay
            if linear.rest is not None:
                self.totals.rounding.sub_(linear.rest, alpha=at_step)
            self.totals.patterns.sub_(apply(coefficient, done.gradient, side), alpha=scale)
        if isinstance(coefficient, Tensor):
            return coefficient.mul_(scale) if scale != 1.0 else coefficient, side
        return coefficient * scale, side

    def arrive(self) -> None:
        """The way back has come to the origin."""
        self.totals.origin.add_(self._origin.weight, alpha=self._weight)
        self.totals.origin.add_(self._slow, alpha=sum(self._from_slow.values()))  # those older than the origin
        for optimizer, adjoint in self._adjoints.items():
            rule = next(step.rule for step in self.share.steps if step.optimizer == optimizer)
            buffer = self._origin.of(optimizer).tensors.get(rule.buffer or "")
            if buffer is not None:
                self.totals.origin -= apply(adjoint.buffer, buffer, rule.side(self.place.weight))

    def _cut(self, value: Tensor) -> Tensor:
        """The run's output units of a tensor; of one that is not laid out by output units, all."""
        by_unit = value.ndim > 0 and value.shape[0] == self.share.weight.shape[0]
        return (value[self.units] if by_unit else value).to(self.dtype, copy=True)


class Replay:
    """The replayed parameters of one layer, over its rows, within ``budget`` bytes (but two checkpoints at least)."""

    def __init__(self, source: RowSource, layer: str, shares: Sequence[ReplayShare], *, budget: int) -> None:
        self._source = source
        self._layer = layer
        self._shares = shares
        self._horizon = shares[0].horizon
        self._begins = min(share.begins for share in shares)
        sizes = [share.weight.numel() * 4 for share in shares]
        self._block = min(BLOCK_BYTES, max(sizes)) if shares[sizes.index(max(sizes))].separable else max(sizes)
        self._longest = max(1, budget // 2 // (2 * self._block))  # per step a factor and a gradient are kept
        states = max(1, max(len(share.tensors) for share in shares))
        self._checkpoints = max(2, min(CHECKPOINTS, budget // 4 // max(1, states * sum(sizes))))

    @property
    def passes(self) -> int:
        """How often every row is read, about."""
        passes, steps = 2, self._horizon - self._begins
        while steps > self._longest:
            passes, steps = passes + 1, -(-steps // self._checkpoints)
        return passes

    def backward(
        self, visit: Visit | None, *, totals: bool, counted: Callable[[Rows], Tensor] | None = None
    ) -> Iterator[Rows]:
        """Replay the layer from the horizon to its origin; yields the rows of every step, newest first.

        ``visit`` has seen every share's coefficients of a step before its rows are yielded. With ``totals`` what each
        parameter is made of is summed along the way, into ``share.totals``; ``counted`` masks the patterns [n] of a
        step that the sum is to hold (such sums are returned by :meth:`sums` and not kept).
        """
        runs = [
            _Run(share, units, self._dtype(share), totals=totals)
            for share in self._shares
            for units in self._units(share)
        ]
        yield from self._stretch(runs, self._begins, self._horizon, visit, counted)
        for run in runs:
            for step in range(self._begins + 1):
                run.read(step)
            run.arrive()
        self._runs = runs

    def sums(self) -> list[Totals]:
        """The totals of every share, once :meth:`backward` is through."""
        found = []
        for share in self._shares:
            own = [run.totals for run in self._runs if run.share is share]
            found.append(Totals(*(torch.cat([getattr(t, f.name) for t in own]) for f in fields(Totals))))
        return found

    def forward(self) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Run to the horizon: of every share the weight, and the state tensors of the optimiser that stepped last."""
        found = []
        runs = [_Run(share, slice(None), self._dtype(share), totals=False) for share in self._shares]
        for step, rows in self._rows(self._begins, self._horizon):
            for run in runs:
                run.forward(step, rows, rows, whole=True)
        for run in runs:
            steps = list(run.share.steps)
            state = run.place.of(steps[-1].optimizer).tensors if steps else dict(run.share.tensors)
            found.append((run.place.weight, state))
        return found

    def _stretch(
        self,
        runs: Sequence[_Run],
        begin: int,
        end: int,
        visit: Visit | None,
        counted: Callable[[Rows], Tensor] | None,
    ) -> Iterator[Rows]:
        """The steps after ``begin`` up to ``end``, newest first; every run stands at ``begin``, and does so after."""
        if end - begin <= self._longest:
            yield from self._segment(runs, begin, end, visit, counted)
            return
        parts = min(self._checkpoints, -(-(end - begin) // self._longest))
        edges = [begin + (end - begin) * k // parts for k in range(parts + 1)]
        places = [[run.place for run in runs]]
        for low, high in pairwise(edges[:-1]):
            for run in runs:
                run.place = run.place.copy()
            for step, rows in self._rows(low, high):
                for run in runs:
                    run.forward(step, rows, rows)
            places.append([run.place for run in runs])
        for low, high in reversed(list(pairwise(edges))):
            for run, place in zip(runs, places.pop(), strict=True):
                run.place = place
            yield from self._stretch(runs, low, high, visit, counted)

    def _segment(
        self,
        runs: Sequence[_Run],
        begin: int,
        end: int,
        visit: Visit | None,
        counted: Callable[[Rows], Tensor] | None,
    ) -> Iterator[Rows]:
        by_step = list(self._rows(begin, end))
        wanted = [_chosen(rows, counted) for _, rows in by_step]
        for run in runs:
            here, run.place = run.place, run.place.copy()
            kept: list[list[_Done | Synchronization]] = []
            for (step, rows), summed in zip(by_step, wanted, strict=True):
                kept.append([])
                run.forward(step, rows, summed, keep=kept[-1])
            for step, rows in reversed(by_step):
                run.read(step)
                for done in reversed(kept.pop()):
                    if isinstance(done, Synchronization):
                        run.synchronize(done)
                        continue
                    coefficient, side = run.back(done)
                    if visit is not None and len(rows):
                        visit(step, rows, run.share, coefficient, side, run.units)
            run.place = here
        yield from (rows for _, rows in reversed(by_step) if len(rows))

    def _rows(self, begin: int, end: int) -> Iterator[tuple[int, Rows]]:
        """Every step after ``begin`` up to ``end`` with its rows, oldest first; steps without rows have none."""
        empty: Rows | None = None
        found: dict[int, Rows] = {}
        upcoming = begin + 1
        for block in self._source.blocks(self._layer, first_step=begin + 1, last_step=end, block_rows=sys.maxsize):
            steps, counts = torch.unique_consecutive(block.step, return_counts=True)
            start = 0
            for step, count in zip(steps.tolist(), counts.tolist(), strict=True):
                part = block.part(start, start + count)
                found[step] = found[step].joined(part) if step in found else part
                start += count
            empty = block.part(0, 0) if empty is None else empty
            for step in range(upcoming, int(steps[-1]) if len(steps) else upcoming):
                yield step, found.pop(step, empty)
                upcoming = step + 1
        if empty is None:
            empty = self._none()
        for step in range(upcoming, end + 1):
            yield step, found.pop(step, empty)

    def _none(self) -> Rows:
        """No rows, of the layer's widths."""
        weight = next((share.weight for share in self._shares if share.weight.ndim == 2), None)
        outputs = self._shares[0].weight.shape[0]
        no = torch.zeros(0, dtype=torch.int64)
        key = torch.zeros(0, 1 if weight is None else weight.shape[1], dtype=self._dtype(self._shares[0]))
        return Rows(key, key.new_zeros(0, outputs), no, no, no)

    def _units(self, share: ReplayShare) -> list[slice]:
        """Blocks of output units that are replayed one after the other."""
        units = share.weight.shape[0]
        if not share.separable:
            return [slice(0, units)]
        size = max(1, self._block // max(1, 4 * share.weight.numel() // units))
        return [slice(start, min(units, start + size)) for start in range(0, units, size)]

    def _dtype(self, share: ReplayShare) -> torch.dtype:
        return torch.promote_types(share.dtype, torch.float32)


def _chosen(rows: Rows, counted: Callable[[Rows], Tensor] | None) -> Rows:
    return rows if counted is None else rows.where(counted(rows))
