"""What recording costs on disk, before it begins."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dualhook.capture import Selection, as_rows, observe, select_layers
from dualhook.errors import LayerError
from dualhook.maps import map_of
from dualhook.model import run_model
from dualhook.recorder.heads import computed_bytes
from dualhook.records import COORDINATES, LayerSpec, Rows
from dualhook.store import eight_bit_bytes, is_worth_finding, shared_keys
from dualhook.table import Table

__all__ = ["estimate", "human", "row_sizes"]

INDEX_BYTES = torch.int64.itemsize  # of each coordinate, and of the sides of maps
SLOT_BYTES = torch.int32.itemsize
NARROWER = (torch.bfloat16, torch.int8)
NAMED = 3  # kinds of layers that the words behind the table name


def row_sizes(model: nn.Module, selection: Selection, stored_in: Mapping[str, torch.dtype]) -> dict[str, int | None]:
    """Bytes of one row of every layer, ``stored_in`` or in the weight's own dtype; None: it depends on the input."""
    computed_in = _dtypes(model, selection)
    dtypes = {**computed_in, **stored_in}
    widths = {spec: _widths(spec) for spec in selection.specs}
    return {
        spec.name: None if own is None else _bytes(own, dtypes[spec.name], computed_in[spec.name]) + _index_bytes(spec)
        for spec, own in widths.items()
    }


def estimate(
    model: nn.Module, selection: Selection, inputs: Any, *, stored_in: Mapping[str, torch.dtype], budget: int
) -> Table:
    """What one training step on ``inputs`` writes: columns layer, patterns, bytes."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices), torch.enable_grad(), observe(model, selection.layers) as calls:
        run_model(model, inputs)
    computed_in = _dtypes(model, selection)
    dtypes = {**computed_in, **stored_in}
    patterns, sizes, narrower = [], dict[str, int](), dict.fromkeys(NARROWER, 0)
    keys: dict[str, dict[str, Tensor]] = {}
    for spec in selection.specs:
        seen = [as_rows(spec, c.call, torch.zeros(c.shape), None) for c in calls[spec.name]]
        counts = [map_of(spec).counts(rows) for rows in seen]
        patterns.append(sum(len(r) if c is None else int(c.sum()) for r, c in zip(seen, counts, strict=True)))
        stored, computed = dtypes[spec.name], computed_in[spec.name]
        sizes[spec.name] = sum(_cost(spec, rows, stored, computed) for rows in seen)
        for dtype in NARROWER:
            narrower[dtype] += sum(_cost(spec, rows, dtype, computed) for rows in seen)
        if len(seen) == 1:
            keys[spec.name] = {name: getattr(seen[0], name).cpu() for name in COORDINATES}
            keys[spec.name]["key"] = seen[0].key.to("cpu", computed if stored == torch.int8 else stored)
    fixed = {name for name in keys if all(c.call.is_fixed for c in calls[name])}
    sharing = shared_keys(keys, [name for name, dtype in stored_in.items() if dtype == torch.int8])
    shared = 0
    for name in sharing:
        count, width = keys[name]["key"].shape
        shared += count * _bytes((width,), dtypes[name], computed_in[name])
    found_again, total = 0, sum(sizes.values())
    for name in fixed - sharing.keys():
        key = keys[name]["key"]
        if stored_in.get(name) != torch.int8 and is_worth_finding(len(key), key[:1].nbytes, total):
            found_again += key.nbytes
    heads = {
        spec.name: (n * _bytes((spec.out_features,), dtypes[spec.name], computed_in[spec.name]), own)
        for spec, n in zip(selection.specs, patterns, strict=True)
        if (own := computed_bytes(spec, n, computed_in[spec.name].itemsize, dtypes[spec.name].itemsize)) is not None
    }
    instead = {**{f"dtype={dtype}": size for dtype, size in narrower.items()}, "layers='head'": _of_head(model, sizes)}
    words = _words(sizes, inputs, budget, instead, shared, found_again, heads)
    return Table(
        {"layer": list(sizes), "patterns": patterns, "bytes": list(sizes.values())},
        title="one step",
        footer=words,
        bars=(("layer",), "bytes"),
    )


def _words(
    sizes: Mapping[str, int],
    inputs: Any,
    budget: int,
    instead: Mapping[str, int],
    shared: int,
    found_again: int,
    heads: Mapping[str, tuple[int, float]],
) -> str:
    """What a step takes, what of it is most, and how it would be less; of all that only what there is to say.

    ``shared`` are bytes of keys that are stored once; ``found_again`` those that are not stored again in later epochs;
    ``heads`` those of a head's output gradients, whole and computed.
    """
    total, (count, unit) = sum(sizes.values()), _units(inputs)
    each = f", {human(total / count)} a {unit}" if count > 1 else ""
    words = [f"{human(total)} a step{each}; the budget of {human(budget)} holds {budget // max(total, 1):,} steps"]
    if len(shares := _shares(sizes)) > 1:
        words.append("the largest are " + ", ".join(shares[:NAMED]))
    if shared:
        words.append(f"about {human(shared)} of it are keys that another layer reads too: these are stored once")
    if found_again:
        words.append(
            f"about {human(found_again)} of it are keys that no trained weight has made: as long as samples are known, "
            "those that come again in later epochs are not stored again"
        )
    for name, (whole, computed) in heads.items():
        words.append(
            f"under softmax cross-entropy the output gradients of {name} are computed again when asked for: they "
            f"take {human(computed)} instead of {human(whole)}"
        )
    if saving := [f"{human(size)} with {what}" for what, size in instead.items() if 0 < size < total]:
        words.append("it would be " + ", ".join(saving))
    return "\n".join(words)


def _dtypes(model: nn.Module, selection: Selection) -> dict[str, torch.dtype]:
    """The dtype of each layer's weight."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {spec.name: parameters[spec.weight].dtype for spec in selection.specs}


def _index_bytes(spec: LayerSpec) -> int:
    return len(COORDINATES) * INDEX_BYTES + (SLOT_BYTES if spec.slots > 1 else 0)


def _widths(spec: LayerSpec) -> tuple[int, int] | None:
    """How many numbers key and output gradient of a row are; None: it depends on the input."""
    width = map_of(spec).row_width
    return None if width is None else (width - spec.out_features, spec.out_features)


def _bytes(widths: Sequence[int], stored_in: torch.dtype, computed_in: torch.dtype) -> int:
    """What the floating numbers of a row take, of tensors of these widths."""
    if stored_in == torch.int8:
        return sum(eight_bit_bytes(width, computed_in) for width in widths)
    return sum(widths) * stored_in.itemsize


def _cost(spec: LayerSpec, rows: Rows, stored_in: torch.dtype, computed_in: torch.dtype) -> int:
    """Bytes of rows."""
    widths = _widths(spec)
    if widths is not None:
        return len(rows) * (_bytes(widths, stored_in, computed_in) + _index_bytes(spec))
    assert rows.extent is not None
    index = (len(rows) * len(COORDINATES) + rows.extent.numel()) * INDEX_BYTES
    own = (rows.key.shape[1], rows.output_grad.shape[1])
    return len(rows) * _bytes(own, stored_in, computed_in) + index


def _shares(sizes: Mapping[str, int]) -> list[str]:
    """The shares of layers that differ in the numbers of their names only, as globs, the largest first."""
    found: Counter[str] = Counter()
    for name, size in sizes.items():
        found[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)] += size
    total = max(1, found.total())
    return [f"{name} {size / total:.0%}" for name, size in found.most_common() if size]


def _of_head(model: nn.Module, sizes: Mapping[str, int]) -> int:
    """What the head alone takes of what has been counted; 0 if it has not been."""
    try:
        head = [spec.name for spec in select_layers(model, "head").specs]
    except LayerError:
        return 0
    return sum(sizes[name] for name in head) if all(name in sizes for name in head) else 0


def _units(inputs: Any) -> tuple[int, str]:
    """What a step works on: the tokens of a batch of whole numbers [b, n], or samples."""
    given = [inputs]
    if isinstance(inputs, Mapping):  # tokenisers do not always put the tokens first
        given = [inputs.get("input_ids"), *inputs.values()]
    elif isinstance(inputs, tuple):
        given = list(inputs)
    first = next((one for one in given if isinstance(one, Tensor) and one.dim()), None)
    if first is None:
        return 0, "sample"
    return (len(first), "sample") if first.is_floating_point() or first.dim() != 2 else (first.numel(), "token")


def human(size: float) -> str:
    """A number of bytes for people."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"
