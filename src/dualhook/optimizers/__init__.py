"""Rules: how an optimiser turns the history of gradients into weights. Pure tensor algebra.

A rule is found by the optimiser's qualified class name, so that a memory can be read where the optimiser is not
installed, and a later version of this package can explain what an earlier one recorded.
"""

from __future__ import annotations

from dualhook.optimizers.averages import average_weights
from dualhook.optimizers.elementwise import (
    AdadeltaRule,
    AdafactorRule,
    AdagradRule,
    AdamaxRule,
    AdamRule,
    LionRule,
    NAdamRule,
    RAdamRule,
    RMSpropRule,
    RpropRule,
)
from dualhook.optimizers.fitted import FittedRule, StepFit, Tracker, collapsed
from dualhook.optimizers.lookahead import LOOKAHEAD, LookaheadRule, fit_synchronization
from dualhook.optimizers.matrix import MuonRule
from dualhook.optimizers.registry import class_name, register, rule_for, rules, rules_in
from dualhook.optimizers.replay import Adjoint, ParameterState, advance, apply, pass_by
from dualhook.optimizers.rule import Entry, Exactness, LinearStep, ReplayRule, Rule, Side
from dualhook.optimizers.scalar import (
    ASGDRule,
    ReplayedScalar,
    ScalarRule,
    SGDRule,
    Transitions,
    coefficients,
    components,
)

__all__ = [
    "LOOKAHEAD",
    "ASGDRule",
    "AdadeltaRule",
    "AdafactorRule",
    "AdagradRule",
    "AdamRule",
    "AdamaxRule",
    "Adjoint",
    "Entry",
    "Exactness",
    "FittedRule",
    "LinearStep",
    "LionRule",
    "LookaheadRule",
    "MuonRule",
    "NAdamRule",
    "ParameterState",
    "RAdamRule",
    "RMSpropRule",
    "ReplayRule",
    "ReplayedScalar",
    "RpropRule",
    "Rule",
    "SGDRule",
    "ScalarRule",
    "Side",
    "StepFit",
    "Tracker",
    "Transitions",
    "advance",
    "apply",
    "average_weights",
    "class_name",
    "coefficients",
    "collapsed",
    "components",
    "fit_synchronization",
    "pass_by",
    "register",
    "rule_for",
    "rules",
    "rules_in",
]
