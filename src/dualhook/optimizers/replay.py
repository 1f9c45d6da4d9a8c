"""Running a rule forward over gradients, and backward for what each gradient has become: pure tensor algebra.

Forward, a step moves ``(W, B)`` by the rule's linear map. Backward, the adjoint of these maps gives for every step the
coefficient ``C`` with which its gradient stands in the weight at the horizon::

    W_T = a W_0 + part of B_0 - sum_t C_t ∘ (scale_t G_t + decay_t W_{t-1}) - sum_t a_t rest_t

The sum over ``decay_t W_{t-1}`` is the "weight-decay" part: what coupled decay put into the weights, through the same
preconditioner as the gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dualhook.optimizers.rule import Entry, LinearStep, ReplayRule, Side

__all__ = ["Adjoint", "ParameterState", "advance", "apply", "pass_by"]


@dataclass
class ParameterState:
    """A parameter in the middle of a replay: its weight and the optimiser's state tensors, by torch's names."""

    weight: Tensor
    tensors: dict[str, Tensor]

    def copy(self) -> ParameterState:
        """An independent copy."""
        return ParameterState(self.weight.clone(), {name: value.clone() for name, value in self.tensors.items()})


def advance(rule: ReplayRule, at: ParameterState, gradient: Tensor, entry: Entry, *, whole: bool) -> LinearStep:
    """Take one step: ``at`` is moved in place, the step's linear map is returned.

    ``gradient`` is the rebuilt one, without scale and decay. Without ``whole`` only what later steps' factors depend
    on is moved.
    """
    _begin(rule, at, entry)
    scale, decay = rule.gradient_scale(entry), rule.decay(entry)
    g = gradient if scale == 1.0 else gradient * scale
    if decay:
        g = torch.add(g, at.weight, alpha=decay)
    step = rule.linearize(at.weight, g, at.tensors, entry)
    moves_buffer = rule.buffer is not None and (whole or rule.reads_buffer)
    if whole or rule.reads_weight or decay:
        side = rule.side(at.weight)
        if step.shrink != 1.0:
            at.weight.mul_(step.shrink)
        _subtract(at.weight, step.factor, g, step.from_gradient, side)
        if rule.buffer is not None and step.from_buffer:
            _subtract(at.weight, step.factor, at.tensors[rule.buffer], step.from_buffer, side)
            moves_buffer = True
        if rule.buffer is not None and step.plain_from_buffer:
            at.weight.sub_(at.tensors[rule.buffer], alpha=step.plain_from_buffer)
            moves_buffer = True
        if step.rest is not None:
            at.weight.sub_(step.rest)
    if moves_buffer and rule.buffer is not None:
        buffer = at.tensors[rule.buffer].mul_(step.keep)
        if isinstance(step.buffer_factor, Tensor):
            buffer.addcmul_(g, step.buffer_factor, value=step.take)
        else:
            buffer.add_(g, alpha=step.take * step.buffer_factor)
    return step


def pass_by(rule: ReplayRule, at: ParameterState, gradient: Tensor, entry: Entry) -> bool:
    """Take one step without its linear map, where later factors depend on the buffer alone; whether that is so."""
    moves = rule.moves_only(entry)
    if moves is None or rule.buffer is None or rule.decay(entry):
        return False
    _begin(rule, at, entry)
    keep, take = moves
    at.tensors[rule.buffer].mul_(keep).add_(gradient, alpha=take * rule.gradient_scale(entry))
    return True


def _begin(rule: ReplayRule, at: ParameterState, entry: Entry) -> None:
    """Set up the optimiser's state where it had none."""
    if entry.fresh:
        at.tensors = rule.start(at.weight, entry)
    elif not at.tensors or (rule.buffer is not None and rule.buffer not in at.tensors):
        at.tensors = rule.start(at.weight, entry) | at.tensors


def apply(factor: Tensor | float, values: Tensor, side: Side) -> Tensor:
    """``factor ∘ values``."""
    if not isinstance(factor, Tensor) or side == "elementwise":
        return values * factor
    return factor @ values if side == "left" else values @ factor


def _subtract(weight: Tensor, factor: Tensor | float, values: Tensor, scale: float, side: Side) -> None:
    """``weight -= scale · factor ∘ values``, without a tensor in between where that can be."""
    if not isinstance(factor, Tensor):
        weight.sub_(values, alpha=scale * factor)
    elif side == "elementwise":
        weight.addcmul_(factor, values, value=-scale)
    else:
        weight.sub_(apply(factor, values, side), alpha=scale)


class Adjoint:
    """Backward through the steps of one parameter: from the horizon to the origin, newest step first.

    ``weight`` is the factor with which W after the current step stands in what is asked about, ``buffer`` minus that of
    B (a matrix for matrix rules): the linear maps take both to the step before.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self._unit: Tensor | float = 0.0  # the buffer's factor is `_scale · _unit`: scaling it costs no pass
        self._scale = 1.0
        self._out: Tensor | None = None

    @property
    def buffer(self) -> Tensor | float:
        """Minus the factor of the buffer."""
        return self._unit * self._scale

    @buffer.setter
    def buffer(self, value: Tensor | float) -> None:
        self._unit, self._scale = value, 1.0

    @property
    def product(self) -> tuple[Tensor | float, float]:
        """:attr:`buffer` as the product it is held as."""
        return self._unit, self._scale

    @product.setter
    def product(self, value: tuple[Tensor | float, float]) -> None:
        self._unit, self._scale = value

    def back(self, step: LinearStep, *, fresh: bool) -> tuple[Tensor | float, float]:
        """Take one step back; returns the coefficient of its gradient: elementwise, or a matrix for its side.

        The coefficient is the product of the pair; its tensor may be the step's or be overwritten by the next call.
        """
        found = self._together(step) or self._apart(step)
        if fresh:
            self._unit, self._scale = 0.0, 1.0
        self.weight *= step.shrink
        return found

    def read(self, readout: float) -> None:
        """Ask for ``readout`` times the weight at this place as well: averages of the weights along the way."""
        self.weight += readout

    def _together(self, step: LinearStep) -> tuple[Tensor | float, float] | None:
        """The step if what it gives the gradient is a multiple of what it leaves the buffer, as in Adam: one pass."""
        factor, through = step.factor, self.weight * step.from_buffer
        if not isinstance(factor, Tensor) or isinstance(step.buffer_factor, Tensor) or step.plain_from_buffer:
            return None
        take, direct = step.take * step.buffer_factor, self.weight * step.from_gradient
        if not (step.keep and through and math.isclose(direct * step.keep, take * through, rel_tol=1e-12)):
            return None
        held, alpha = self._unit, step.keep * self._scale / through
        if isinstance(held, Tensor):
            torch.add(factor, held, alpha=alpha, out=held)
        else:
            self._unit = factor + alpha * held if held else factor.clone()
        self._scale = through
        return self._unit, take / step.keep * through

    def _apart(self, step: LinearStep) -> tuple[Tensor | float, float]:
        """The step in general: first the coefficient, then the buffer."""
        direct = self.weight * step.from_gradient
        if isinstance(self._unit, Tensor) and self._scale != 1.0:
            self._unit.mul_(self._scale)
            self._scale = 1.0
        held = self.buffer
        found: tuple[Tensor | float, float] = step.factor, direct
        if step.take and not _is_zero(held):
            if not isinstance(step.buffer_factor, Tensor):
                found = self._sum(step.factor, direct, held, step.take * step.buffer_factor), 1.0
            elif step.buffer_factor is step.factor and not isinstance(held, Tensor):
                found = step.factor, direct + step.take * held
            else:
                found = self._sum(step.factor, direct, held * step.buffer_factor, step.take), 1.0
        self.buffer = _accumulate(held, step.keep, step.factor, self.weight * step.from_buffer)
        if step.plain_from_buffer:
            self.buffer = _accumulate(self.buffer, 1.0, self.weight * step.plain_from_buffer, 1.0)
        return found

    def _sum(self, x: Tensor | float, a: float, y: Tensor | float, b: float) -> Tensor | float:
        """``a x + b y``, in a tensor that is used again."""
        if not isinstance(x, Tensor):
            x, a, y, b = y, b, x, a
        if not isinstance(x, Tensor):
            return a * x + b * float(y)
        if self._out is None or self._out.shape != x.shape:
            self._out = torch.empty_like(x)
        scaled = torch.mul(x, a, out=self._out)
        return scaled.add_(y, alpha=b) if isinstance(y, Tensor) else scaled.add_(b * y) if b * y else scaled


def _is_zero(value: Tensor | float) -> bool:
    return not isinstance(value, Tensor) and value == 0.0


def _accumulate(held: Tensor | float, keep: float, x: Tensor | float, a: float) -> Tensor | float:
    """``keep · held + a x``, in place where ``held`` is a tensor."""
    if a == 0.0:
        return held.mul_(keep) if isinstance(held, Tensor) else held * keep
    if isinstance(held, Tensor):
        held.mul_(keep)
        return held.add_(x, alpha=a) if isinstance(x, Tensor) else held.add_(a * x)
    if isinstance(x, Tensor):
        scaled = x * a
        return scaled if held * keep == 0.0 else scaled.add_(held * keep)
    return keep * held + a * x
