"""From a memory and a model's gradient to the influence of every training sample, or of its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualhook.attention import Attention
from dualhook.composition import shares_of
from dualhook.errors import LayerError, RuleError
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
    leaves_out_decay,
    norms_of_queries,
    pull_of,
)
from dualhook.questions import AskedLayer
from dualhook.records import VALUE, LayerSpec
from dualhook.store import AnswerFiles, Store
from dualhook.units import Units

__all__ = ["by_contribution", "by_cosine", "by_decay", "note_of", "stepped"]

_FIT_VERSION = 2  # what an earlier one has kept says something else


def by_decay(
    store: Store, layers: Sequence[AskedLayer], units: Units, loss: Loss, files: AnswerFiles | None
) -> tuple[dict[str, Tensor], str]:
    """Per layer the decayed influence [q, u] of ``units``, repeats summed; and what it does not follow.

    What training has left of every layer's gradients is kept in ``files``, once fitted.

    Raises:
        RuleError: an optimiser whose steps are made of more than its state.
    """
    asked, fits = _gradients(store, layers), _Fits(store, loss, files)
    found = {own.spec.name: decayed_scores(store, own, fits.decay(own.spec), units.of, len(units)) for own in asked}
    unknown = ", ".join(fits.pull_of_all[1])
    coupled = ", ".join(own.spec.name for own in asked if fits.leaves_out_decay(own))
    notes = (
        f"how strongly {unknown} pull back is not known" if unknown else "",
        f"weight decay within the preconditioned gradient of {coupled} is not followed" if coupled else "",
    )
    return found, "; ".join(filter(None, notes))


def by_cosine(store: Store, layers: Sequence[AskedLayer], units: Units) -> dict[str, Tensor]:
    """Per layer its part of the cosines [q, u], summed over repeats."""
    asked, steps = _gradients(store, layers), (store.first_step + 1, store.last_step)
    parts, norms = cosine_scores(store, asked, steps, units.of, units.owner), norms_of_queries(asked)
    return {own.spec.name: part / norms[:, None] for own, part in zip(asked, parts, strict=True)}


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


class _Fits:
    """What of each layer's training is fitted once, and kept in ``files``."""

    def __init__(self, store: Store, loss: Loss, files: AnswerFiles | None) -> None:
        self._store, self._loss, self._files = store, loss, files

    def decay(self, spec: LayerSpec) -> Decay:
        """What training has left of a layer's gradients."""

        def fit() -> dict[str, Tensor]:
            own, (every, _) = self._pull(spec), self.pull_of_all
            pulled = torch.where(own > 0, every / own, 1.0).clamp(min=1.0)
            return fit_decay(*self._recorded(spec), pulled=pulled).tensors()

        return Decay.of(self._kept(f"decay {_FIT_VERSION} {spec.name} {spec.bias}", fit))

    @cached_property
    def pull_of_all(self) -> tuple[Tensor, list[str]]:
        """How strongly all trained layers pull together [t + 1], but for those of which nobody knows."""
        found, unknown = torch.zeros(self._store.last_step + 1, dtype=torch.float64), []
        for spec in filter(None, (stepped(self._store, spec) for spec in self._store.layers)):
            try:
                found += self._pull(spec)
            except RuleError:
                unknown.append(spec.name)
        return found, unknown

    def leaves_out_decay(self, asked: Gradient) -> bool:
        """Whether weight decay on a layer is not followed."""
        return any(map(leaves_out_decay, shares_of(self._store, asked.spec, self._store.last_step)))

    def _pull(self, spec: LayerSpec) -> Tensor:
        def fit() -> dict[str, Tensor]:
            return {VALUE: pull_of(*self._recorded(spec))}

        return self._kept(f"pull {_FIT_VERSION} {spec.weight} {spec.bias}", fit)[VALUE]

    def _recorded(self, spec: LayerSpec) -> tuple[Any, ...]:
        shares, counts = shares_of(self._store, spec, self._store.last_step), self._store.count_by_step(spec.name)
        return self._store, spec, shares, counts, self._loss.curvature_weights

    def _kept(self, what: str, fit: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        key = hashlib.sha256(f"{what} {self._store.fingerprint} {self._store.last_step}".encode()).hexdigest()[:32]
        if self._files is not None and (tensors := self._files.get(key)) is not None:
            return tensors
        tensors = fit()
        if self._files is not None:
            self._files.put(key, tensors)
        return tensors


@dataclass(frozen=True)
class _ByUnit:
    """Contributions in all by unit; those of no known sample are the unit after the last."""

    units: Units
    title = "contributions by unit"
    bars = (("unit",), "contribution")

    def start(self, asked: LayerQuery, grouping: object) -> tuple[GroupSums, Callable[[], dict[str, np.ndarray]]]:
        sums = GroupSums(len(asked), self.units.of, ("contribution",))

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


def note_of(store: Store, *others: str) -> str:
    """What of training an estimate judges, behind ``others`` there are; empty where there is nothing to say."""
    first, last = store.first_step, store.last_step
    folded = f"steps {first + 1} to {last} are judged, earlier ones are folded into the origin" if first else ""
    return "; ".join(note for note in (*others, folded, store.note_of_loss) if note)
