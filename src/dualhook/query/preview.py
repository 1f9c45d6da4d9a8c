"""A preview of replayed parameters without a replay: a few snapshots of the optimiser's state stand for all steps.

Between two snapshots the state is interpolated linearly and held still over a stretch of steps; learning rate,
momentum and decay are followed exactly. A gradient's coefficient is then a combination of two matrices: the stretch's
own factor, and what later stretches take back through the momentum. What coupled weight decay has done stays open.

Every row is scored with rank-1 matrices that come close to these two, at the price of a dot product; the rows that then
look strongest are scored again with the matrices themselves. Sums and receipt are mostly rank-1, lists are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dualhook.optimizers import Adjoint, LinearStep
from dualhook.query.parts import ReplayShare, StepTaken, Synchronization, Totals
from dualhook.query.scoring import ReplayScores
from dualhook.records import Rows, RowSource

__all__ = ["Preview", "close_to", "middle_factor"]

PARTS = 2  # stretches between two snapshots
BLOCK_ROWS = 4096
AGAIN = 32  # of a block's rows one in so many, and at least so many, are scored again
SHOWN = 256  # rows that show where the gradients of a stretch have their energy
ROUNDS = 3  # of least squares for a rank-1 matrix
DEAD = 1e-12  # of the largest energy: a unit that has less has none
NEGLIGIBLE = 1e-4  # of the largest: what has come so far back through the momentum is left out


class Preview:
    """The replayed parameters of one layer, previewed: the same interface as a replay."""

    def __init__(self, source: RowSource, layer: str, shares: Sequence[ReplayShare]) -> None:
        self._source = source
        self._layer = layer
        self._shares = shares
        self._parts: list[_Part] = []

    def backward(self, scores: ReplayScores | None, *, totals: bool) -> Iterator[tuple[Rows, Tensor | None]]:
        """Blocks of rows with their scores [q, n]: stretches newest first, rows oldest first in each of them.

        With ``totals`` what the layer answers is summed along the way: :meth:`sums`, and :attr:`output` of patterns.
        """
        assert scores is not None
        self._parts = [_Part(share, scores, outputs=totals) for share in self._shares]
        for begin, end in reversed(list(pairwise(self._edges()))):
            for part in self._parts:
                part.enter(begin, end)
            blocks = self._source.blocks(self._layer, first_step=begin + 1, last_step=end, block_rows=BLOCK_ROWS)
            for rows in blocks:
                yield rows, torch.stack([part.see(rows) for part in self._parts]).sum(0)
        for part in self._parts:
            part.arrive()

    @property
    def output(self) -> Tensor:
        """What the patterns add to the layer's output [q · p, o], float64; once :meth:`backward` is through."""
        return torch.stack([part.output for part in self._parts]).sum(0)

    def sums(self) -> list[Totals]:
        """The totals of every share but for the patterns, once :meth:`backward` is through."""
        return [part.totals for part in self._parts]

    def _edges(self) -> list[int]:
        """The steps between which the state is held still."""
        begins, horizon = min(share.begins for share in self._shares), self._shares[0].horizon
        inner = {step for share in self._shares for step in share.snapshots if begins < step < horizon}
        edges = [begins]
        for low, high in pairwise(sorted({begins, *inner, horizon})):
            edges += sorted({low + (high - low) * k // PARTS for k in range(1, PARTS + 1)} - {low})
        return edges


class _Part:
    """One share on the way from the horizon to its origin."""

    def __init__(self, share: ReplayShare, scores: ReplayScores, *, outputs: bool) -> None:
        self._share = share
        self._dtype = share.computed_in
        self._query, self._direction = scores.flat(self._dtype)
        self._positions = len(self._query) // scores.shape[0]
        units = slice(0, share.weight.shape[0])
        self._again = [own.of(share, units, self._dtype) for own in scores.each()]
        self._outputs = outputs
        self._readout = share.readout.clone()
        self._adjoint = Adjoint(0.0)
        self._matrices = [torch.zeros_like(share.weight, dtype=self._dtype) for _ in range(2)]  # own, from later
        self._close: list[tuple[Tensor, Tensor] | None] = [None, None]  # the same as rank-1 vectors
        self._begin = 0
        self._coefficients = torch.zeros(0, 2)  # of the matrices, by step
        self.output = torch.zeros(len(self._query), share.weight.shape[0], dtype=torch.float64)
        none = torch.zeros(share.weight.shape, dtype=torch.float64)
        self.totals = Totals(none, none.clone(), none.clone(), none.clone())

    def enter(self, begin: int, end: int) -> None:
        """Work out the coefficients of the steps after ``begin`` up to ``end``."""
        held = self._adjoint.buffer
        if isinstance(held, Tensor):
            of_factor, of_carried = held.tolist()
            self._matrices[1] = of_factor * self._matrices[0] + of_carried * self._matrices[1]
            self._adjoint.buffer = torch.tensor([0.0, 1.0], dtype=torch.float64)
        self._begin = begin
        self._matrices[0] = middle_factor(self._share, begin, end, self._dtype)
        self._close = [None, None]
        self._coefficients = torch.zeros(end - begin, 2, dtype=torch.float64)
        for step in range(end, begin, -1):
            self._adjoint.read(float(self._readout[step]))
            for taken in reversed(self._share.taken.get(step, ())):
                if isinstance(taken, Synchronization):
                    self._readout[taken.slow_step] += (1 - taken.alpha) * self._adjoint.weight
                    self._adjoint.weight *= taken.alpha
                    continue
                values, scale = self._adjoint.back(_symbolic(taken), fresh=taken.entry.fresh)
                self._coefficients[step - begin - 1] += values * (scale * taken.rule.gradient_scale(taken.entry))

    def see(self, rows: Rows) -> Tensor:
        """What rows of the stretch contribute [q, n]."""
        coefficients = self._coefficients[rows.step - self._begin - 1].to(self._dtype)
        limit = NEGLIGIBLE * float(self._coefficients[:, 1].abs().max())
        counting = (coefficients[:, 1].abs() > limit).nonzero()
        tail = int(counting[0]) if len(counting) else len(rows)
        parts = [(0, 0, coefficients[:, 0]), (tail, 1, coefficients[tail:, 1])]
        d, x = rows.output_grad.to(self._dtype), rows.key.to(self._dtype)
        if rows.constant is not None and self._share.is_bias:
            d = d * rows.constant.to(self._dtype)[:, None]
        found = self._query.new_zeros(len(self._query), len(rows))
        for start, which, weights in parts:
            if start < len(rows):
                found[:, start:] += self._roughly(d[start:], x[start:], which, weights)
        found = found.reshape(-1, self._positions, len(rows)).sum(1)
        if self._share.weight.ndim == 2:
            self._score_again(found, rows, parts)
        return found

    def _roughly(self, d: Tensor, x: Tensor, which: int, weights: Tensor) -> Tensor:
        """Contributions [q · p, n] through the rank-1 matrix that stands for one of the two."""
        if self._share.weight.ndim == 1:
            attended, d = -weights.expand(len(self._query), -1), d * self._matrices[which]
        else:
            close = self._close[which]
            if close is None:  # the first rows of a stretch show where its gradients are
                some = slice(None, None, -(-len(d) // SHOWN))
                energy = d[some].square().T @ x[some].square()
                close = self._close[which] = close_to(self._matrices[which], energy)
            row, column = close
            attended, d = (self._query * column) @ x.T * -weights, d * row
        if self._outputs:
            self.output += attended @ d
        return attended * (self._direction @ d.T)

    def _score_again(self, found: Tensor, rows: Rows, parts: Sequence[tuple[int, int, Tensor]]) -> None:
        """Put the contributions through the matrices themselves in place of the strongest ones."""
        count = min(len(rows), max(AGAIN, len(rows) // AGAIN))
        chosen = found.abs().topk(count, dim=1).indices.sort(dim=1).values
        for query, index in enumerate(chosen):
            again = found.new_zeros(count)
            for start, which, weights in parts:
                later = index[index >= start]
                if len(later):
                    scored = self._again[query].of(rows.at(later), self._matrices[which], 1.0, "elementwise")
                    again[count - len(later) :] += scored.squeeze(0) * weights[later - start]
            found[query, index] = again

    def arrive(self) -> None:
        """The way back has come to the origin."""
        share, held = self._share, self._adjoint.buffer
        self._adjoint.read(float(self._readout[: share.begins + 1].sum()))
        self.totals.origin.add_(share.weight, alpha=self._adjoint.weight)
        first = next(share.steps, None)
        buffer = share.tensors.get(first.rule.buffer or "") if first is not None else None
        if buffer is not None:
            if isinstance(held, Tensor):
                held = float(held[0]) * self._matrices[0] + float(held[1]) * self._matrices[1]
            self.totals.origin -= held * buffer.double()


def middle_factor(share: ReplayShare, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """What a step in the middle of a stretch multiplies the gradient's entries with, over its scalar.

    Laid out like the parameter's snapshots; zeros where the stretch has no step.
    """
    middle = (begin + end + 1) / 2
    steps = [(abs(step - middle), step) for step in range(begin + 1, end + 1)]
    for _, step in sorted(steps):
        for taken in share.taken.get(step, ()):
            if isinstance(taken, StepTaken) and (size := _size(taken)):
                linear = taken.rule.step_from(_state(share, step, dtype), taken.entry)
                if isinstance(linear.factor, Tensor):
                    return linear.factor.div_(size)
                return torch.full_like(share.weight, linear.factor / size, dtype=dtype)
    return torch.zeros_like(share.weight, dtype=dtype)


def _state(share: ReplayShare, step: int, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """The optimiser's state after a step, interpolated."""
    known = dict(share.snapshots)
    if set(share.tensors) >= set(known[min(known)]()):  # where recording began in the middle of a run
        known[share.begins] = lambda: share.tensors
    low = max((at for at in known if at <= step), default=min(known))
    high = min((at for at in known if at >= step), default=max(known))
    before, after = known[low](), known[high]()
    part = (step - low) / (high - low) if high > low else 0.0
    return {name: torch.lerp(v.to(dtype), after[name].to(dtype), part) for name, v in before.items() if name in after}


def _symbolic(taken: StepTaken) -> LinearStep:
    """The step with its factor as what it is in terms of the stretch's two matrices."""
    linear = _scalar_step(taken)
    factor = torch.tensor([float(linear.factor), 0.0], dtype=torch.float64)
    if isinstance(linear.buffer_factor, Tensor):
        same = linear.buffer_factor is linear.factor
        own = torch.tensor([float(linear.buffer_factor), 0.0], dtype=torch.float64)
        linear.buffer_factor = factor if same else own
    linear.factor = factor
    return linear


def _scalar_step(taken: StepTaken) -> LinearStep:
    """The step where all of the state is 1: what of it changes from step to step without the state."""
    ones = {name: torch.ones((), dtype=torch.float64) for name in taken.rule.preview_state}
    return taken.rule.step_from(ones, taken.entry)


def _size(taken: StepTaken) -> float:
    return float(_scalar_step(taken).factor)


def close_to(matrix: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """``row`` [o] and ``column`` [i] whose product is closest to a matrix of factors where gradients have energy.

    A factor is largest where there have never been gradients, and counts nothing there.
    """
    wanted = torch.where(energy > 0, energy * matrix, 0.0)
    column = torch.ones_like(energy[0])
    row = torch.zeros_like(energy[:, 0])
    for _ in range(ROUNDS):
        row = _divided(wanted @ column, energy @ column.square())
        column = _divided(wanted.T @ row, energy.T @ row.square())
    return row, column


def _divided(values: Tensor, energy: Tensor) -> Tensor:
    return values / energy.clamp(min=max(torch.finfo(energy.dtype).tiny, float(energy.max()) * DEAD))
