"""The samples that training has found hardest to fit, and what else the rows tell of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dualhook.composition import shares_of
from dualhook.errors import RuleError
from dualhook.estimates import stepped
from dualhook.loss import NO_LABEL, Fit, Loss
from dualhook.query import self_influence
from dualhook.records import places_among
from dualhook.store import Store
from dualhook.table import Table
from dualhook.units import Units

__all__ = ["suspected"]

NUMBERS = 2**24  # of the last layer's rows and their cosines, at a time


def suspected(store: Store, loss: Loss, samples: np.ndarray, k: int, neighbours: int) -> Table:
    """The ``k`` of the samples (dataset rows, ascending) of the largest run-averaged loss; see the memory's method."""
    fit = loss.of_samples(torch.from_numpy(samples))
    order = torch.sort(fit.mean.nan_to_num(nan=-torch.inf), descending=True, stable=True).indices[:k]
    name = "loss" if loss.kind == "cross-entropy" else "gradient"
    columns: dict[str, np.ndarray] = {
        "rank": np.arange(1, len(order) + 1),
        "sample": samples[order.numpy()],
        name: fit.mean[order].numpy(),
        f"last_{name}": fit.last[order].numpy(),
        "rows": fit.rows[order].numpy(),
    }
    notes = [loss.note] if loss.note else []
    try:
        columns["self_influence"] = _self_influence(store, loss, samples[order.numpy()]).numpy()
    except RuleError:
        notes.append("no self_influence: the optimiser's steps are made of more than its state")
    if bool((fit.label[order] != NO_LABEL).any()):
        columns["disagreement"] = _disagreement(loss, fit, torch.from_numpy(samples), order, neighbours).numpy()
    else:
        notes.append("no disagreement: it takes a softmax head and one label a sample")
    return Table(
        columns,
        title=f"the {len(order)} samples of the largest run-averaged {name}",
        footer="; ".join(notes),
        bars=(("sample",), name),
    )


def _self_influence(store: Store, loss: Loss, listed: np.ndarray) -> Tensor:
    """By how much the listed samples' own steps have lowered their own loss, all layers together [k]."""
    ascending = np.sort(listed)
    total, numbered = torch.zeros(len(listed), dtype=torch.float64), Units(torch.from_numpy(ascending)).of
    for layer in store.layers:
        if (spec := stepped(store, layer)) is not None:
            shares, counts = shares_of(store, spec, store.last_step), store.count_by_step(spec.name)
            total += self_influence(store, spec, shares, counts, loss.reduced_over, numbered, len(listed))
    return total[torch.from_numpy(np.searchsorted(ascending, listed))]


def _disagreement(loss: Loss, fit: Fit, samples: Tensor, listed: Tensor, neighbours: int) -> Tensor:
    """The share of other labels among the nearest ``neighbours`` of the listed samples (places [k]), float64 [k].

    Near is by the cosine of what the last layer read of both when they were trained on last.
    """
    asked = torch.zeros(len(samples), dtype=torch.bool)
    asked[listed] = True
    asked &= fit.label != NO_LABEL
    places, keys = zip(*_newest(loss, fit, samples, asked, 0), strict=True)
    own, wanted = torch.cat(places), F.normalize(torch.cat(keys))
    cosines = torch.full((len(own), neighbours), -torch.inf, dtype=wanted.dtype)
    differ = torch.zeros(len(own), neighbours, dtype=torch.bool)
    for place, key in _newest(loss, fit, samples, fit.label != NO_LABEL, len(own)):
        met = wanted @ F.normalize(key).T
        met[own[:, None] == place] = -torch.inf
        cosines, order = torch.cat([cosines, met], 1).topk(neighbours, 1)
        differ = torch.cat([differ, fit.label[own][:, None] != fit.label[place]], 1).gather(1, order)
    there = cosines > -torch.inf
    found = torch.full((len(samples),), torch.nan, dtype=torch.float64)
    found[own] = (differ & there).sum(1) / there.sum(1).double()
    return found[listed]


def _newest(loss: Loss, fit: Fit, samples: Tensor, wanted: Tensor, beside: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Places [n] and last keys [n, i] of the wanted samples (bool [s]), each once; ``beside`` numbers more a row."""
    left, newest = wanted.clone(), fit.newest[wanted]
    most = max(1, NUMBERS // (loss.spec.in_features + loss.spec.out_features + beside))
    for rows in loss.rows(int(newest.min()), int(newest.max()), most):
        place = places_among(samples, rows.sample)
        own = (place < len(samples)).nonzero().squeeze(1)
        own = own[(rows.step[own] == fit.newest[place[own]]) & left[place[own]]]
        found, number = torch.unique(place[own], return_inverse=True)  # a batch may hold a sample twice
        first = own.new_full((len(found),), len(rows)).scatter_reduce(0, number, own, "amin")
        left[found] = False
        key = rows.key.index_select(0, first)
        yield found, key.to(torch.promote_types(key.dtype, torch.float32))
