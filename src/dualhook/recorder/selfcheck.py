"""The self-check: now and then what a step has done is compared with what its rule makes of the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from dualhook.capture import local, whole
from dualhook.optimizers import Entry, ParameterState, ReplayedScalar, ReplayRule, Rule, ScalarRule, advance
from dualhook.recorder.staging import Bring
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
    watched: Watched, optimizer: Optimizer, rule: Rule, gradient: Tensor, is_fresh: bool, bring: Bring
) -> Prediction | None:
    """Look at some entries of a parameter before a step; None where its rule says nothing about them.

    ``bring`` copies to the host what nothing writes to any more.
    """
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
    held = {name: value for name, value in held.items() if value.ndim}
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    there = bring([_some(values, index).to(dtype) for values in (parameter, gradient, *held.values())])
    return Prediction(watched, runs, index, there[0], there[1], dict(zip(held, there[2:], strict=True)), is_fresh)


@dataclass
class Prediction:
    """Some entries of a parameter, its gradient and its optimiser's state before a step, and what a rule makes of them.

    The tensors are in host memory, but may still be on their way there.
    """

    watched: Watched
    rule: ReplayRule
    index: Tensor | None  # which entries; None: all
    before: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    is_fresh: bool
    after: Tensor | None = None
    eps: float = 0.0  # of the parameter's dtype

    def see(self, bring: Bring) -> None:
        """The step has happened: look at what it has left."""
        parameter = self.watched.parameter
        if parameter is not None:
            self.after = bring([_some(parameter, self.index).to(self.before.dtype)])[0]
            self.eps = torch.finfo(parameter.dtype).eps

    def off_by(self, hyper: Mapping[str, float], numbers: Mapping[str, float]) -> float | None:
        """By which share of the real change the rule is wrong, if that is more than rounding; else None."""
        found = self.after
        if found is None:
            return None
        place = ParameterState(self.before.clone(), self.state)
        advance(self.rule, place, self.gradient, Entry(hyper, numbers, 1.0, self.is_fresh), whole=True)
        left, moved = float((found - place.weight).norm()), float((found - self.before).norm())
        rounding = 8 * self.eps * float(self.before.norm())
        if left <= TOLERANCE * moved + rounding or left != left:  # NaN is told by the gradient
            return None
        return left / moved if moved else float("inf")


def _some(values: Tensor, index: Tensor | None) -> Tensor:
    """Copies of the entries of a tensor at ``index`` of its local part, or of all of it."""
    return whole(values).detach().clone() if index is None else torch.take(local(values).detach(), index)
