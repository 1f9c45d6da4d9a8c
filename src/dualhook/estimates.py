"""From a memory and a model's gradient to the influence of every training sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dualhook.attention import Attention
from dualhook.composition import shares_of
from dualhook.errors import LayerError
from dualhook.query import Decay, Gradient, cosine_scores, decayed_scores, fit_decay
from dualhook.questions import AskedLayer
from dualhook.records import LayerSpec, Rows
from dualhook.store import AnswerFiles, Store

__all__ = ["Loss", "contributions", "estimated", "note_of"]

AGREE = 1e-3  # how far rows of a softmax head may miss what is true of them exactly
LOOKED_AT = 4096  # rows that show how the loss was reduced
HEAD_NUMBERS = 2**24  # of the last layer's output gradients at a time
USE = "use"  # the column that tells the uses of a weight apart


def estimated(
    store: Store,
    layers: Sequence[AskedLayer],
    horizon: int,
    samples: np.ndarray,
    *,
    method: Literal["decayed", "cosine"],
    files: AnswerFiles | None,
) -> dict[str, Tensor]:
    """Per layer the estimated influence [q, sample] of ``samples`` (dataset rows, ascending), repeats summed.

    What training has left of every layer's gradients is kept in ``files``, once fitted.

    Raises:
        RuleError: ``"decayed"`` under an optimiser whose steps are made of more than its state.
    """
    asked = [gradient_on(spec, layer) for layer in layers if (spec := stepped(store, layer.spec)) is not None]
    if not asked:
        raise LayerError("no optimiser step was taken on the layers asked: training has not changed them")
    numbered = partial(_placed, torch.from_numpy(samples))
    if method == "cosine":
        parts = cosine_scores(store, asked, (store.first_step + 1, horizon), numbered, len(samples))
        return {own.spec.name: part for own, part in zip(asked, parts, strict=True)}
    loss = Loss(store)
    return {
        own.spec.name: decayed_scores(store, own, _decay(store, own.spec, horizon, loss, files), numbered, len(samples))
        for own in asked
    }


def _decay(store: Store, spec: LayerSpec, horizon: int, loss: Loss, files: AnswerFiles | None) -> Decay:
    """What training has left of a layer's gradients, kept or fitted."""
    key = hashlib.sha256(f"decay {store.fingerprint} {spec.name} {spec.bias} {horizon}".encode()).hexdigest()[:32]
    if files is not None and (tensors := files.get(key)) is not None:
        return Decay.of(tensors)
    decay = fit_decay(store, spec, shares_of(store, spec, horizon), store.count_by_step(spec.name), loss.weights)
    if files is not None:
        files.put(key, decay.tensors())
    return decay


def contributions(attention: Attention, samples: np.ndarray) -> dict[str, Tensor]:
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


def _placed(samples: Tensor, rows: Rows) -> Tensor:
    place = torch.searchsorted(samples, rows.sample).clamp(max=len(samples) - 1)
    return torch.where(samples[place] == rows.sample, place, len(samples))


class Loss:
    """How a sample's gradient weighs in the curvature, as the rows of the last layer show it.

    Under softmax cross-entropy such a row is ``w (p - y)``: it sums to zero, one entry is negative, none below ``-w``.
    Then ``w`` is one over the number of a step's rows (a mean) or 1 (a sum), whichever fits, and the outer product of
    gradients, which knows the labels that were there, is brought to what it would be over labels drawn from the
    prediction: ``w (1 - |p|^2) / |p - y|^2`` in place of ``w``. A fitted sample has hardly a gradient, and its full
    curvature. Other losses are taken for a mean.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.head = store.trained_uses[-1].name
        self._counts = store.count_by_step(self.head, own=True).clamp(min=1).double()
        rows = self._own_rows(1, store.last_step, LOOKED_AT)
        number = self._counts[rows.step]
        d = rows.output_grad.double()
        size, lowest = d.abs().sum(1), -d.min(1).values
        there = size > 0
        self.is_softmax = (
            bool(there.any())
            and bool((d.sum(1).abs() <= AGREE * size).all())
            and bool(((d < 0).sum(1)[there] == 1).all())
        )
        is_mean = not self.is_softmax or bool((lowest * number <= 1 + AGREE).all()) or float(lowest.max()) > 1 + AGREE
        if not is_mean:
            self._counts = torch.ones_like(self._counts)
        self.note = ""
        if not self.is_softmax:
            self.note = f"the loss is taken for a mean over a step's rows of {self.head!r}"
        elif float((lowest * self._counts[rows.step]).max()) > 1 + AGREE:
            self.note = "single samples weigh more in the loss than in a mean or a sum: it is taken for a mean"

    def weights(self, rows: Rows) -> Tensor:
        """What the outer product of each row's gradient weighs in its step's curvature [n], float64."""
        weight = self._counts[rows.step]
        if not self.is_softmax:
            return weight
        samples, place = torch.unique(torch.stack([rows.step, rows.sample]), dim=1, return_inverse=True)
        width = int(rows.sample.max()) + 2
        known = samples[0] * width + samples[1]
        squares, targets = torch.zeros(2, len(known), dtype=torch.float64)
        steps = int(rows.step.min()), int(rows.step.max())
        for head in self._head_rows(*steps):
            number = head.step * width + head.sample
            at = torch.searchsorted(known, number).clamp(max=len(known) - 1)
            own = (known[at] == number) & (head.sample < width - 1)
            d = head.output_grad.double() * self._counts[head.step][:, None]
            squares.index_add_(0, at[own], d.square().sum(1)[own])
            targets.index_add_(0, at[own], -d.min(1).values[own])
        drawn = torch.where(squares > 0, 2 * targets / squares - 1, 1.0).clamp(min=0)
        return weight * drawn[place]

    def _own_rows(self, first: int, last: int, most: int) -> Rows:
        """The first of the head's own rows."""
        return next(iter(self._head_rows(first, last, most)))

    def _head_rows(self, first: int, last: int, most: int | None = None) -> Iterator[Rows]:
        """The head's own rows of some steps, not those of layers that share its weight."""
        uses = [spec.name for spec in self._store.uses(self.head)]
        most = most or max(1, HEAD_NUMBERS // self._store.trained_uses[-1].out_features)
        for rows in self._store.blocks(self.head, first_step=first, last_step=last, block_rows=most):
            if len(uses) > 1:
                rows = rows.where(rows.columns[USE] == uses.index(self.head))
            if len(rows):
                yield rows


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


def note_of(store: Store, horizon: int) -> str:
    """What of training an estimate judges, and what it assumes; empty where there is nothing to say."""
    loss = Loss(store)
    notes = [loss.note] if loss.note else []
    if store.first_step:
        notes.append(f"steps {store.first_step + 1} to {horizon} are judged, earlier ones are folded into the origin")
    if store.note_of_loss:
        notes.append(store.note_of_loss)
    return "; ".join(notes)
