"""A preview of replayed parameters without a replay: a few snapshots of the optimiser's state stand for all steps.

Between two snapshots the state is interpolated linearly and held still over a stretch of steps; learning rate,
momentum and decay are followed exactly. A gradient's coefficient is then a combination of two matrices: the stretch's
own factor, and what later stretches take back through the momentum. What coupled weight decay has done stays open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dualhook.optimizers import Adjoint, LinearStep
from dualhook.query.parts import ReplayShare, StepTaken, Synchronization, Totals
from dualhook.query.scoring import BlockScores, ReplayScores
from dualhook.records import Rows, RowSource

__all__ = ["Preview"]

PARTS = 2  # stretches between two snapshots
BLOCK_ROWS = 4096
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

        With ``totals`` what each parameter is made of is summed along the way, for :meth:`sums`.
        """
        self._parts = [_Part(share, scores, totals=totals) for share in self._shares]
        for begin, end in reversed(list(pairwise(self._edges()))):
            for part in self._parts:
                part.enter(begin, end)
            blocks = self._source.blocks(self._layer, first_step=begin + 1, last_step=end, block_rows=BLOCK_ROWS)
            for rows in blocks:
                found = [part.see(rows) for part in self._parts]
                yield rows, None if scores is None else torch.stack([one for one in found if one is not None]).sum(0)
            for part in self._parts:
                part.leave()
        for part in self._parts:
            part.arrive()

    def sums(self) -> list[Totals]:
        """The totals of every share, once :meth:`backward` is through."""
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

    def __init__(self, share: ReplayShare, scores: ReplayScores | None, *, totals: bool) -> None:
        self._share = share
        self._dtype = torch.promote_types(share.dtype, torch.float32)
        self._scores: BlockScores | None = None
        if scores is not None:
            self._scores = scores.of(share, slice(0, share.weight.shape[0]), self._dtype)
        self._sums = totals
        self._readout = share.readout.clone()
        self._adjoint = Adjoint(0.0)
        self._factor = self._carried = torch.zeros_like(share.weight, dtype=self._dtype)
        self._begin = 0
        self._coefficients = torch.zeros(0, 2)  # of factor and carried, by step
        self._gradients: list[Tensor] = []
        none = torch.zeros(share.weight.shape, dtype=torch.float64)
        self.totals = Totals(none, none.clone(), none.clone(), none.clone())

    def enter(self, begin: int, end: int) -> None:
        """Work out the coefficients of the steps after ``begin`` up to ``end``."""
        held = self._adjoint.buffer
        if isinstance(held, Tensor):
            of_factor, of_carried = held.tolist()
            self._carried = of_factor * self._factor + of_carried * self._carried
            self._adjoint.buffer = torch.tensor([0.0, 1.0], dtype=torch.float64)
        self._begin = begin
        self._factor = self._middle_factor(begin, end)
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
        self._gradients = [torch.zeros_like(self._factor), torch.zeros_like(self._factor)] if self._sums else []

    def see(self, rows: Rows) -> Tensor | None:
        """What rows of the stretch contribute [q, n]."""
        own, later = self._coefficients[rows.step - self._begin - 1].to(self._dtype).unbind(1)
        limit = NEGLIGIBLE * float(self._coefficients[:, 1].abs().max())
        counting = (later.abs() > limit).nonzero()
        start = int(counting[0]) if len(counting) else len(rows)
        tail = rows.part(start, len(rows))
        if self._sums:
            for gradient, some, weights in zip(self._gradients, (rows, tail), (own, later[start:]), strict=True):
                d = some.output_grad.to(self._dtype) * weights[:, None]
                gradient += d.T @ some.key.to(self._dtype) if gradient.ndim == 2 else d.sum(0)
        if self._scores is None:
            return None
        found = self._scores.of(rows, self._factor, 1.0, "elementwise") * own
        if len(tail):
            found[:, start:] += self._scores.of(tail, self._carried, 1.0, "elementwise") * later[start:]
        return found

    def leave(self) -> None:
        """All rows of the stretch have been seen."""
        for gradient, factor in zip(self._gradients, (self._factor, self._carried), strict=False):
            self.totals.patterns -= gradient * factor

    def arrive(self) -> None:
        """The way back has come to the origin."""
        share, held = self._share, self._adjoint.buffer
        self._adjoint.read(float(self._readout[: share.begins + 1].sum()))
        self.totals.origin.add_(share.weight, alpha=self._adjoint.weight)
        first = next(share.steps, None)
        buffer = share.tensors.get(first.rule.buffer or "") if first is not None else None
        if buffer is not None:
            if isinstance(held, Tensor):
                held = float(held[0]) * self._factor + float(held[1]) * self._carried
            self.totals.origin -= held * buffer.double()

    def _middle_factor(self, begin: int, end: int) -> Tensor:
        """The factor in the middle of a stretch, over its scalar."""
        middle = (begin + end + 1) / 2
        steps = [(abs(step - middle), step) for step in range(begin + 1, end + 1)]
        for _, step in sorted(steps):
            for taken in self._share.taken.get(step, ()):
                if isinstance(taken, StepTaken) and (size := _size(taken)):
                    linear = taken.rule.step_from(self._state(step), taken.entry)
                    if isinstance(linear.factor, Tensor):
                        return linear.factor.div_(size)
                    return torch.full_like(self._factor, linear.factor / size)
        return torch.zeros_like(self._factor)

    def _state(self, step: int) -> Mapping[str, Tensor]:
        """The optimiser's state after a step, interpolated."""
        known = dict(self._share.snapshots)
        if set(self._share.tensors) >= set(known[min(known)]()):  # where recording began in the middle of a run
            known[self._share.begins] = lambda: self._share.tensors
        low = max((at for at in known if at <= step), default=min(known))
        high = min((at for at in known if at >= step), default=max(known))
        before, after = known[low](), known[high]()
        share = (step - low) / (high - low) if high > low else 0.0
        return {
            name: torch.lerp(v.to(self._dtype), after[name].to(self._dtype), share)
            for name, v in before.items()
            if name in after
        }


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
