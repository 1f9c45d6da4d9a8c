"""Averages of the weights along a run, as one weight per step: any of them is linear in the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from dualhook.errors import RuleError

__all__ = ["average_weights"]


def average_weights(name: str, *, horizon: int, start: int = 1, every: int = 1, decay: float = 0.999) -> Tensor:
    """How much the weight after each step counts in an average, float64 [horizon + 1]; the entries sum to 1.

    ``"ema"`` and ``"swa"`` follow ``torch.optim.swa_utils.AveragedModel`` updated after steps ``start``,
    ``start + every``, … : the first update copies the weights, an EMA then keeps ``decay`` of itself at every
    update, an SWA is the plain mean. ``start=0`` is an average that begins as a copy of the untrained weights.

    Raises:
        RuleError: an unknown name, a decay outside [0, 1], or a start after the horizon.
    """
    if name not in ("ema", "swa"):
        raise RuleError(f"unknown average {name!r}: expected 'ema', 'swa' or 'asgd'")
    if not 0.0 <= decay <= 1.0:
        raise RuleError(f"decay {decay} of the average: expected a number from 0 to 1")
    if every < 1 or not 0 <= start <= horizon:
        raise RuleError(
            f"an average that starts at step {start} and is updated every {every} steps: "
            f"expected a start from 0 to {horizon}, the steps asked about, and every >= 1"
        )
    updates = torch.arange(start, horizon + 1, every)
    weights = torch.zeros(horizon + 1, dtype=torch.float64)
    if name == "swa":
        weights[updates] = 1.0 / updates.numel()
        return weights
    age = torch.arange(updates.numel() - 1, -1, -1, dtype=torch.float64)
    weights[updates] = (1.0 - decay) * decay**age
    weights[start] = decay ** float(age[0])
    return weights
