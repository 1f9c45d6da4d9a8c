"""Rules of optimisers that multiply the gradient by a matrix: Muon. Shampoo-like ones fit the same protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from dualhook.optimizers.registry import register
from dualhook.optimizers.rule import Entry, Exactness, LinearStep, ReplayRule, Side

__all__ = ["MuonRule"]

ADJUSTMENTS = {None: 0.0, "original": 0.0, "match_rms_adamw": 1.0, "spectral_unclamped": 2.0}


class MuonRule(ReplayRule):
    """``torch.optim.Muon`` (Jordan et al. 2024): momentum ``M`` orthogonalised by Newton-Schulz.

    Every Newton-Schulz iteration multiplies by a polynomial of the iterate's Gram matrix, so the update is ``L M``
    (``M L`` for a tall weight) with ``L`` the product of the polynomials. torch iterates in bfloat16: ``L`` is made of
    the very Gram matrices it used, and what its rounding adds to ``L M`` is the "rounding" part.
    """

    name = "muon"
    kind: ClassVar[str] = "matrix"
    exactness: ClassVar[Exactness] = Exactness.ROUNDING
    buffer: ClassVar[str | None] = "momentum_buffer"
    reads_buffer: ClassVar[bool] = True
    separable: ClassVar[bool] = False

    def hyper_numbers(self, group: Mapping[str, object]) -> dict[str, float]:
        name = group.get("adjust_lr_fn")
        return {"adjust_lr_fn": ADJUSTMENTS.get(name if isinstance(name, str) else None, 3.0)}

    def refuses(self, hyper: Mapping[str, float]) -> str:
        return "an adjust_lr_fn that is not known" if hyper.get("adjust_lr_fn") == 3.0 else ""

    def start(self, weight: Tensor, entry: Entry) -> dict[str, Tensor]:
        return {"momentum_buffer": torch.zeros_like(weight)}

    def moves_only(self, entry: Entry) -> tuple[float, float] | None:
        return entry["momentum"], 1 - entry["momentum"]

    def decay(self, entry: Entry) -> float:
        return 0.0

    def gradient_scale(self, entry: Entry) -> float:
        return entry.scale

    def side(self, weight: Tensor) -> Side:
        return "right" if weight.shape[0] > weight.shape[1] else "left"

    def linearize(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], entry: Entry) -> LinearStep:
        momentum = entry["momentum"]
        average = state["momentum_buffer"].lerp(gradient, 1 - momentum)
        mix = gradient.lerp(average, momentum) if entry["nesterov"] else average
        factor, update = _orthogonalized(mix, entry)
        rate = entry["lr"] * self._adjustment(weight, entry)
        rest = update - (mix @ factor if self.side(weight) == "right" else factor @ mix)
        return LinearStep(
            factor.mul_(rate),
            from_buffer=momentum**2 if entry["nesterov"] else momentum,
            from_gradient=1 - momentum**2 if entry["nesterov"] else 1 - momentum,
            keep=momentum,
            take=1 - momentum,
            shrink=1 - entry["lr"] * entry["weight_decay"],
            rest=rest.mul_(rate),
        )

    def _adjustment(self, weight: Tensor, entry: Entry) -> float:
        rows, columns = weight.shape
        kind = entry["adjust_lr_fn"]
        if kind == 1.0:
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(rows / columns if kind == 2.0 else max(1.0, rows / columns))


def _orthogonalized(mix: Tensor, entry: Entry) -> tuple[Tensor, Tensor]:
    """The factor of the smaller side and torch's update, for a momentum mix [o, i]."""
    a, b, c = (entry[f"ns_coefficients.{k}"] for k in range(3))
    tall = mix.shape[0] > mix.shape[1]
    iterate = mix.to(torch.bfloat16, copy=True)
    iterate = iterate.T if tall else iterate
    norm = iterate.norm().clamp(min=entry["eps"])
    iterate.div_(norm)
    factor = torch.eye(iterate.shape[0], dtype=mix.dtype).div_(norm.to(mix.dtype))
    for _ in range(int(entry["ns_steps"])):
        gram = iterate @ iterate.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        iterate = torch.addmm(iterate, polynomial, iterate, beta=a)
        factor = torch.addmm(factor, polynomial.to(mix.dtype), factor, beta=a)
    update = iterate.to(mix.dtype)
    # M L with L = factorᵀ for a tall M: (factor Mᵀ)ᵀ
    return (factor.T.contiguous(), update.T) if tall else (factor, update)


for _module in ("torch.optim", "torch.optim._muon"):  # where torch says it is differs between versions
    register(f"{_module}.Muon", MuonRule())
