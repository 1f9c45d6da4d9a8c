"""From a memory and a model's gradient to the influence of every training sample, or of its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dualhook.attention import Attention
from dualhook.composition import shares_of
from dualhook.errors import LayerError
from dualhook.loss import Loss
from dualhook.query import (
    Composition,
    Decay,
    Gradient,
    GroupSums,
    LayerQuery,
    contributed_scores,
    cosine_scores,
    decayed_scores,
    fit_decay,
)
from dualhook.questions import AskedLayer
from dualhook.records import LayerSpec
from dualhook.store import AnswerFiles, Store
from dualhook.units import Units

__all__ = ["by_contribution", "by_cosine", "by_decay", "note_of", "stepped"]


def by_decay(
    store: Store, layers: Sequence[AskedLayer], units: Units, loss: Loss, files: AnswerFiles | None
) -> dict[str, Tensor]:
    """Per layer the decayed influence [q, u] of ``units``, repeats summed.

    What training has left of every layer's gradients is kept in ``files``, once fitted.

    Raises:
        RuleError: an optimiser whose steps are made of more than its state.
    """
    return {
        own.spec.name: decayed_scores(store, own, _decay(store, own.spec, loss, files), units.of, len(units))
        for own in _gradients(store, layers)
    }


def by_cosine(store: Store, layers: Sequence[AskedLayer], units: Units) -> dict[str, Tensor]:
    """Per layer its part of the cosines [q, u], summed over repeats."""
    asked, steps = _gradients(store, layers), (store.first_step + 1, store.last_step)
    parts = cosine_scores(store, asked, steps, units.of, units.owner)
    return {own.spec.name: part for own, part in zip(asked, parts, strict=True)}


def _decay(store: Store, spec: LayerSpec, loss: Loss, files: AnswerFiles | None) -> Decay:
    """What training has left of a layer's gradients, kept or fitted."""
    horizon = store.last_step
    key = hashlib.sha256(f"decay {store.fingerprint} {spec.name} {spec.bias} {horizon}".encode()).hexdigest()[:32]
    if files is not None and (tensors := files.get(key)) is not None:
        return Decay.of(tensors)
    decay = fit_decay(
        store, spec, shares_of(store, spec, horizon), store.count_by_step(spec.name), loss.curvature_weights
    )
    if files is not None:
        files.put(key, decay.tensors())
    return decay


def by_contribution(
    store: Store,
    layers: Sequence[AskedLayer],
    made_of: Callable[[LayerSpec], Composition],
    attention: Attention,
    units: Units,
) -> dict[str, Tensor]:
    """Per layer the exact contributions [q, u], repeats summed."""
    found = {}
    for own in layers:
        spec, composed = own.spec, made_of(own.spec)
        if composed.only_coefficients:
            gradient = gradient_on(spec, own, torch.float64)
            found[spec.name] = contributed_scores(store, gradient, composed, units.of, len(units))
            continue
        (table,) = attention.gather(_ByUnit(units), layers=spec.name)
        part = torch.zeros(len(attention), len(units) + 1, dtype=torch.float64)
        part[table["query"], table["unit"]] = torch.from_numpy(table["contribution"])
        found[spec.name] = part[:, :-1]
    return found


@dataclass(frozen=True)
class _ByUnit:
    """Contributions in all by unit; those of no known sample are the unit after the last."""

    units: Units
    title = "contributions by unit"
    bars = (("unit",), "contribution")

    def start(self, asked: LayerQuery, grouping: object) -> tuple[GroupSums, Callable[[], dict[str, np.ndarray]]]:
        sums = GroupSums(len(asked), self.units.of)

        def columns() -> dict[str, np.ndarray]:
            units, _, totals = sums.result()
            query, unit = np.meshgrid(np.arange(len(asked)), units.numpy(), indexing="ij")
            values = {"query": query, "unit": unit, "contribution": totals["contribution"].numpy()}
            return {name: value.reshape(-1) for name, value in values.items()}

        return sums, columns


def _gradients(store: Store, layers: Sequence[AskedLayer]) -> list[Gradient]:
    """What is asked of the layers that training has changed."""
    asked = [gradient_on(spec, layer) for layer in layers if (spec := stepped(store, layer.spec)) is not None]
    if not asked:
        raise LayerError("no optimiser step was taken on the layers asked: training has not changed them")
    return asked


def stepped(store: Store, spec: LayerSpec) -> LayerSpec | None:
    """The layer with those of its parameters that a step was taken on; None: its weight is as it was."""
    if spec.weight not in store.histories:
        return None
    return spec if spec.bias is None or spec.bias in store.histories else replace(spec, bias=None)


def gradient_on(spec: LayerSpec, layer: AskedLayer, dtype: torch.dtype = torch.float32) -> Gradient:
    """What the model's forward pass asks of a layer, as its gradient."""
    places = layer.places
    query, direction = places.query.to(dtype), places.direction.to(dtype)
    if spec.bias is not None:
        one = torch.ones_like(query[..., :1])
        if places.present is not None:
            one = one * places.present[..., None]
        query = torch.cat([query, one], -1)
    return Gradient(spec, query, direction, places.slot)


def note_of(store: Store, assumed: str = "") -> str:
    """What of training an estimate judges, and what is ``assumed``; empty where there is nothing to say."""
    first, last = store.first_step, store.last_step
    folded = f"steps {first + 1} to {last} are judged, earlier ones are folded into the origin" if first else ""
    return "; ".join(note for note in (assumed, folded, store.note_of_loss) if note)
