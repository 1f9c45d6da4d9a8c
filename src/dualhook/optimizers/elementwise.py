"""Rules of optimisers that scale every entry of the gradient on its own: the Adam family and its relatives.

Written after the single-tensor forms in ``torch.optim``; foreach, fused and capturable forms compute the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualhook.optimizers.registry import register
from dualhook.optimizers.rule import Entry, LinearStep, ReplayRule

__all__ = ["AdamRule"]


class AdamRule(ReplayRule):
    """``torch.optim.Adam`` and ``AdamW``, amsgrad included (Kingma and Ba 2015; Loshchilov and Hutter 2019)."""

    name = "adam"
    buffer = "exp_avg"

    def __init__(self, *, decoupled: bool = False) -> None:
        self.decoupled = decoupled

    def state_numbers(self, state, hyper):
        return {"step": float(state["step"]) if "step" in state else 0.0}

    def start(self, weight: Tensor, entry: Entry) -> dict[str, Tensor]:
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if entry["amsgrad"] else ()))
        return {name: torch.zeros_like(weight) for name in names}

    def decay(self, entry: Entry) -> float:
        return 0.0 if self._decoupled(entry) else entry["weight_decay"]

    def linearize(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], entry: Entry) -> LinearStep:
        step = entry.state["step"] + 1
        beta1, beta2 = entry["betas.0"], entry["betas.1"]
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        if entry["amsgrad"]:
            second = torch.maximum(state["max_exp_avg_sq"], second, out=state["max_exp_avg_sq"])
        factor = second.sqrt()
        factor.div_((1 - beta2**step) ** 0.5).add_(entry["eps"]).reciprocal_().mul_(entry["lr"] / (1 - beta1**step))
        return LinearStep(
            factor,
            from_buffer=beta1,
            from_gradient=1 - beta1,
            keep=beta1,
            take=1 - beta1,
            shrink=1 - entry["lr"] * entry["weight_decay"] if self._decoupled(entry) else 1.0,
        )

    def _decoupled(self, entry: Entry) -> bool:
        return self.decoupled or bool(entry["decoupled_weight_decay"])


register("torch.optim.adam.Adam", AdamRule())
register("torch.optim.adamw.AdamW", AdamRule(decoupled=True))
