"""Running a rule forward over gradients, and backward for what each gradient has become: pure tensor algebra.

Forward, a step moves ``(W, B)`` by the rule's linear map. Backward, the adjoint of these maps gives for every step the
coefficient ``C`` with which its gradient stands in the weight at the horizon::

    W_T = a W_0 + part of B_0 - sum_t C_t ∘ (scale_t G_t + decay_t W_{t-1}) - sum_t a_t rest_t

The sum over ``decay_t W_{t-1}`` is the "weight-decay" part: what coupled decay put into the weights, through the same
preconditioner as the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dualhook.optimizers.rule import Entry, LinearStep, ReplayRule, Side

__all__ = ["Adjoint", "ParameterState", "advance", "apply"]


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
    if entry.fresh:
        at.tensors = rule.start(at.weight, entry)
    elif not at.tensors or (rule.buffer is not None and rule.buffer not in at.tensors):
        at.tensors = rule.start(at.weight, entry) | at.tensors
    scale, decay = rule.gradient_scale(entry), rule.decay(entry)
    g = gradient if scale == 1.0 else gradient * scale
    if decay:
        g = torch.add(g, at.weight, alpha=decay)
    step = rule.linearize(at.weight, g, at.tensors, entry)
    moves_buffer = rule.buffer is not None and (whole or rule.reads_buffer)
    if whole or rule.reads_weight or decay:
        side = rule.side(at.weight)
        direction = g * step.from_gradient if step.from_gradient != 1.0 else g
        if rule.buffer is not None and step.from_buffer:
            direction = torch.add(direction, at.tensors[rule.buffer], alpha=step.from_buffer)
            moves_buffer = True
        if step.shrink != 1.0:
            at.weight.mul_(step.shrink)
        at.weight.sub_(apply(step.factor, direction, side))
        if rule.buffer is not None and step.plain_from_buffer:
            at.weight.sub_(at.tensors[rule.buffer], alpha=step.plain_from_buffer)
            moves_buffer = True
        if step.rest is not None:
            at.weight.sub_(step.rest)
    if moves_buffer and rule.buffer is not None:
        inner = g if isinstance(step.buffer_factor, float) else g * step.buffer_factor
        take = step.take * step.buffer_factor if isinstance(step.buffer_factor, float) else step.take
        at.tensors[rule.buffer].mul_(step.keep).add_(inner, alpha=take)
    return step


def apply(factor: Tensor | float, values: Tensor, side: Side) -> Tensor:
    """``factor ∘ values``."""
    if not isinstance(factor, Tensor) or side == "elementwise":
        return values * factor
    return factor @ values if side == "left" else values @ factor


class Adjoint:
    """Backward through the steps of one parameter: from the horizon to the origin, newest step first.

    ``weight`` is the factor with which W after the current step stands in what is asked about, ``buffer`` minus that of
    B (a matrix for matrix rules): the linear maps take both to the step before.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight
        self.buffer: Tensor | float = 0.0

    def back(self, step: LinearStep, *, fresh: bool, out: Tensor | None = None) -> Tensor | float:
        """Take one step back; returns the coefficient of its gradient: elementwise, or a matrix for its side.

        The coefficient may be ``out``, which the next call overwrites.
        """
        coefficient = _sum(step.factor, self.weight * step.from_gradient, 0.0, 0.0, out)
        if step.take and not _is_zero(self.buffer):
            flow = self.buffer
            if isinstance(step.buffer_factor, Tensor):
                flow = flow * step.buffer_factor
                coefficient = _sum(flow, step.take, coefficient, 1.0, None)
            else:
                scaled = step.take * step.buffer_factor
                coefficient = _sum(step.factor, self.weight * step.from_gradient, flow, scaled, out)
        if fresh:
            self.buffer = 0.0
        else:
            self.buffer = _accumulate(self.buffer, step.keep, step.factor, self.weight * step.from_buffer)
            if step.plain_from_buffer:
                self.buffer = _accumulate(self.buffer, 1.0, self.weight * step.plain_from_buffer, 1.0)
        self.weight *= step.shrink
        return coefficient

    def read(self, readout: float) -> None:
        """Ask for ``readout`` times the weight at this place as well: averages of the weights along the way."""
        self.weight += readout


def _is_zero(value: Tensor | float) -> bool:
    return not isinstance(value, Tensor) and value == 0.0


def _sum(x: Tensor | float, a: float, y: Tensor | float, b: float, out: Tensor | None) -> Tensor | float:
    """``a x + b y``, into ``out`` where that is given and a tensor results."""
    if not isinstance(x, Tensor) and not isinstance(y, Tensor):
        return a * x + b * y
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        scaled = torch.mul(x, a, out=out)
        return scaled.add_(y, alpha=b)
    if isinstance(x, Tensor):
        scaled = torch.mul(x, a, out=out)
        return scaled if _is_zero(y) else scaled.add_(b * float(y))
    assert isinstance(y, Tensor)
    scaled = torch.mul(y, b, out=out)
    return scaled if _is_zero(x) else scaled.add_(a * float(x))


def _accumulate(held: Tensor | float, keep: float, x: Tensor | float, a: float) -> Tensor | float:
    """``keep · held + a x``, in place where ``held`` is a tensor."""
    if isinstance(held, Tensor):
        held.mul_(keep)
        return held.add_(x, alpha=a) if isinstance(x, Tensor) else held.add_(a * x)
    if isinstance(x, Tensor):
        scaled = x * a
        return scaled if held * keep == 0.0 else scaled.add_(held * keep)
    return keep * held + a * x
