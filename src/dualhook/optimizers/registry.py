"""Which rule explains which optimiser class."""

from __future__ import annotations

import inspect

from dualhook.optimizers.rule import Rule
from dualhook.records import History

__all__ = ["ANY", "FIT_RATE", "class_name", "register", "rule_for", "rules", "rules_in"]

ANY = "*"
"""The name under which the rule is registered that takes every optimiser without one of its own."""

FIT_RATE = "fit.rate"
"""The number that every fitted step has in the ledger."""

_RULES: dict[str, Rule] = {}


def register(optimizer: type | str, rule: Rule) -> None:
    """Explain an optimiser class (or its qualified name, ``"package.module.Class"``) by a rule.

    Subclasses share the rule as long as they do not override ``step``.
    """
    _RULES[optimizer if isinstance(optimizer, str) else _qualified(optimizer)] = rule


def rule_for(name: str) -> Rule:
    """The rule of an optimiser class, by the name :func:`class_name` gave; where none is registered, the fitted one."""
    return _RULES.get(name) or _RULES[ANY]


def rules_in(history: History) -> dict[str, Rule]:
    """The rule of every optimiser that has stepped on a parameter, by the optimiser's class.

    A step that was fitted when it was recorded stays so: the ledger holds no more than the fit.
    """
    fitted = history.state.get(FIT_RATE)
    found = {}
    for e, name in enumerate(history.optimizer):
        if name not in found:
            found[name] = rule_for(name) if fitted is None or bool(fitted[e].isnan()) else _RULES[ANY]
    return found


def rules() -> dict[str, Rule]:
    """Every registered rule by the qualified name of its optimiser class."""
    return {name: rule for name, rule in _RULES.items() if name != ANY}


def class_name(optimizer: type) -> str:
    """The qualified name of the class whose ``step`` an optimiser class runs.

    A subclass that only changes the constructor is the optimiser it derives from; one that overrides ``step`` is not.
    """
    if _qualified(optimizer) in _RULES:
        return _qualified(optimizer)
    step = inspect.unwrap(getattr(optimizer, "step", None) or optimizer)  # torch and schedulers wrap it
    for base in optimizer.__mro__[1:]:
        inherited = getattr(base, "step", None)
        if inherited is not None and inspect.unwrap(inherited) is step and _qualified(base) in _RULES:
            return _qualified(base)
    return _qualified(optimizer)


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
