"""Lookahead (Zhang et al. 2019), seen in the weights: every few steps they are pulled back towards slow ones.

A synchronisation after step ``t`` is ``W_t <- alpha W_t + (1 - alpha) W_tau``, where the slow weights are those after
an earlier step ``tau``: the last synchronisation, or where the run began. It stands in the ledger as an entry of its
own behind the step's, and needs neither the wrapper nor its state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualhook.optimizers.registry import register
from dualhook.optimizers.scalar import ScalarRule, Transitions
from dualhook.records import History

__all__ = ["LOOKAHEAD", "LookaheadRule", "fit_synchronization"]

LOOKAHEAD = "lookahead"
"""What the ledger calls a synchronisation."""

DIGITS = 6  # of an alpha that somebody has typed
UNEXPLAINED = 0.1  # of the change that may be left: more is no synchronisation, however small it is


class LookaheadRule(ScalarRule):
    """A synchronisation; ``hyper`` holds ``alpha`` and ``slow_step``, the step ``tau``."""

    name = LOOKAHEAD

    def transitions(self, history: History) -> Transitions:
        alpha = history.column("alpha")
        zero = torch.zeros_like(alpha)
        return Transitions(
            ww=alpha, wb=zero, wg=zero, bw=zero, bb=torch.ones_like(alpha), bg=zero, ws=1 - alpha
        )  # fmt: skip


def fit_synchronization(before: Tensor, after: Tensor, slow: Tensor, eps: float) -> float | None:
    """``alpha``, if ``after`` is ``alpha · before + (1 - alpha) · slow`` up to rounding with ``eps``; else None.

    All three are entries of one parameter [n] in float64. Where the weights were the slow ones already, ``alpha`` is 1.
    """
    apart, moved = before - slow, after - before
    distance = float(apart.norm())
    if distance == 0:
        return 1.0 if bool((moved.abs() <= eps * before.abs()).all()) else None
    rounding = 2 * eps * torch.maximum(before.abs(), slow.abs())
    alpha = 1 + float(moved @ apart) / distance**2
    sure = float(rounding.norm()) / distance
    alpha = next((short for d in range(1, DIGITS + 1) if abs((short := round(alpha, d)) - alpha) <= sure), alpha)
    if not 0 < alpha < 1:
        return None
    left = (after - torch.lerp(slow, before, alpha)).abs()
    explained = bool((left <= rounding).all()) and float(left.norm()) <= UNEXPLAINED * float(moved.norm())
    return alpha if explained else None


register(LOOKAHEAD, LookaheadRule())
