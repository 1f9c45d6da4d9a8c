"""A linear layer in its dual form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualhook.query import Composition, dual_output, rebuild
from dualhook.records import RowSource

__all__ = ["DualLinear"]


class DualLinear(nn.Module):
    """``y = a W_0 x + sum_s value_s (key_s · x)`` in place of ``y = W_T x`` (Irie et al. 2022).

    Holds no weight: every call streams through the memory. ``keep`` is held as long as the layer is. ``dtype`` is
    that of the weight and bias that are put together for code which looks at them.
    """

    def __init__(
        self, source: RowSource, made_of: Composition, *, dtype: torch.dtype = torch.float64, keep: object = None
    ) -> None:
        super().__init__()
        self._dtype = dtype
        self.in_features = made_of.spec.in_features
        self.out_features = made_of.spec.out_features
        self._source = source
        self._made_of = made_of
        self._keep = keep

    @property
    def weight(self) -> Tensor:
        """The weight [o, i] the memory adds up to."""
        return rebuild(self._source, self._made_of)[self._made_of.spec.weight].to(self._dtype)

    @property
    def bias(self) -> Tensor | None:
        """The bias [o] the memory adds up to, or None."""
        name = self._made_of.spec.bias
        return None if name is None else rebuild(self._source, self._made_of)[name].to(self._dtype)

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """Attend to every training pattern; ``input`` is [..., i]."""
        return dual_output(self._source, self._made_of, input.cpu()).to(input.device)

    def extra_repr(self) -> str:
        """Shape and horizon, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}, step={self._made_of.horizon}"
