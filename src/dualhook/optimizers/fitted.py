"""The rule for every optimiser that has none: each observed weight change is fitted, what is left stays residual.

With ``W`` and ``W'`` before and after a step, ``g`` the gradient it saw and ``M = momentum · M + g + coupled · W``::

    W' = shrink · W  -  rate · (row columnᵀ) ∘ M  +  residual

Momentum, and whether weight decay shrinks the weight or joins the gradient, are tried out in the first steps.
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

import torch
from torch import Tensor

from dualhook.errors import RuleError
from dualhook.optimizers.registry import ANY, FIT_RATE, register
from dualhook.optimizers.rule import Exactness
from dualhook.optimizers.scalar import ScalarRule, Transitions
from dualhook.records import Coefficients, FactorVectors, History

__all__ = ["FittedRule", "StepFit", "Tracker", "collapsed"]

FIT_MOMENTUM, FIT_SHRINK, FIT_COUPLED = "fit.momentum", "fit.shrink", "fit.coupled"
TRIAL_STEPS = 16  # in which several momenta are tried on a parameter; the best goes on alone
USUAL_MOMENTUM = 0.9
FIRST_ROUNDS = 30  # of least squares, at most; later steps start from the one before
LONG = 0.99  # of the running energy is kept at each step
CONVERGED = 1e-7  # of what is explained: what a further round does not add any more
NOISE = 16  # times the dtype's rounding: what sums of squares cannot tell from nothing
MOMENTUM_NAMES = ("momentum", "betas.0", "beta1", "beta")
DECAY = "weight_decay"


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
        names = (FIT_RATE, FIT_MOMENTUM, FIT_SHRINK, FIT_COUPLED)
        rate, momentum, shrink, coupled = (history.state[name] for name in names)
        return Transitions(
            ww=shrink - rate * coupled,
            wb=-rate * momentum,
            wg=-rate * history.scale,
            bw=coupled,
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


@dataclass(frozen=True)
class _Way:
    """How gradients might come to the weight: through which momentum, beside or behind which weight decay."""

    momentum: float
    shrinks: bool = False
    coupled: bool = False


class Tracker:
    """Fits the steps of one parameter, in training; ``hyper`` are the settings of its group."""

    def __init__(self, hyper: Mapping[str, float]) -> None:
        likely = [hyper[name] for name in MOMENTUM_NAMES if 0.0 <= hyper.get(name, 1.0) < 1.0]
        momenta = dict.fromkeys([*likely, USUAL_MOMENTUM, 0.0])
        decays = [(False, False)]
        if hyper.get(DECAY) and hyper.get("lr"):
            decays = [(True, False), (False, True), (False, False)]
        self._left = {_Way(momentum, *decay): 0.0 for momentum in momenta for decay in decays}
        """What each way has left open of the first steps."""
        self._way = next(iter(self._left))
        self._filters: dict[_Way, Tensor] = {}
        self._buffer: Tensor | None = None  # the momentum filter that the ledger's numbers describe
        self._steps = 0
        self._last: FactorVectors | None = None
        self._energy: tuple[Tensor | None, Tensor | None] = (None, None)  # of its rows and columns, over many steps
        self._lost = self._coupled = 0.0

    def see(self, gradient: Tensor, weight: Tensor, hyper: Mapping[str, float]) -> None:
        """Take in the gradient [o, i] or [o] of the next step as the optimiser sees it, and what it acts on."""
        gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        self._coupled = hyper.get(DECAY, 0.0)
        self._lost = hyper.get("lr", 0.0) * self._coupled
        self._buffer = self._filtered(self._way, self._buffer, gradient, weight)
        if self._steps < TRIAL_STEPS:
            for way in self._left:
                self._filters[way] = self._filtered(way, self._filters.get(way), gradient, weight)

    def fit(self, before: Tensor, weight: Tensor) -> StepFit:
        """What the step has done: the parameter before it, and now."""
        assert self._buffer is not None
        before = before.to(self._buffer.dtype)
        change = before - weight.detach().to(self._buffer.dtype)
        way = self._way
        rate, self._last = self._solve(self._without_decay(change, before, way), self._buffer)
        vectors = self._last
        if vectors is not None:
            energy = self._buffer.square()
            by_row, by_column = (_running(e, energy.sum(d), LONG) for e, d in zip(self._energy, (1, 0), strict=True))
            row, of_row = _gauged(vectors.row, by_row)
            column, of_column = _gauged(vectors.column, by_column)
            self._energy = (by_row, by_column)
            rate, vectors = rate * of_row * of_column, FactorVectors(row, column)
        numbers = {
            FIT_RATE: rate,
            FIT_MOMENTUM: way.momentum if self._steps else 0.0,  # the filter starts with the first step
            FIT_SHRINK: 1.0 - self._lost if way.shrinks else 1.0,
            FIT_COUPLED: self._coupled if way.coupled else 0.0,
        }
        self._steps += 1
        if self._steps <= TRIAL_STEPS:
            self._try(change, before)
        return StepFit(numbers, vectors)

    def _try(self, change: Tensor, before: Tensor) -> None:
        """Follow every way; from the next step on it is the one that has left least open."""
        size = float(change.square().sum())
        for way, buffer in self._filters.items():
            target = self._without_decay(change, before, way)
            rate, vectors = self._solve(target, buffer)
            left = float((target - rate * _shaped(buffer, vectors)).square().sum())
            self._left[way] += left / size if size else 0.0
        best = min(self._left, key=lambda way: self._left[way])
        noise = NOISE * torch.finfo(change.dtype).eps * self._steps
        if self._left[best] + noise < self._left[self._way]:  # a switch costs what the filter holds
            self._way = best
        if self._steps == TRIAL_STEPS:
            self._filters = {}

    def _filtered(self, way: _Way, held: Tensor | None, gradient: Tensor, weight: Tensor) -> Tensor:
        if way.coupled and self._coupled:
            gradient = gradient.add(weight, alpha=self._coupled)
        return _running(held, gradient, way.momentum)

    def _without_decay(self, change: Tensor, before: Tensor, way: _Way) -> Tensor:
        return change.sub(before, alpha=self._lost) if way.shrinks and self._lost else change

    def _solve(self, change: Tensor, buffer: Tensor) -> tuple[float, FactorVectors | None]:
        """Rate and vectors with ``change ≈ rate · (row columnᵀ) ∘ M``, from what the last step came to."""
        vectors = None
        if change.ndim == 2:
            rounds = FIRST_ROUNDS if self._steps < TRIAL_STEPS else 1
            vectors = _best_vectors(change, buffer, self._last, rounds)
        shaped = _shaped(buffer, vectors)
        energy = float(shaped.square().sum())
        return float((change * shaped).sum()) / energy if energy else 0.0, vectors


def _shaped(buffer: Tensor, vectors: FactorVectors | None) -> Tensor:
    return buffer if vectors is None else buffer * vectors.row[:, None] * vectors.column


def _running(held: Tensor | None, values: Tensor, keep: float) -> Tensor:
    return values.clone() if held is None else held.mul_(keep).add_(values)


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
    precision = torch.finfo(energy.dtype)  # where there is next to no energy, there is nothing to be learnt
    found = crossed / energy.clamp(min=max(precision.tiny, precision.eps**2 * float(energy.max())))
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
            means = (torch.zeros_like(own.row, dtype=torch.float64), torch.zeros_like(own.column, dtype=torch.float64))
        e = entries[step]
        weight += through[e]
        for mean, new, whole in zip(means, (own.row, own.column), (found.row, found.column), strict=True):
            mean.add_(new, alpha=through[e])
            if weight:
                whole[step] = mean / weight
            mean.mul_(momentum[e])
        weight *= momentum[e]
    return found or FactorVectors(torch.ones(horizon + 1, 1), torch.ones(horizon + 1, 1))
