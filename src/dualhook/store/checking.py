"""What manifest, headers and tensors have to be before anything is computed with them; FORMAT.md in code.

A file may come from anywhere: what it claims is compared with what it holds, and with the limits below, before memory
is asked for. Every check raises ``ValueError`` with what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dualhook.maps import map_of
from dualhook.packing import Largest, Scaled, Softmax
from dualhook.records import COORDINATES, VALUE, LayerSpec
from dualhook.store.eightbit import EIGHT_BIT_DTYPES, EIGHT_BIT_FIELDS
from dualhook.store.packed import PER_STEP, WEIGHT, WEIGHT_STEP, form_of
from dualhook.store.sharing import KEY_ROW
from dualhook.store.sparse import SPARSE_FIELDS

__all__ = [
    "SEGMENT_TEXTS",
    "check_header",
    "check_ledger",
    "check_origin",
    "check_rows",
    "checked_count",
    "checked_layer",
]

LARGEST_STEP = 2**26  # what is computed step by step takes 8 bytes each
WIDEST = 2**30  # numbers of a sparse row: its mask takes 32 times less than the row does
LARGEST_SIZE = 2**40  # of a layer's inputs or outputs, and of any other number
CONVOLUTIONS = ("conv", "conv_transpose")
KINDS = ("linear", "transposed", "bias", "embedding", "experts", "transposed_experts", "bilinear", *CONVOLUTIONS)
NUMBERS = (torch.int64, torch.float64)  # of columns
SEGMENT_TEXTS = ("parameters", "optimizers", "hyper", "state")  # lists in the header of a segment


def checked_count(what: str, value: Any, least: int = 0, most: int = LARGEST_SIZE) -> int:
    """A whole number within limits."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} {value!r:.80}: expected a whole number from {least} to {most}")
    return value


def _texts(what: str, values: Any) -> list[str]:
    if not isinstance(values, list) or not set(map(type, values)) <= {str}:
        raise ValueError(f"{what} {values!r:.80}: expected a list of texts")
    return values


def _named(what: str, values: Any) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{what} {values!r:.80}: expected an object")
    return values


# ---- manifest ------------------------------------------------------------------------------------------------


def checked_layer(given: Any) -> LayerSpec:
    """A layer of the manifest."""
    spec = LayerSpec(**_named("layer", given))
    texts = (spec.name, spec.weight, spec.kind, *(() if spec.bias is None else (spec.bias,)))
    if not all(isinstance(text, str) for text in texts) or spec.kind not in KINDS or spec.weight == spec.bias:
        raise ValueError(
            f"layer {spec.name!r:.80} of kind {spec.kind!r:.80}: expected names and one of {', '.join(KINDS)}"
        )
    for size in (spec.in_features, spec.out_features, spec.slots):
        checked_count(f"size of layer {spec.name!r}", size, 1)
    if spec.in_features % spec.slots:
        raise ValueError(f"layer {spec.name!r} has {spec.in_features} inputs in {spec.slots} slots")
    options = _named("options", spec.options)
    if spec.kind == "bilinear":
        first, second = (checked_count("width", width, 1) for width in options["widths"])
        if first * second != spec.in_features:
            raise ValueError(f"layer {spec.name!r} has {spec.in_features} inputs of widths {first} and {second}")
    if spec.kind in CONVOLUTIONS:
        _check_convolution(spec, options)
    return spec


def _check_convolution(spec: LayerSpec, options: Mapping[str, Any]) -> None:
    dimensions = len(options["kernel"])
    for name, many in (("kernel", 1), ("stride", 1), ("dilation", 1), ("padding", 2)):
        if not 1 <= dimensions <= 3 or len(options[name]) != many * dimensions:
            raise ValueError(f"layer {spec.name!r}: {name} of {len(options[name])} numbers")
        for size in options[name]:
            checked_count(name, size, 0 if name == "padding" else 1, 2**20)
    channels = checked_count("channels", options["channels"], 1)
    entries = 1
    for size in options["kernel"]:
        entries *= size
    if channels * entries != spec.in_features or channels % spec.slots:
        raise ValueError(f"layer {spec.name!r} has {spec.in_features} inputs of {channels} channels")
    if options["padding_mode"] not in ("zeros", "reflect", "replicate", "circular"):
        raise ValueError(f"layer {spec.name!r}: padding_mode {options['padding_mode']!r:.80}")


# ---- headers -------------------------------------------------------------------------------------------------


def check_header(kind: str, header: Mapping[str, Any], tensors: Collection[str]) -> None:
    """The header of a file of some kind, which holds ``tensors`` of these names."""
    HEADERS[kind](header, tensors)


def _check_step(header: Mapping[str, Any], tensors: Collection[str]) -> None:
    checked_count("step", header["step"], 0, LARGEST_STEP)


def _check_column(header: Mapping[str, Any], tensors: Collection[str]) -> None:
    if header["categories"] is not None:
        _texts("categories", header["categories"])
    if VALUE not in tensors:
        raise ValueError(f"it holds no tensor {VALUE!r}")


def _check_parameters(header: Mapping[str, Any], tensors: Collection[str]) -> None:
    _check_step(header, tensors)
    for name, parts in _named("parameters", header["parameters"]).items():
        missing = {f"{name}//{part}" for part in _texts("parts", parts)} - set(tensors)
        if missing:
            raise ValueError(f"it holds no tensor {min(missing)!r:.80}")


def _check_origin(header: Mapping[str, Any], tensors: Collection[str]) -> None:
    _check_parameters(header, tensors)
    checked_count("folded", header["folded"], 0, header["step"])
    dtypes, inexact = _named("dtypes", header["dtypes"]), _named("inexact", header["inexact"])
    for name, parts in header["parameters"].items():
        dtype = getattr(torch, str(dtypes[name]), None)
        if VALUE not in parts or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"{name!r:.80} has the parts {parts!r:.80} and the dtype {dtypes[name]!r:.80}")
        checked_count("inexact", inexact.get(name, 0))


def _check_segment(header: Mapping[str, Any], tensors: Collection[str]) -> None:
    first, last = header["steps"]
    checked_count("step", last, checked_count("step", first, 1, LARGEST_STEP), LARGEST_STEP)
    rows = _named("rows", header["rows"])
    for layer, own in rows.items():
        checked_count("count", _named("rows", own)["count"], 1)
        checked_count("first", own["first"])
        holder = own.get("key_of", layer)
        if holder not in rows or (holder != layer and "key_of" in rows[holder]):
            raise ValueError(f"{layer!r:.80} has the keys of {holder!r:.80}, which has none of its own")
        _check_sparse(own, SPARSE_FIELDS)
        numbers = [_checked_file(file) for file in own.get("key_files", ())]
        if len(set(numbers)) < len(numbers) or bool(numbers) != ("key_files" in own):
            raise ValueError(f"{layer!r:.80} has its keys in the files {numbers!r:.80}")
        for part, dtype in _named("eight_bit", own.get("eight_bit", {})).items():
            if part not in EIGHT_BIT_FIELDS or part in own.get("sparse", {}) or dtype not in EIGHT_BIT_DTYPES:
                raise ValueError(f"eight_bit {part!r:.80} of {dtype!r:.80}: expected some of {EIGHT_BIT_FIELDS}")
    for what in SEGMENT_TEXTS:
        _texts(what, header[what])


def _check_keys(header: Mapping[str, Any], tensors: Collection[str]) -> None:
    for own in _named("rows", header["rows"]).values():
        checked_count("count", _named("rows", own)["count"], 1)
        _check_sparse(own, ("key",))


def _checked_file(given: Any) -> int:
    """The number of a file of keys, told with how many it has."""
    number, count = given
    checked_count("count", count, 1, 2**31 - 1)
    return checked_count("number", number)


def _check_sparse(own: Mapping[str, Any], known: Collection[str]) -> None:
    for part, width in _named("sparse", own.get("sparse", {})).items():
        checked_count(f"width of {part!r:.80}", width, 1, WIDEST)
        if part not in known:
            raise ValueError(f"sparse {part!r:.80}: expected one of {', '.join(known)}")


HEADERS: Mapping[str, Callable[[Mapping[str, Any], Collection[str]], None]] = {
    "segment": _check_segment,
    "keys": _check_keys,
    "origin": _check_origin,
    "snapshot": _check_parameters,
    "latest": _check_step,
    "column": _check_column,
}

# ---- tensors -------------------------------------------------------------------------------------------------


def check_origin(spec: LayerSpec, parameter: str, value: Tensor) -> None:
    """A parameter's value is of the layer's size, and so are the matrices that it is made into."""
    expected: tuple[int, ...] = (spec.out_features, spec.in_features)
    if parameter != spec.weight:
        expected = (spec.out_features,) if spec.slots == 1 else (spec.out_features, spec.slots)
    try:
        shape = tuple(map_of(spec).matrix(parameter, value).shape)
    except (RuntimeError, IndexError, ValueError):
        shape = tuple(value.shape)
    if shape != expected or not value.is_floating_point():
        raise ValueError(f"{parameter!r} is {list(shape)}, {value.dtype}: expected {list(expected)}")


def check_rows(spec: LayerSpec, tensors: Mapping[str, Tensor], count: int, steps: Iterable[int]) -> None:
    """The rows of a layer in a segment of these ``steps``, the first and the last."""
    form = form_of(tensors)
    for name, values in tensors.items():
        if name not in PER_STEP and len(values) != count and not (name == "key" and KEY_ROW in tensors):
            raise ValueError(f"{len(values)} of {name!r:.80} for {count} rows")
        if name.startswith("column/") and (values.dim() != 1 or values.dtype not in NUMBERS):
            raise ValueError(f"{name!r:.80} is {list(values.shape)}, {values.dtype}")
    for name in COORDINATES:
        _check(name, tensors[name], torch.int64, ())
    first, last = steps
    step = tensors["step"]
    if int(step[0]) < first or int(step[-1]) > last or bool((step[1:] < step[:-1]).any()):
        raise ValueError(f"its steps fall, or are not {first} to {last}")
    key, output_grad = tensors["key"], tensors["output_grad"]
    widths = _widths(spec)
    _check("key", key, None, None if widths is None else (widths[0],))
    outputs = None if widths is None else (widths[1] if form is None else 0,)
    _check("output_grad", output_grad, key.dtype if form is None else None, outputs)
    if KEY_ROW in tensors:
        _check(KEY_ROW, tensors[KEY_ROW], torch.int32, (), len(key))
    if "slot" in tensors or (spec.slots > 1 and widths is not None):  # an embedding of one token has one
        _check("slot", tensors["slot"], torch.int32, (), spec.slots)
    if spec.kind in CONVOLUTIONS:
        _check_extent(spec, tensors, form)
    elif "extent" in tensors:
        raise ValueError("extents of rows that are no maps")
    if form is not None:
        _check_packed(spec, tensors, form)


def _widths(spec: LayerSpec) -> tuple[int, int] | None:
    """How many numbers keys and output gradients have; None: that depends on the size of a map."""
    whole = map_of(spec).row_width
    return None if whole is None else (whole - spec.out_features, spec.out_features)


def _check(what: str, values: Tensor, dtype: torch.dtype | None, shape: tuple[int, ...] | None, below: int = 0) -> None:
    """Rows of a dtype (None: floating), with so many numbers each (None: some), ``below`` a limit if there is one."""
    is_dtype = values.is_floating_point() if dtype is None else values.dtype == dtype
    is_shape = values.dim() == 2 if shape is None else tuple(values.shape[1:]) == shape
    if not is_dtype or not is_shape or not values.dim():
        raise ValueError(f"{what!r} is {list(values.shape)}, {values.dtype}")
    if below and values.numel() and not (int(values.min()) >= 0 and int(values.max()) < below):
        raise ValueError(f"{what!r} has numbers that are not from 0 to {below - 1}")


def _check_extent(spec: LayerSpec, tensors: Mapping[str, Tensor], form: str | None) -> None:
    """The maps that extents tell of are no larger than the rows, and the kernel fits into them as often as they say."""
    extent, dimensions = tensors["extent"], len(spec.options["kernel"])
    _check("extent", extent, torch.int64, (2 * dimensions,), 2**20)
    for one in torch.unique(extent, dim=0).tolist():
        size, places = one[:dimensions], one[dimensions:]
        for axis in range(dimensions):
            reach = spec.options["dilation"][axis] * (spec.options["kernel"][axis] - 1) + 1
            low, high = spec.options["padding"][2 * axis : 2 * axis + 2]
            stride = spec.options["stride"][axis]
            if spec.kind == "conv":
                is_so = places[axis] == (size[axis] + low + high - reach) // stride + 1 > 0
            else:
                is_so = 0 <= places[axis] - ((size[axis] - 1) * stride + reach - low - high) <= max(stride, reach)
            if not is_so:
                raise ValueError(f"maps of {size} with outputs of {places}")
        width = tensors["output_grad" if form is None else f"{form}/value"].shape[1]
        inputs, outputs = spec.options["channels"], spec.out_features * spec.slots
        for axis in range(dimensions):
            inputs, outputs = inputs * size[axis], outputs * places[axis]
        if inputs > tensors["key"].shape[1] or outputs > width:
            raise ValueError(f"maps of {size} with outputs of {places} in smaller rows")


def _check_packed(spec: LayerSpec, tensors: Mapping[str, Tensor], form: str) -> None:
    if form == Scaled.name:
        widths = _widths(spec)
        _check("scaled/value", tensors["scaled/value"], torch.float16, None if widths is None else (widths[1],))
        _check("scaled/scale", tensors["scaled/scale"], None, ())
    elif spec.kind != "linear":
        raise ValueError(f"output gradients of kind {form!r} in a layer of kind {spec.kind!r}")
    elif form == Largest.name:
        value = tensors["largest/value"]
        _check("largest/value", value, None, None)
        _check("largest/index", tensors["largest/index"], torch.int32, tuple(value.shape[1:]), spec.out_features)
    else:
        assert form == Softmax.name
        _check("softmax/target", tensors["softmax/target"], torch.int32, (), spec.out_features)
        for field in ("value", "offset"):
            _check(f"softmax/{field}", tensors[f"softmax/{field}"], None, ())
        steps, weight = tensors[WEIGHT_STEP], tensors[WEIGHT]
        _check(WEIGHT_STEP, steps, torch.int64, ())
        _check(WEIGHT, weight, None, (spec.out_features, spec.in_features + (spec.bias is not None)))
        needed = torch.unique_consecutive(tensors["step"])
        if (
            len(steps) != len(weight)
            or bool((steps[1:] <= steps[:-1]).any())
            or not bool(torch.isin(needed, steps).all())
        ):
            raise ValueError(f"{WEIGHT!r} is not there for every step")


def check_ledger(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """The ledger of a segment."""
    entry, hyper = tensors["ledger/entry"], tensors["ledger/hyper"]
    _check("ledger/entry", entry, torch.int64, (5,))
    _check("ledger/measured", tensors["ledger/measured"], torch.float64, (2 + len(header["state"]),))
    _check("ledger/hyper", hyper, torch.float64, (len(header["hyper"]),))
    if len(tensors["ledger/measured"]) != len(entry):
        raise ValueError(f"{len(tensors['ledger/measured'])} rows of ledger/measured for {len(entry)} entries")
    first, last = header["steps"]
    below = {1: len(header["parameters"]), 2: len(header["optimizers"]), 3: len(hyper), 4: 64}
    step = entry[:, 0]
    is_so = not len(entry) or (
        first <= int(step.min()) and int(step.max()) <= last and not bool((step[1:] < step[:-1]).any())
    )
    for column, limit in below.items():
        own = entry[:, column]
        is_so = is_so and (not len(own) or (int(own.min()) >= 0 and int(own.max()) < limit))
    if not is_so:
        raise ValueError("ledger/entry refers to steps, names or settings that are not there")
