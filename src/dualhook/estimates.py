"""From a memory and a model's gradient to the influence of every training sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dualhook.attention import Attention
from dualhook.composition import shares_of
from dualhook.errors import LayerError
from dualhook.loss import Loss
from dualhook.query import Decay, Gradient, cosine_scores, decayed_scores, fit_decay
from dualhook.questions import AskedLayer
from dualhook.records import LayerSpec, Rows
from dualhook.store import AnswerFiles, Store

__all__ = ["by_contribution", "by_cosine", "by_decay", "note_of", "numbering", "stepped"]


def by_decay(
    store: Store, layers: Sequence[AskedLayer], samples: np.ndarray, loss: Loss, files: AnswerFiles | None
) -> dict[str, Tensor]:
    """Per layer the decayed influence [q, sample] of ``samples`` (dataset rows, ascending), repeats summed.

    What training has left of every layer's gradients is kept in ``files``, once fitted.

    Raises:
        RuleError: an optimiser whose steps are made of more than its state.
    """
    numbered = numbering(samples)
    return {
        own.spec.name: decayed_scores(store, own, _decay(store, own.spec, loss, files), numbered, len(samples))
        for own in _gradients(store, layers)
    }


def by_cosine(store: Store, layers: Sequence[AskedLayer], samples: np.ndarray) -> dict[str, Tensor]:
    """Per layer its part of the cosines [q, sample], summed over repeats."""
    asked, steps = _gradients(store, layers), (store.first_step + 1, store.last_step)
    parts = cosine_scores(store, asked, steps, numbering(samples), len(samples))
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


def by_contribution(attention: Attention, samples: np.ndarray) -> dict[str, Tensor]:
    """Per layer the exact contributions [q, sample], repeats summed."""
    totals = attention.sum_by("sample")
    found = {}
    for layer in attention.layers:
        own = totals.where(layer=layer)
        known = np.isin(own["sample"], samples)
        part = torch.zeros(len(attention), len(samples), dtype=torch.float64)
        place = np.searchsorted(samples, own["sample"][known])
        part[own["query"][known], place] = torch.from_numpy(own["contribution"][known]).double()
        found[layer] = part
    return found


def _gradients(store: Store, layers: Sequence[AskedLayer]) -> list[Gradient]:
    """What is asked of the layers that training has changed."""
    asked = [gradient_on(spec, layer) for layer in layers if (spec := stepped(store, layer.spec)) is not None]
    if not asked:
        raise LayerError("no optimiser step was taken on the layers asked: training has not changed them")
    return asked


def numbering(samples: np.ndarray) -> Callable[[Rows], Tensor]:
    """What gives every pattern the place of its sample, or the number of samples where it has none."""
    return partial(_placed, torch.from_numpy(samples))


def _placed(samples: Tensor, rows: Rows) -> Tensor:
    place = torch.searchsorted(samples, rows.sample).clamp(max=len(samples) - 1)
    return torch.where(samples[place] == rows.sample, place, len(samples))


def stepped(store: Store, spec: LayerSpec) -> LayerSpec | None:
    """The layer with those of its parameters that a step was taken on; None: its weight is as it was."""
    if spec.weight not in store.histories:
        return None
    return spec if spec.bias is None or spec.bias in store.histories else replace(spec, bias=None)


def gradient_on(spec: LayerSpec, layer: AskedLayer) -> Gradient:
    """What the model's forward pass asks of a layer, as its gradient."""
    places = layer.places
    query, direction = places.query.float(), places.direction.float()
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
