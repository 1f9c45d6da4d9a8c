"""The rule for every optimiser that has none: each observed weight change is fitted, what is left stays residual.

With ``W`` and ``W'`` before and after a step, ``g`` the gradient it saw and ``M = momentum · M + g``::

    W' = shrink · W  -  rate · (row columnᵀ) ∘ M  +  residual

``row`` [o] and ``column`` [i] are found by alternating least squares; where a scalar, one row or one column explains as
much for fewer numbers, the other is constant. A vector parameter has the rate alone: one number per entry would
explain anything.

Both vectors are scaled to root mean square 1, weighted with the running energy of ``M`` in the row or column: units
that never fire would spoil any other gauge. ``rate`` is then the size of the step, and momentum collapses: a gradient
stands in later weights with the product of a scalar coefficient and the rate-weighted means of the vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dualhook.errors import RuleError
from dualhook.optimizers.registry import ANY, FIT_RATE, register
from dualhook.optimizers.rule import Exactness
from dualhook.optimizers.scalar import ScalarRule, Transitions
from dualhook.records import Coefficients, FactorVectors, History

__all__ = ["FittedRule", "StepFit", "Tracker", "collapsed"]

FIT_MOMENTUM, FIT_SHRINK = "fit.momentum", "fit.shrink"
TRIAL_STEPS = 16  # in which several momenta are tried on a parameter; the best goes on alone
USUAL_MOMENTUM = 0.9
FIRST_ROUNDS, LATER_ROUNDS = 50, 2  # of least squares, at most; later steps start from the one before
LONG = 0.99  # of the running energy is kept at each step
CONVERGED = 1e-7  # of what is explained: what a further round does not add any more
NOISE = 16  # times the dtype's rounding: what sums of squares cannot tell from nothing
MOMENTUM_NAMES = ("momentum", "betas.0", "beta1", "beta")
DECAY = "decay"  # in the name of a hyper-parameter: the weight may shrink


class FittedRule(ScalarRule):
    """What is known of a step that no rule explains: the numbers of its fit, noted in the ledger."""

    name = "fitted"
    kind: ClassVar[str] = "fitted"
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE

    def transitions(self, history: History) -> Transitions:
        """The fit's numbers; the vectors come on top, see :func:`collapsed`.

        Raises:
            RuleError: nothing was fitted: a rule explained the optimiser when it was recorded.
        """
        if FIT_RATE not in history.state or bool(history.state[FIT_RATE].isnan().any()):
            raise RuleError(
                f"{history.parameter!r} was trained by {history.optimizer[0]}, whose rule was registered when it was "
                "recorded and is not now: call dualhook.optimizers.register before the memory is asked "
                "(attention weights, by='weight', need no rule)"
            )
        rate, momentum, shrink = (history.state[name] for name in (FIT_RATE, FIT_MOMENTUM, FIT_SHRINK))
        return Transitions(
            ww=shrink,
            wb=-rate * momentum,
            wg=-rate * history.scale,
            bw=torch.zeros_like(rate),
            bb=momentum,
            bg=history.scale,
        )

    def keeps_buffer(self, history: History) -> bool:
        return True  # the first steps may have none, and later ones still take it up


register(ANY, FittedRule())


@dataclass(frozen=True)
class StepFit:
    """One step's fit: its ``numbers`` for the ledger, and the vectors of a matrix parameter."""

    numbers: dict[str, float]
    vectors: FactorVectors | None


class Tracker:
    """Fits the steps of one parameter, in training."""

    def __init__(self, hyper: Mapping[str, float]) -> None:
        likely = [hyper[name] for name in MOMENTUM_NAMES if 0.0 <= hyper.get(name, 1.0) < 1.0]
        self._decays = any(DECAY in name and value != 0.0 for name, value in hyper.items())
        self._buffer: Tensor | None = None  # the momentum filter that the ledger's numbers describe
        self._trials = dict.fromkeys([*likely, USUAL_MOMENTUM, 0.0], 0.0)  # what each has left open
        self._momentum = next(iter(self._trials))
        self._filters: dict[float, Tensor] = {}
        self._steps = 0
        self._last: _Solution | None = None
        self._energy: tuple[Tensor | None, Tensor | None] = (
            None,
            None,
        )  # of the filter's rows and columns, over many steps

    def see(self, gradient: Tensor) -> None:
        """Take in the gradient [o, i] or [o] of the next step, as the optimiser sees it."""
        gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        self._buffer = _filtered(self._buffer, gradient, self._momentum)
        if self._steps < TRIAL_STEPS:
            self._filters = {m: _filtered(self._filters.get(m), gradient, m) for m in self._trials}

    def fit(self, before: Tensor, weight: Tensor) -> StepFit:
        """What the step has done: the parameter before it, and now."""
        assert self._buffer is not None
        before = before.to(self._buffer.dtype)
        change = before - weight.detach().to(self._buffer.dtype)
        found = self._last = self._solve(change, before, self._buffer)
        rate, vectors = found.rate, found.vectors
        if vectors is not None:
            energy = self._buffer.square()
            by_row, by_column = (_filtered(e, energy.sum(d), LONG) for e, d in zip(self._energy, (1, 0), strict=True))
            row, of_row = _gauged(vectors.row, by_row)
            column, of_column = _gauged(vectors.column, by_column)
            self._energy = (by_row, by_column)
            rate, vectors = rate * of_row * of_column, FactorVectors(row, column)
        # the filter starts with the first step: no momentum comes in from before
        momentum = self._momentum if self._steps else 0.0
        self._steps += 1
        if self._steps <= TRIAL_STEPS:
            self._try(change, before)
        numbers = {FIT_RATE: rate, FIT_MOMENTUM: momentum, FIT_SHRINK: 1.0 - found.lost}
        return StepFit(numbers, vectors)

    def _try(self, change: Tensor, before: Tensor) -> None:
        """Follow every momentum; from the next step on the one that has explained most is the filter's."""
        size = float(change.square().sum())
        for momentum, buffer in self._filters.items():
            left = change - self._solve(change, before, buffer).change(before, buffer)
            self._trials[momentum] += float(left.square().sum()) / size if size else 0.0
        self._momentum = min(self._trials, key=lambda momentum: self._trials[momentum])
        if self._steps == TRIAL_STEPS:
            self._filters = {}

    def _solve(self, change: Tensor, before: Tensor, buffer: Tensor) -> _Solution:
        """Alternating least squares, from what the last step came to."""
        weight = before if self._decays else None
        start = self._last
        if start is None:
            start = _Solution(*_scaled(change, buffer, weight), None)
        rate, lost, vectors = start.rate, start.lost, start.vectors
        rounds = FIRST_ROUNDS if self._steps < TRIAL_STEPS else LATER_ROUNDS
        for _ in range(rounds if change.ndim == 2 and self._decays else 1):
            if change.ndim == 2:
                vectors = _best_vectors(change - lost * before if lost else change, buffer, vectors, rounds)
            rate, lost = _scaled(change, _shaped(buffer, vectors), weight)
        return _Solution(rate, lost, vectors)


@dataclass(frozen=True)
class _Solution:
    """``change ≈ lost · W + rate · (row columnᵀ) ∘ M``."""

    rate: float
    lost: float
    vectors: FactorVectors | None

    def change(self, weight: Tensor, buffer: Tensor) -> Tensor:
        """What it says of ``W - W'``."""
        fitted = self.rate * _shaped(buffer, self.vectors)
        return fitted.add_(weight, alpha=self.lost) if self.lost else fitted


def _shaped(buffer: Tensor, vectors: FactorVectors | None) -> Tensor:
    return buffer if vectors is None else buffer * vectors.row[:, None] * vectors.column


def _filtered(held: Tensor | None, values: Tensor, keep: float) -> Tensor:
    return values.clone() if held is None else held.mul_(keep).add_(values)


def _scaled(change: Tensor, shaped: Tensor, weight: Tensor | None) -> tuple[float, float]:
    """Least squares: (rate, lost) of ``change ≈ rate · shaped + lost · weight``; without a weight nothing is lost."""
    known = [shaped] if weight is None else [shaped, weight]
    products = np.array([[float((a * b).sum()) for b in known] for a in known])
    crossed = np.array([float((a * change).sum()) for a in known])
    with np.errstate(all="ignore"):
        found = np.linalg.pinv(products) @ crossed if np.isfinite(products).all() else np.full(len(known), np.nan)
    return float(found[0]), float(found[1]) if weight is not None else 0.0


def _best_vectors(target: Tensor, buffer: Tensor, start: FactorVectors | None, rounds: int) -> FactorVectors:
    """The vectors with ``target ≈ rate · (row columnᵀ) ∘ buffer`` that explain most for the numbers they take.

    A scalar, one vector or both. What is left is compared per degree of freedom, so that an optimiser with one rate
    for all is not fitted to its rounding.
    """
    crossed, energy = target * buffer, buffer.square()
    ones = FactorVectors(torch.ones_like(buffer[:, 0]), torch.ones_like(buffer[0]))
    row, row_gain = _along(crossed.sum(1), energy.sum(1))
    column, column_gain = _along(crossed.sum(0), energy.sum(0))
    both_row, both_column = row, ones.column if start is None else start.column
    both_gain = 0.0
    for _ in range(rounds):
        both_row, _ = _along(crossed @ both_column, energy @ both_column.square())
        both_column, gain = _along(crossed.T @ both_row, energy.T @ both_row.square())
        both_gain, gained = gain, gain - both_gain
        if gained <= CONVERGED * gain:
            break
    outputs, inputs = buffer.shape
    choices = [  # what the squares that are explained come to, the numbers it takes, the vectors
        (_along(crossed.sum(), energy.sum())[1], 1, ones),
        (row_gain, outputs, FactorVectors(row, ones.column)),
        (column_gain, inputs, FactorVectors(ones.row, column)),
        (both_gain, outputs + inputs - 1, FactorVectors(both_row, both_column)),
    ]
    whole, count = float(target.square().sum()), buffer.numel()
    noise = NOISE * torch.finfo(buffer.dtype).eps * whole
    left = [max(whole - gain, noise) / max(1, count - taken) for gain, taken, _ in choices]
    return choices[left.index(min(left))][2]


def _along(crossed: Tensor, energy: Tensor) -> tuple[Tensor, float]:
    """Least squares entry by entry, and how much of the target's square it explains."""
    found = crossed / energy.clamp(min=torch.finfo(energy.dtype).tiny)
    return found, float((found * crossed).sum())


def _gauged(vector: Tensor, energy: Tensor) -> tuple[Tensor, float]:
    """A vector of energy-weighted root mean square 1 and positive mean, and the signed size that was taken out."""
    size = (float((energy * vector.square()).sum()) / (float(energy.sum()) or 1.0)) ** 0.5
    if not 0.0 < size < float("inf"):
        return torch.ones_like(vector), size
    size = size if float((energy * vector).sum()) >= 0.0 else -size
    return vector / size, size


def collapsed(
    history: History, made_of: Coefficients, vectors: Iterable[tuple[int, FactorVectors]], horizon: int
) -> FactorVectors:
    """The vectors of every step's gradient in what was asked of the weight: [t + 1, o] and [t + 1, i].

    ``made_of`` are the coefficients of the entries of ``history`` up to ``horizon``, ``vectors`` those of the fitted
    steps, newest first. A gradient reaches the weight in its own step and, through the momentum filter, in later ones;
    its vectors are the means over those, weighted with how much comes through.
    """
    used = history.where(history.step <= horizon)
    fitted = (~used.state[FIT_RATE].isnan()).tolist()
    entries = {step: e for e, step in enumerate(used.step.tolist()) if fitted[e]}
    through = (used.state[FIT_RATE].nan_to_num() * made_of.reach).abs().tolist()
    momentum = used.state[FIT_MOMENTUM].nan_to_num().tolist()
    found: FactorVectors | None = None
    means: tuple[Tensor, ...] = ()
    weight = 0.0
    for step, own in vectors:
        if step > horizon:
            continue
        if found is None:
            found = FactorVectors(*(v.new_ones(horizon + 1, len(v)) for v in (own.row, own.column)))
            means = (torch.zeros_like(own.row), torch.zeros_like(own.column))
        e = entries[step]
        weight += through[e]
        for mean, new, whole in zip(means, (own.row, own.column), (found.row, found.column), strict=True):
            mean.add_(new, alpha=through[e])
            if weight:
                whole[step] = mean / weight
            mean.mul_(momentum[e])
        weight *= momentum[e]
    return found or FactorVectors(torch.ones(horizon + 1, 1), torch.ones(horizon + 1, 1))
