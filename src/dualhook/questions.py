"""What a model's forward pass asks of a layer: its calls as queries, query by query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dualhook.capture import Observed, Tapped, as_rows, directions, observe
from dualhook.errors import LayerError
from dualhook.maps import map_of
from dualhook.model import Measure, Positions, Target, find_layers, predicted, run_model
from dualhook.query import Composition, LayerQuery, answered
from dualhook.records import Batch, LayerSpec, Rows
from dualhook.table import Table

__all__ = ["Asked", "AskedLayer", "ask"]


@dataclass(frozen=True)
class Places:
    """What queries put to a layer: inputs [q, p, c], their ``direction`` [q, p, o] and ``slot`` [q, p].

    ``present`` [q, p]: which places count, see :class:`LayerQuery`.
    """

    query: Tensor
    direction: Tensor
    slot: Tensor | None
    present: Tensor | None = None

    def that_matter(self) -> Places:
        """Only the places that each query's prediction depends on; all where it depends on none."""
        matter = self.direction.ne(0).any(-1)
        of_none = ~matter.any(1, keepdim=True)
        matter |= of_none if self.present is None else of_none & self.present
        order = matter.logical_not().long().argsort(dim=1, stable=True)[:, : int(matter.sum(1).max())]
        present = matter.gather(1, order)
        return Places(
            self.query.take_along_dim(order[..., None], 1) * present[..., None],
            self.direction.take_along_dim(order[..., None], 1) * present[..., None],
            None if self.slot is None else torch.where(present, self.slot.gather(1, order), -1),
            present,
        )

    @classmethod
    def side_by_side(cls, parts: Sequence[Places]) -> Places:
        """Several questions to each of some sequences, those of one sequence after those of another."""
        most = max(part.query.shape[1] for part in parts)

        def together(values: Sequence[Tensor | None], absent: int) -> Tensor | None:
            found = [_filled(value, most, absent) for value in values if value is not None]
            return torch.stack(found, 1).flatten(0, 1) if found else None

        query, direction = together([p.query for p in parts], 0), together([p.direction for p in parts], 0)
        assert query is not None
        assert direction is not None
        slot, present = together([p.slot for p in parts], -1), together([p.present for p in parts], 0)
        return cls(query, direction, slot, present)


@dataclass(frozen=True)
class AskedLayer:
    """A layer as one forward pass has asked it."""

    tapped: Tapped
    places: Places

    @property
    def spec(self) -> LayerSpec:
        """The layer."""
        return self.tapped.spec

    def question(self, made_of: Composition, memory: str) -> LayerQuery:
        """The same as a question to what the layer is ``made_of``."""
        (weight, bias), at = _matrices(self.tapped), self.places
        output = answered(at.query, at.slot, weight)
        size = answered(at.query.abs(), at.slot, weight.abs())
        if bias is not None:
            offset = bias if at.slot is None else bias.T[at.slot.clamp(min=0)]
            output, size = output + offset, size + offset.abs()
        return LayerQuery(made_of, at.query, at.direction, output, at.slot, size, memory, at.present)


@dataclass(frozen=True)
class Asked:
    """What a forward pass asks of a memory."""

    layers: Sequence[AskedLayer]
    queries: Table


def ask(
    model: nn.Module,
    specs: Sequence[LayerSpec],
    inputs: Any,
    target: Target,
    positions: Positions,
    of: Measure = "logit",
) -> Asked:
    """Run a model once and see what its layers are asked; one backward pass for each position.

    A layer whose rows do not say which query they belong to costs one more for each query.

    Raises:
        LayerError: the model does not call these layers, or inputs, target or positions do not fit it.
    """
    inner, layers = find_layers(model, specs)
    there: dict[str, Tapped] = {}
    for tapped in layers:
        there.setdefault(tapped.spec.name, tapped)
    parts: dict[str, list[Places]] = {}
    with torch.inference_mode(False), torch.enable_grad(), observe(inner, layers) as observed:
        about = predicted(run_model(inner, inputs), target, positions, inner, inputs, of)
        calls = {name: own for name, own in observed.items() if own}
        for scores in about.scores.unbind(1):
            for name, own in _by_layer(there, calls, scores).items():
                places = _by_query(own, len(scores))
                parts.setdefault(name, []).append(places.that_matter() if about.along_sequences else places)
    if not parts:
        names = ", ".join(spec.name for spec in specs)
        raise LayerError(f"the model's forward pass calls none of {names}")
    columns = {name: values.detach().reshape(-1).cpu() for name, values in about.columns.items()}
    numbers = {n: (v.double() if v.is_floating_point() else v).numpy() for n, v in columns.items()}
    queries = Table({"query": np.arange(about.scores.numel())} | numbers, title="queries", bars=(("query",), "score"))
    return Asked([AskedLayer(there[name], Places.side_by_side(own)) for name, own in parts.items()], queries)


def _filled(values: Tensor, most: int, absent: int) -> Tensor:
    """Values [q, p, …] with as many places as asked."""
    missing = (len(values), most - values.shape[1], *values.shape[2:])
    return torch.cat([values, torch.full(missing, absent, dtype=values.dtype)], 1)


def _matrices(tapped: Tapped) -> tuple[Tensor, Tensor | None]:
    """Weight [o, i] and bias ([o], or [o, slots]) that a model has, float64."""
    names = zip(tapped.spec.parameters, tapped.attributes, strict=False)
    found = [map_of(tapped.spec).matrix(n, getattr(tapped.module, a).detach().double().cpu()) for n, a in names]
    return found[0], found[1] if len(found) > 1 else None


def _by_layer(
    there: Mapping[str, Tapped], calls: Mapping[str, Sequence[Observed]], scores: Tensor
) -> dict[str, list[Rows]]:
    """What each layer's calls put to it on the way to some ``scores`` [q]: inputs, directions, and whose they are.

    Rows that do not say which query they belong to (of position embeddings that all share, of sequences packed into
    one) belong to every query whose score depends on them, each time with that score's gradient.
    """
    seen = [(name, call) for name, own in calls.items() for call in own]
    found: dict[str, list[Rows]] = {name: [] for name in calls}
    shared: list[tuple[str, Observed]] = []
    for (name, call), direction in zip(seen, directions(scores, [call for _, call in seen]), strict=True):
        rows = _patterns(there[name].spec, call, direction, len(scores))
        if len(scores) > 1 and bool((rows.sample < 0).any()):
            shared.append((name, call))
        else:
            found[name].append(rows)
    for query in range(len(scores) if shared else 0):
        along = directions(scores[query : query + 1], [call for _, call in shared])
        for (name, call), direction in zip(shared, along, strict=True):
            rows = _patterns(there[name].spec, call, direction, len(scores))
            matter = rows.output_grad.ne(0).any(-1)
            matter[0] |= ~matter.any()
            found[name].append(replace(rows, sample=torch.full_like(rows.sample, query)).where(matter))
    return found


def _by_query(parts: Sequence[Rows], queries: int) -> Places:
    """A layer's rows, query by query.

    Calls and places of a sequence stand side by side as positions, filled up with absent ones (slot -1) where a query
    has fewer than others.
    """
    sample = torch.cat([rows.sample for rows in parts]).clamp(min=0)
    order = sample.argsort(stable=True)
    counts = torch.bincount(sample, minlength=queries)
    most = int(counts.max())
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[sample[order]]
    at = sample[order], place

    def laid_out(values: Tensor, absent: float) -> Tensor:
        found = torch.full((queries, most, *values.shape[1:]), absent, dtype=values.dtype)
        found[at] = values[order]
        return found

    query = laid_out(torch.cat([rows.key for rows in parts]), 0.0)
    direction = laid_out(torch.cat([rows.output_grad for rows in parts]), 0.0)
    slots = [rows.slot for rows in parts if rows.slot is not None]
    present = None if bool((counts == most).all()) else torch.arange(most) < counts[:, None]
    return Places(query, direction, laid_out(torch.cat(slots).long(), -1) if slots else None, present)


def _patterns(spec: LayerSpec, call: Observed, direction: Tensor, queries: int) -> Rows:
    batch = Batch(torch.arange(queries))
    rows = as_rows(spec, call.call, direction, batch)
    on_cpu = Rows(
        rows.key.cpu(), rows.output_grad.cpu(), rows.step, rows.sample, rows.position,
        slot=None if rows.slot is None else rows.slot.cpu(), extent=rows.extent,
    )  # fmt: skip
    found = list(map_of(spec).patterns(on_cpu, max(1, len(on_cpu))))
    whole = found[0]
    for part in found[1:]:
        whole = whole.joined(part)
    return whole
