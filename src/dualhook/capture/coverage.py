"""The coverage table: every trainable parameter, recorded how, or not and why."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from dualhook.capture.kinds import ROOT, linear_maps
from dualhook.capture.selection import Selection
from dualhook.table import Table

__all__ = ["coverage_table"]


def coverage_table(
    model: nn.Module,
    selection: Selection,
    rules: Mapping[str, str],
    row_bytes: Mapping[str, int | None],
    forms: Mapping[str, str],
) -> Table:
    """Columns parameter, shape, layer (None if not recorded), kind, rule, bytes_per_row, note.

    ``rules`` maps parameters to what explains their optimiser; ``row_bytes`` layers to the bytes of one row, whole;
    ``forms`` layers to how their output gradients are kept, where that is to be told.
    """
    maps = {p: tapped.spec.name for tapped in linear_maps(model) for p in tapped.spec.parameters}
    owner = {name: spec for spec in selection.specs for name in spec.parameters}
    lines = []
    for name, parameter in model.named_parameters():
        spec = owner.get(name)
        if spec is None and not parameter.requires_grad:
            continue
        module = name.rpartition(".")[0]
        kind = type(model.get_submodule(module)).__name__
        candidates = (maps.get(name, ""), module or ROOT)
        known = [selection.reasons[place] for place in candidates if place in selection.reasons]
        note = known[0] if known else f"a parameter of {kind}: no linear map"
        if spec is not None:
            note = "stored as whole maps: estimate() tells the bytes" if row_bytes[spec.name] is None else ""
            note = forms.get(spec.name, note) if name == spec.weight else note
            note = note if parameter.requires_grad else "frozen: recorded from the moment it trains"
        lines.append(
            (
                name,
                "×".join(map(str, parameter.shape)),
                None if spec is None else spec.name,
                None if spec is None else spec.kind,
                None if spec is None else rules.get(name, "known at the first step"),
                None if spec is None else row_bytes[spec.name] if name == spec.weight else 0,
                note,
            )
        )
    recorded = sum(line[2] is not None for line in lines)
    names = ("parameter", "shape", "layer", "kind", "rule", "bytes_per_row", "note")
    return Table(
        dict(zip(names, map(list, zip(*lines, strict=True)), strict=True)) if lines else {name: [] for name in names},
        title="coverage",
        footer=f"{recorded} of {len(lines)} parameters recorded; a bias shares the rows of its weight",
    )
