"""The self-check: now and then a step is predicted by its rule and compared with what the optimiser really did."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from dualhook.capture import local, whole
from dualhook.optimizers import Entry, ParameterState, ReplayedScalar, ReplayRule, Rule, ScalarRule, advance
from dualhook.recorder.watched import Watched, state_of

__all__ = ["Prediction", "is_due", "predict"]

ENTRIES = 128  # of a parameter, where its rule treats every entry alone
EVERY = 32  # steps between two checks; the first few steps have one each
WHOLE_EVERY = 512  # the same for rules that need the whole parameter
TOLERANCE = 1e-2  # of the change; a wrong rule is off by far more


def is_due(step: int, rule: Rule) -> bool:
    """Whether the step with this number is checked."""
    entrywise = isinstance(rule, ScalarRule) or (isinstance(rule, ReplayRule) and rule.separable)
    return step <= 3 or step % (EVERY if entrywise else WHOLE_EVERY) == 0


def predict(
    watched: Watched,
    optimizer: Optimizer,
    rule: Rule,
    gradient: Tensor,
    hyper: Mapping[str, float],
    numbers: Mapping[str, float],
    fresh: bool,
) -> Prediction | None:
    """What a step on a parameter will do to some of its entries, by its rule; None where there is nothing to say."""
    parameter = watched.parameter
    runs = ReplayedScalar(rule) if isinstance(rule, ScalarRule) else rule
    if parameter is None or not isinstance(runs, ReplayRule):
        return None
    index = None
    if runs.separable:
        held_here = local(parameter).numel()  # entry by entry a shard says enough
        index = torch.arange(0, held_here, max(1, held_here // ENTRIES), device=parameter.device)
    held = {name: value for name, value in state_of(optimizer, parameter).items() if isinstance(value, Tensor)}
    if index is not None and any(value.ndim and value.shape != parameter.shape for value in held.values()):
        return None
    dtype = torch.promote_types(parameter.dtype, torch.float32)

    def some(values: Tensor) -> Tensor:
        return _some(values, index).to("cpu", dtype, copy=True)

    before = some(parameter)
    place = ParameterState(before.clone(), {name: some(value) for name, value in held.items() if value.ndim})
    advance(runs, place, some(gradient), Entry(hyper, numbers, 1.0, fresh), whole=True)
    return Prediction(watched, index, before, place.weight)


class Prediction:
    """Some entries of a parameter before a step, and what the rule says they will be after it."""

    def __init__(self, watched: Watched, index: Tensor | None, before: Tensor, after: Tensor) -> None:
        self._watched = watched
        self._index = index
        self._before = before
        self._after = after

    def off_by(self) -> float | None:
        """By which share of the real change the prediction is wrong, if that is more than rounding; else None."""
        parameter = self._watched.parameter
        if parameter is None:
            return None
        found = _some(parameter, self._index).to("cpu", self._before.dtype)
        left, moved = float((found - self._after).norm()), float((found - self._before).norm())
        rounding = 8 * torch.finfo(parameter.dtype).eps * float(self._before.norm())
        if left <= TOLERANCE * moved + rounding or left != left:  # NaN is told by the gradient
            return None
        return left / moved if moved else float("inf")


def _some(values: Tensor, index: Tensor | None) -> Tensor:
    """The entries of a tensor at ``index`` of its local part, or all of it."""
    return whole(values) if index is None else torch.take(local(values), index)
