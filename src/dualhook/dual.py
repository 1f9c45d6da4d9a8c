"""A linear layer in its dual form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualhook.query import Composition, dual_output, rebuild
from dualhook.records import RowSource

__all__ = ["DualLinear"]


class DualLinear(nn.Module):
    """``y = a W_0 x + sum_s value_s (key_s · x)`` in place of ``y = W_T x`` (Irie et al. 2022).

    Holds no weight: every call streams through the memory. ``keep`` is held as long as the layer is.
    """

    def __init__(self, source: RowSource, made_of: Composition, *, keep: object = None) -> None:
        super().__init__()
        self.in_features = made_of.spec.in_features
        self.out_features = made_of.spec.out_features
        self._source = source
        self._made_of = made_of
        self._keep = keep

    @property
    def weight(self) -> Tensor:
        """The weight [o, i] the memory adds up to, float64; for code that looks at a layer's weight."""
        return rebuild(self._source, self._made_of)[self._made_of.spec.weight]

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """Attend to every training pattern; ``input`` is [..., i]."""
        return dual_output(self._source, self._made_of, input.cpu()).to(input.device)

    def extra_repr(self) -> str:
        """Shape and horizon, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, step={self._made_of.horizon}"
