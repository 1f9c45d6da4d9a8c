"""The probe: do the recorded rows rebuild the gradient that the optimiser sees, and at what scale?

A grid of some thousand entries of every weight's gradient is rebuilt from the rows and regressed against ``p.grad``.
The slope is the scale between the two, however it came about (clipping, loss scaling, averaging over ranks); the
residual says whether the rows explain the gradient at all. Now and then the whole gradient is looked at through one sum
of random signs per output, which sees what happens to entries off the grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dualhook.capture.sharded import is_sharded, local, rows_at, spread
from dualhook.maps import gradient, map_of
from dualhook.records import LayerSpec, Rows

__all__ = ["Corner", "LayerProbe", "Measurement", "fit_scales"]

GRID = (64, 16)  # outputs × inputs: about a thousand entries for two thin gathers
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# of the sum of absolute row contributions: near-null gradients make the gradient's own size a wrong yardstick
REDUCED = 1e-2  # the same where float32 products are allowed to run in TF32 or bfloat16

SUBNORMAL = torch.finfo(torch.float32).tiny  # below it rounding is no longer relative to the number

BLOCK_ROWS = 2**16  # patterns that are looked at together

EPS = float(np.finfo(np.float64).eps)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """One parameter's probed entries: the gradient, what the rows rebuild, and the sum of their absolute parts."""

    gradient: Array
    rebuilt: Array
    absolute: Array
    dtype: torch.dtype
    whole: Measurement | None = None  # the same of every output's sum over all inputs with random signs

    @cached_property
    def squared(self) -> float:
        """``|rebuilt|²``."""
        return _dot(self.rebuilt, self.rebuilt)

    @cached_property
    def crossed(self) -> float:
        """``gradient · rebuilt``."""
        return _dot(self.gradient, self.rebuilt)

    @cached_property
    def size(self) -> float:
        """Norm of the sums of absolute parts: what rounding errors are measured against."""
        return math.sqrt(_dot(self.absolute, self.absolute))

    @cached_property
    def tells_scale(self) -> bool:
        """Whether the rebuilt gradient stands out of its own rounding."""
        noise = 1e4 * torch.finfo(self.dtype).eps if self.dtype.itemsize > 2 else 1e-2
        return math.sqrt(self.squared) > noise * self.size

    def left(self, scale: float) -> float:
        """Norm of what the rows leave open at a scale."""
        rest = self.gradient - scale * self.rebuilt
        return math.sqrt(_dot(rest, rest))


@dataclass(frozen=True)
class Fit:
    """What a measurement says: the scale, the share of the gradient it leaves open, and whether that is too much."""

    scale: float
    residual: float
    explained: bool
    finite: bool


@dataclass(frozen=True)
class Corner:
    """Where a layer is probed: at some outputs, and some columns of one slot of its matrix."""

    slot: int
    outputs: Tensor
    inputs: Tensor


class LayerProbe:
    """The probed entries of one layer's parameters; ``is_shared``: other layers use its weight as well."""

    def __init__(self, spec: LayerSpec, *, is_shared: bool = False) -> None:
        self.spec = spec
        self._map = map_of(spec)
        self._is_shared = is_shared
        generator = torch.Generator().manual_seed(0)  # its own: training's random numbers stay as they are
        self._outputs = torch.randperm(spec.out_features, generator=generator)[: GRID[0]].sort().values
        self._inputs = self._map.grid_inputs(GRID[1], generator)
        self._signs = 1.0 - 2.0 * torch.randint(0, 2, (spec.in_features,), generator=generator)

    def measure(
        self, gradients: Mapping[str, Tensor], rows: Rows | None, *, whole: bool = False
    ) -> dict[str, Measurement]:
        """Compare the gradients of the layer's parameters, by name, with what ``rows`` rebuild.

        ``whole`` looks at every entry of the gradients, if only in sums.
        """
        if rows is None or not len(rows):
            return self.without_rows(gradients)
        slot, _ = self.busiest_slot(rows)
        found = self.at(self.usual(slot), gradients, rows, whole=whole)
        corner = self.largest(slot, *self.sizes(rows, slot)) if self.is_dead(found) else None
        return found if corner is None else self.at(corner, gradients, rows, whole=whole)

    def usual(self, slot: int) -> Corner:
        """Where a slot is probed unless nothing is there."""
        return Corner(slot, self._outputs, self._inputs)

    def at(self, corner: Corner, gradients: Mapping[str, Tensor], rows: Rows, *, whole: bool) -> dict[str, Measurement]:
        """The same in one corner; of sharded gradients what is in this process."""
        d, x = map(_numpy, self._map.some(rows, corner.slot, corner.outputs, corner.inputs))
        one = np.ones(len(d)) if rows.constant is None else _numpy(rows.constant)
        sums = self._sums(gradients, rows) if whole else {}
        found = {}
        for name, own in gradients.items():
            is_weight, seen = name == self.spec.weight, rows_at(self._matrix(name, own), corner.outputs)
            if is_weight:
                columns = corner.slot * self._map.columns + corner.inputs
                seen = seen.index_select(1, columns.to(seen.device))
            elif seen.dim() == 2:
                seen = seen[:, corner.slot]
            keys = x if is_weight else one
            dtype = _coarser(rows.output_grad.dtype, own.dtype)
            found[name] = Measurement(_numpy(seen), d.T @ keys, abs(d).T @ abs(keys), dtype, sums.get(name))
        return found

    @staticmethod
    def is_dead(found: Mapping[str, Measurement]) -> bool:
        """Whether the probed corner is one that the rows leave untouched."""
        return not all(one.absolute.any() for one in found.values())

    def busiest_slot(self, rows: Rows) -> tuple[int, int]:
        """The slot that most of the rows fill, and how many do."""
        if rows.slot is None or not len(rows):
            return 0, len(rows)
        slot = int(rows.slot.mode().values)
        return slot, int((rows.slot == slot).sum())

    def sizes(self, rows: Rows, slot: int) -> tuple[Array, Array]:
        """How large the rows are in every output [o], and in every column of a slot [c]."""
        every = torch.arange(self.spec.out_features), torch.arange(self._map.columns)
        d, x = self._map.some(rows, slot, *every)
        return _numpy(d.abs().sum(0)), _numpy(x.abs().sum(0))

    def largest(self, slot: int, outputs: Array, inputs: Array) -> Corner | None:
        """Where rows of these sizes are largest; None where there are none."""
        if not outputs.any():
            return None
        of_outputs, of_inputs = torch.from_numpy(outputs), torch.from_numpy(inputs)
        return Corner(slot, of_outputs.topk(len(self._outputs)).indices, of_inputs.topk(len(self._inputs)).indices)

    def no_rows(self, gradients: Mapping[str, Tensor]) -> Rows:
        """What a process without rows adds to a measurement: nothing."""
        rows = self._map.no_rows(next(iter(gradients.values())).dtype)
        return self._map.seen_from(self.spec, rows) if self._is_shared else rows

    def without_rows(self, gradients: Mapping[str, Tensor]) -> dict[str, Measurement]:
        """Gradients that no rows stand against: is there anything to explain?"""
        found = {}
        for name, own in gradients.items():
            held = local(own).abs()
            largest = _numpy(held.max().reshape(1)) if held.numel() else np.zeros(1)
            found[name] = Measurement(largest, np.zeros(1), np.zeros(1), own.dtype)
        return found

    def _matrix(self, name: str, gradient: Tensor) -> Tensor:
        """A gradient as a matrix; of a sharded one the rows here if they are rows of the matrix, else all of it.

        What other processes hold is zero then.
        """
        if is_sharded(gradient) and not self._map.keeps_shape:
            gradient = spread(local(gradient), gradient)
        return self._map.matrix(name, gradient)

    def _sums(self, gradients: Mapping[str, Tensor], rows: Rows) -> dict[str, Measurement]:
        """Every output's sum over all inputs of every slot, with random signs."""
        slots, dtype = self.spec.slots, torch.promote_types(rows.output_grad.dtype, torch.float32)
        whole = rows.slot is None and rows.extent is None  # keys over all slots at once: one sum
        weight, size, bias, ones = (
            torch.zeros(self.spec.out_features, 1 if whole else slots, dtype=torch.float64) for _ in range(4)
        )
        signs = self._signs.reshape(1 if whole else slots, -1).to(dtype)
        for part in self._map.patterns(rows, BLOCK_ROWS):
            d, x = part.output_grad.to(dtype), part.key.to(dtype)
            slot = torch.zeros(len(part), dtype=torch.int64) if part.slot is None else part.slot.long()
            constant = torch.ones(len(part), dtype=dtype) if part.constant is None else part.constant.to(dtype)
            signed = x @ signs[0] if len(signs) == 1 else (x * signs[slot]).sum(1)
            for total, values, factor in (
                (weight, d, signed),
                (size, d.abs(), x.abs().sum(1)),
                (bias, d, constant),
                (ones, d.abs(), constant),
            ):
                total += gradient(values, factor[:, None], slot, total.shape[1])
        found = {}
        for name, own in gradients.items():
            matrix, is_weight = self._matrix(name, own), name == self.spec.weight
            held = local(matrix)
            if is_weight:
                sums = (held.to(dtype) * signs.reshape(-1).to(held.device)).reshape(len(held), *signs.shape).sum(2)
            else:  # a copy: torch's foreach step with Nesterov momentum adds to the gradients in place
                sums = held.clone() if held.dim() == 2 else held.clone()[:, None]
            pair = (weight, size) if is_weight else (bias, ones)
            seen, rebuilt, absolute = (_numpy(part.squeeze(1)) for part in (spread(sums, matrix), *pair))
            found[name] = Measurement(seen, rebuilt, absolute, _coarser(rows.output_grad.dtype, own.dtype))
        return found


def fit_scales(measurements: Sequence[Measurement]) -> list[Fit]:
    """The scale of every parameter of one optimiser step.

    A parameter whose rows nearly cancel (its gradient is rounding noise) says nothing about its scale and takes the
    one that the step's other parameters agree on.
    """
    with np.errstate(all="ignore"):
        telling = [measurement for measurement in measurements if measurement.tells_scale]
        squared = sum(measurement.squared for measurement in telling)
        shared = sum(measurement.crossed for measurement in telling) / squared if telling else 1.0
        return [_fit(measurement, shared) for measurement in measurements]


def _fit(measured: Measurement, shared: float) -> Fit:
    if not math.isfinite(measured.squared):
        return Fit(1.0, 0.0, True, False)  # the rows carry the NaN themselves
    scale = measured.crossed / measured.squared if measured.tells_scale else shared
    if not math.isfinite(scale):
        return Fit(scale, 0.0, True, False)
    left = measured.left(scale)
    if measured.tells_scale:
        # indistinguishable from 1 means that nothing was scaled: do not put the rounding of one step into it
        spread = left / math.sqrt(measured.rebuilt.size * measured.squared)
        if abs(scale - 1.0) <= 4 * max(spread, EPS):
            scale, left = 1.0, measured.left(1.0)
    size = math.sqrt(_dot(measured.gradient, measured.gradient))
    limit = _tolerance(measured.dtype) * abs(scale) * measured.size + SUBNORMAL
    explained = left <= limit and (measured.whole is None or _adds_up(measured.whole, scale))
    return Fit(scale, left / size if size else 0.0, explained, math.isfinite(left))


def _adds_up(sums: Measurement, scale: float) -> bool:
    """Whether every single sum is explained, up to the rounding of its own parts."""
    left = abs(sums.gradient - scale * sums.rebuilt)
    return bool((left <= _tolerance(sums.dtype) * abs(scale) * sums.absolute + SUBNORMAL).all())


def _dot(a: Array, b: Array) -> float:
    return float(np.dot(a.ravel(), b.ravel()))


def _tolerance(dtype: torch.dtype) -> float:
    reduced = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return REDUCED if reduced else TOLERANCE.get(dtype, 1e-2)


def _coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return max(a, b, key=lambda dtype: TOLERANCE.get(dtype, 1e-2))


def _numpy(values: Tensor) -> Array:
    found: Array = values.detach().cpu().double().numpy()
    return found
