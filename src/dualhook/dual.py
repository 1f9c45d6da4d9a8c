"""A linear layer in its dual form, and a model of such layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dualhook.host import asked_on_host
from dualhook.query import Composition, dual_output, rebuild
from dualhook.records import LayerSpec, RowSource

__all__ = ["DualLinear", "dual_model"]


@asked_on_host
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

    @staticmethod
    def stands_for(spec: LayerSpec, by: str) -> bool:
        """Whether a layer, whose calls are seen ``by`` hooking its module, is one that can be replaced."""
        return by == "module" and spec.kind in ("linear", "transposed")

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


def dual_model(model: nn.Module, made: Mapping[nn.Module, DualLinear], weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with dual layers in place of some modules, and these ``weights`` by name in others."""
    twin = copy.deepcopy(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if module in made:
            twin = _with_module(twin, name, made[module])
    held = twin.state_dict()
    twin.load_state_dict({name: value for name, value in weights.items() if name in held}, strict=False)
    return twin


def _with_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The model with the named module replaced; the root is replaced by returning the module itself."""
    if not name:
        return module
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return model
