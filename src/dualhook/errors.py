"""The one family of errors, and the one warning."""

from __future__ import annotations

__all__ = ["BudgetError", "DualHookError", "InexactWarning", "LayerError", "RuleError", "StoreError"]


class DualHookError(Exception):
    """Base of every error this package raises on purpose; the message names the remedy."""


class LayerError(DualHookError):
    """A layer, model or query that is not there, or does not fit the memory."""


class RuleError(DualHookError):
    """What the optimiser has done is not known the way it was asked for.

    A rule that is not registered any more, a preview or an average that cannot be had, an optimiser that cannot be
    recorded.
    """


class StoreError(DualHookError):
    """A directory that is no memory, already is one, or cannot be read or written."""


class BudgetError(DualHookError):
    """The byte budget is used up and ``on_full="error"`` was asked for."""


class InexactWarning(UserWarning):
    """The recorded rows do not explain what happened to a weight; from that step on it is not exact."""
