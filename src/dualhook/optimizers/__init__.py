"""Rules: how an optimiser turns the history of gradients into weights. Pure tensor algebra.

A rule is found by the optimiser's qualified class name, so that a memory can be read where the optimiser is not
installed, and a later version of this package can explain what an earlier one recorded.
"""

from __future__ import annotations

from dualhook.optimizers.averages import average_weights
from dualhook.optimizers.registry import class_name, register, rule_for
from dualhook.optimizers.scalar import ASGDRule, ScalarRule, SGDRule, Transitions, coefficients, components

__all__ = [
    "ASGDRule",
    "SGDRule",
    "ScalarRule",
    "Transitions",
    "average_weights",
    "class_name",
    "coefficients",
    "components",
    "register",
    "rule_for",
]
