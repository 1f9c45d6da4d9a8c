"""What a model's forward pass asks of a layer: its calls as queries, query by query."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dualhook.capture import Observed, Tapped, as_rows
from dualhook.errors import LayerError
from dualhook.maps import map_of
from dualhook.query import Composition, LayerQuery, answered
from dualhook.records import Batch, LayerSpec, Rows

__all__ = ["layer_query"]


def layer_query(
    tapped: Tapped, calls: Sequence[tuple[Observed, Tensor]], queries: int, made_of: Composition, memory: str
) -> LayerQuery:
    """A layer's calls, each with the direction at its output, as a question to what the layer is ``made_of``.

    Raises:
        LayerError: which row belongs to which query is not known.
    """
    weight, bias = _matrices(tapped)
    query, direction, slot = _by_query(tapped.spec, calls, queries)
    output, size = answered(query, slot, weight), answered(query.abs(), slot, weight.abs())
    if bias is not None:
        offset = bias if slot is None else bias.T[slot.clamp(min=0)]
        output, size = output + offset, size + offset.abs()
    return LayerQuery(made_of, query, direction, output, slot, size, memory)


def _matrices(tapped: Tapped) -> tuple[Tensor, Tensor | None]:
    """Weight [o, i] and bias ([o], or [o, slots]) that a model has, float64."""
    names = zip(tapped.spec.parameters, tapped.attributes, strict=False)
    found = [map_of(tapped.spec).matrix(n, getattr(tapped.module, a).detach().double().cpu()) for n, a in names]
    return found[0], found[1] if len(found) > 1 else None


def _by_query(
    spec: LayerSpec, calls: Sequence[tuple[Observed, Tensor]], queries: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A layer's calls as queries [q, p, c], their directions [q, p, o] and slots [q, p].

    Calls and places of a sequence stand side by side as positions, in a layer of several slots filled up with empty
    ones (slot -1).

    Raises:
        LayerError: which row belongs to which query is not known.
    """
    parts = [_patterns(spec, call, direction, queries) for call, direction in calls]
    for (call, _), rows in zip(calls, parts, strict=True):
        if queries > 1 and bool((rows.sample < 0).any()):
            raise LayerError(
                f"layer {spec.name!r} saw inputs of shape {list(call.call.key.shape)} for {queries} queries: which "
                "row belongs to which query is not known; ask one query at a time"
            )
    sample = torch.cat([rows.sample for rows in parts]).clamp(min=0)
    order = sample.argsort(stable=True)
    counts = torch.bincount(sample, minlength=queries)
    most = int(counts.max())
    if spec.slots == 1 and bool((counts != most).any()):
        raise LayerError(
            f"layer {spec.name!r} was called on {int(counts.min())} to {most} rows a query: ask one query at a time"
        )
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[sample[order]]
    at = sample[order], place

    def laid_out(values: Tensor, absent: float) -> Tensor:
        found = torch.full((queries, most, *values.shape[1:]), absent, dtype=values.dtype)
        found[at] = values[order]
        return found

    query = laid_out(torch.cat([rows.key for rows in parts]), 0.0)
    direction = laid_out(torch.cat([rows.output_grad for rows in parts]), 0.0)
    slots = [rows.slot for rows in parts if rows.slot is not None]
    return query, direction, laid_out(torch.cat(slots).long(), -1) if slots else None


def _patterns(spec: LayerSpec, call: Observed, direction: Tensor, queries: int) -> Rows:
    batch = Batch(torch.arange(queries))
    rows = as_rows(spec, call.call, direction, batch, every=True)
    on_cpu = Rows(
        rows.key.cpu(), rows.output_grad.cpu(), rows.step, rows.sample, rows.position,
        slot=None if rows.slot is None else rows.slot.cpu(), extent=rows.extent,
    )  # fmt: skip
    found = list(map_of(spec).patterns(on_cpu, max(1, len(on_cpu))))
    whole = found[0]
    for part in found[1:]:
        whole = whole.joined(part)
    return whole
