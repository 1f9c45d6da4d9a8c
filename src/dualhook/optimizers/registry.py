"""Which rule explains which optimiser class."""

from __future__ import annotations

import inspect

from dualhook.optimizers.rule import Rule

__all__ = ["class_name", "register", "rule_for", "rules"]

_RULES: dict[str, Rule] = {}


def register(optimizer: type | str, rule: Rule) -> None:
    """Explain an optimiser class (or its qualified name, ``"package.module.Class"``) by a rule.

    Subclasses share the rule as long as they do not override ``step``.
    """
    _RULES[optimizer if isinstance(optimizer, str) else _qualified(optimizer)] = rule


def rule_for(name: str) -> Rule | None:
    """The rule of an optimiser class, by the name :func:`class_name` gave."""
    return _RULES.get(name)


def rules() -> dict[str, Rule]:
    """Every registered rule by the qualified name of its optimiser class."""
    return dict(_RULES)


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
