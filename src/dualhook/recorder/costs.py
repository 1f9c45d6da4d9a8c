"""What recording costs on disk, before it begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dualhook.capture import Selection, as_rows, observe
from dualhook.maps import map_of
from dualhook.model import run_model
from dualhook.records import COORDINATES, LayerSpec, Rows
from dualhook.table import Table

__all__ = ["estimate", "human", "row_sizes"]

INDEX_BYTES = torch.int64.itemsize  # of each coordinate, and of the sides of maps
SLOT_BYTES = torch.int32.itemsize


def row_sizes(model: nn.Module, selection: Selection, dtype: torch.dtype | None) -> dict[str, int | None]:
    """Bytes of one row of every layer, stored in ``dtype`` or the weight's own; None: it depends on the input."""
    dtypes = {name: dtype or parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {spec.name: _row_bytes(spec, dtypes[spec.weight]) for spec in selection.specs}


def estimate(model: nn.Module, selection: Selection, inputs: Any, *, dtype: torch.dtype | None, budget: int) -> Table:
    """What one training step on ``inputs`` writes: columns layer, patterns, bytes."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.enable_grad(), observe(model, selection.layers) as calls:
        run_model(model, inputs)
    dtypes = {name: dtype or parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    patterns, sizes = [], []
    for spec in selection.specs:
        seen = [as_rows(spec, c.call, torch.zeros(c.shape), None, every=True) for c in calls[spec.name]]
        counts = [map_of(spec).counts(rows) for rows in seen]
        patterns.append(sum(len(r) if c is None else int(c.sum()) for r, c in zip(seen, counts, strict=True)))
        sizes.append(sum(_bytes_of(spec, rows, dtypes[spec.weight]) for rows in seen))
    total = sum(sizes)
    return Table(
        {"layer": [spec.name for spec in selection.specs], "patterns": patterns, "bytes": sizes},
        title="one step",
        footer=f"{human(total)} a step; the budget of {human(budget)} holds {budget // max(total, 1):,} steps",
        bars=(("layer",), "bytes"),
    )


def _row_bytes(spec: LayerSpec, dtype: torch.dtype) -> int | None:
    width = map_of(spec).row_width
    if width is None:
        return None
    return width * dtype.itemsize + len(COORDINATES) * INDEX_BYTES + (SLOT_BYTES if spec.slots > 1 else 0)


def _bytes_of(spec: LayerSpec, rows: Rows, dtype: torch.dtype) -> int:
    one = _row_bytes(spec, dtype)
    if one is not None:
        return len(rows) * one
    assert rows.extent is not None
    numbers = rows.key.numel() + rows.output_grad.numel()
    return numbers * dtype.itemsize + (len(rows) * len(COORDINATES) + rows.extent.numel()) * INDEX_BYTES


def human(size: int) -> str:
    """A number of bytes for people."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"
