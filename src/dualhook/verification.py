"""Weights rebuilt from a memory against those that training left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dualhook.composition import explanation
from dualhook.errors import StoreError
from dualhook.model import find_layers
from dualhook.records import LayerSpec
from dualhook.store import Damage, Store
from dualhook.table import Table

__all__ = ["VerifyReport", "actual_weights", "explained_layers", "verified"]

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
NARROW = 1e-2  # the error that the steps' rounding can explain in narrower dtypes


class VerifyReport(Table):
    """The result of :meth:`~dualhook.DualMemory.verify`: columns layer, error, rule, exact, inexact_steps."""

    damage: tuple[Damage, ...] = ()
    """Files that are not what they were, and what is wrong with them; printed below the table."""

    @property
    def max_error(self) -> float:
        """The largest relative error of any layer; NaN if a layer's is, or if there is no layer."""
        return float(np.max(self["error"])) if len(self) else math.nan


def verified(
    store: Store,
    rebuilt: Iterable[tuple[LayerSpec, Mapping[str, Tensor]]],
    actual: Mapping[str, Tensor],
    horizon: int,
    damage: Sequence[Damage] = (),
) -> VerifyReport:
    """The report on layers ``rebuilt`` at a horizon, one after the other; ``actual`` are the weights by name."""
    rows = [(spec.name, *_compared(store, spec, values, actual, horizon)) for spec, values in rebuilt]
    names = ("layer", "error", "rule", "exact", "inexact_steps")
    report = VerifyReport(
        {name: [row[k] for row in rows] for k, name in enumerate(names)},
        title=f"verify: weights after step {horizon} rebuilt from the memory",
        bars=(("layer",), "error"),
    )
    report.damage = tuple(damage)
    report.footer = "\n".join([f"largest relative error {report.max_error:.3g}", *map(str, damage)])
    return report


def actual_weights(
    store: Store, specs: Sequence[LayerSpec], model: nn.Module | None, horizon: int, *, is_average: bool
) -> Mapping[str, Tensor]:
    """The weights to compare with: a model's, or those that are stored, which are no average.

    Raises:
        StoreError: none are stored of that step.
    """
    if model is not None:
        inner, _ = find_layers(model, specs)
        return {name: parameter.detach() for name, parameter in inner.named_parameters()}
    latest = store.latest()
    if latest is None or latest[0] != horizon or is_average:
        held = "holds no weights" if latest is None else f"holds the weights after step {latest[0]}"
        raise StoreError(f"{store.layout.root} {held}: pass the model whose weights verify() is to compare with")
    return latest[1]


def explained_layers(store: Store, specs: Iterable[LayerSpec], horizon: int) -> dict[str, list[Any]]:
    """The columns of :meth:`DualMemory.info`."""
    names = ("layer", "shape", "patterns", "optimizer", "rule", "kind", "cost", "exact", "inexact_steps")
    rows = []
    for spec in specs:
        how, shape = explanation(store, spec), f"{spec.in_features}→{spec.out_features}"
        count, inexact = store.count(spec.name), _inexact_steps(store, spec, horizon)
        rows.append((spec.name, shape, count, how.optimizer, how.rule, how.kind, how.cost, how.exact, inexact))
    return {name: [row[k] for row in rows] for k, name in enumerate(names)}


def _inexact_steps(store: Store, spec: LayerSpec, horizon: int) -> int:
    """How many steps on a layer are marked inexact."""
    return max(store.inexact_steps(name, horizon) for name in spec.parameters)


def _compared(
    store: Store, spec: LayerSpec, rebuilt: Mapping[str, Tensor], actual: Mapping[str, Tensor], horizon: int
) -> tuple[float, str, bool, int]:
    known = [name for name in spec.parameters if name in actual]
    left = sum(float((rebuilt[name] - actual[name].double().cpu()).square().sum()) for name in known)
    size = sum(float(actual[name].double().square().sum()) for name in known)
    error = (left / size) ** 0.5 if size else left**0.5 if known else float("nan")
    inexact, how = _inexact_steps(store, spec, horizon), explanation(store, spec)
    rounding = ROUNDING.get(store.dtype(spec.weight), NARROW)
    return error, how.rule, how.exact and not inexact and error <= rounding, inexact
