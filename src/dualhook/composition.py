"""What a layer's weights are made of: the ledger turned into factors of origin and patterns, by the rules."""

from __future__ import annotations

import torch
from torch import Tensor

from dualhook.optimizers import coefficients
from dualhook.records import AVERAGE, VALUE, Coefficients, Composition, LayerSpec
from dualhook.store import Store

__all__ = ["compose", "unknown_composition"]


def compose(
    store: Store, spec: LayerSpec, *, horizon: int, weights: Tensor | None = None, component: str = VALUE
) -> Composition:
    """The composition of a layer after step ``horizon``.

    ``weights`` [horizon + 1] asks for that average of the weights along the way, ``component`` for another part of
    the optimiser's state than the weight itself.

    Raises:
        RuleError: the layer was trained by an optimiser without a rule.
    """
    parts = [_of_parameter(store, name, horizon, weights, component) for name in spec.parameters]
    return Composition(spec, *parts[0], *(parts[1] if len(parts) > 1 else ()))


def unknown_composition(spec: LayerSpec, horizon: int, why: str) -> Composition:
    """What stands for a layer whose optimiser has no rule: keys and queries are known, coefficients are not."""
    nan = torch.full((horizon + 1,), torch.nan, dtype=torch.float64)
    weight = torch.full((spec.out_features, spec.in_features), torch.nan, dtype=torch.float64)
    if spec.bias is None:
        return Composition(spec, nan, weight, unknown=why)
    return Composition(spec, nan, weight, nan, weight[:, 0], unknown=why)


def _of_parameter(
    store: Store, name: str, horizon: int, weights: Tensor | None, component: str
) -> tuple[Tensor, Tensor]:
    """Coefficients by step [horizon + 1] and the origin's share of one parameter."""
    by_step = torch.zeros(horizon + 1, dtype=torch.float64)
    origin = store.origin(name).tensors
    history = store.histories.get(name)
    if history is None:  # never stepped: it is what it was
        found = Coefficients(torch.zeros(0, dtype=torch.float64), {component: 1.0})
    else:
        found = coefficients(history, horizon=horizon, weights=weights, component=component)
        by_step.index_add_(0, history.step[: found.pattern.numel()], found.pattern)
    share = torch.zeros_like(origin[VALUE], dtype=torch.float64)
    for part, factor in found.origin.items():
        if part in origin:
            share += factor * origin[part].double()
        elif part == AVERAGE:  # a running mean that has not begun is the weight itself, a momentum buffer zero
            share += factor * origin[VALUE].double()
    return by_step, share
