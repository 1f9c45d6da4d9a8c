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

from dualhook.records import LayerSpec, Rows

__all__ = ["LayerProbe", "Measurement", "fit_scales"]

GRID = (64, 16)  # outputs × inputs: about a thousand entries for two thin gathers
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# of the sum of absolute row contributions: near-null gradients make the gradient's own size a wrong yardstick
REDUCED = 1e-2  # the same where float32 products are allowed to run in TF32 or bfloat16

SUBNORMAL = torch.finfo(torch.float32).tiny  # below it rounding is no longer relative to the number

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


class LayerProbe:
    """The fixed entries of one layer's parameters."""

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        generator = torch.Generator().manual_seed(0)  # its own: training's random numbers stay as they are
        self._outputs = torch.randperm(spec.out_features, generator=generator)[: GRID[0]].sort().values
        self._inputs = torch.randperm(spec.in_features, generator=generator)[: GRID[1]].sort().values
        self._signs = 1.0 - 2.0 * torch.randint(0, 2, (spec.in_features,), generator=generator)

    def measure(
        self, gradients: Mapping[str, Tensor], rows: Rows | None, *, whole: bool = False
    ) -> dict[str, Measurement]:
        """Compare the gradients of the layer's parameters, by name, with what ``rows`` rebuild.

        ``whole`` looks at every entry of the gradients, if only in sums.
        """
        outputs, inputs = self._outputs, self._inputs
        if rows is None:
            return {name: self._without_rows(gradient) for name, gradient in gradients.items()}
        d, x = _gather(rows.output_grad, outputs), _gather(rows.key, inputs)
        absolute = abs(d).T @ abs(x)
        if not absolute.any():  # a dead corner: look where this step's rows are largest
            outputs = rows.output_grad.abs().sum(0).topk(len(outputs)).indices
            inputs = rows.key.abs().sum(0).topk(len(inputs)).indices
            d, x = _gather(rows.output_grad, outputs), _gather(rows.key, inputs)
            absolute = abs(d).T @ abs(x)
        found = {}
        for name, gradient in gradients.items():
            is_weight = name == self.spec.weight
            seen = gradient.detach().index_select(0, outputs.to(gradient.device))
            seen = seen.index_select(1, inputs.to(gradient.device)) if is_weight else seen
            found[name] = Measurement(
                _numpy(seen),
                d.T @ x if is_weight else d.sum(axis=0),
                absolute if is_weight else abs(d).sum(axis=0),
                _coarser(rows.output_grad.dtype, gradient.dtype),
                self._sums(gradient.detach(), rows, is_weight) if whole else None,
            )
        return found

    def _sums(self, gradient: Tensor, rows: Rows, is_weight: bool) -> Measurement:
        d, x = rows.output_grad, rows.key
        signs = self._signs.to(x)
        # a copy: torch's foreach step with Nesterov momentum adds to the gradients in place
        seen = gradient @ self._signs.to(gradient) if is_weight else gradient.clone()
        signed = x @ signs if is_weight else torch.ones_like(d[:, 0])
        size = x.abs().sum(1) if is_weight else signed
        dtype = _coarser(d.dtype, gradient.dtype)
        return Measurement(_numpy(seen), _numpy(d.T @ signed), _numpy(d.abs().T @ size), dtype)

    def _without_rows(self, gradient: Tensor) -> Measurement:
        largest = _numpy(gradient.detach().abs().max().reshape(1))
        return Measurement(largest, np.zeros(1), np.zeros(1), gradient.dtype)


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


def _gather(values: Tensor, index: Tensor) -> Array:
    return _numpy(values.index_select(1, index.to(values.device)))


def _numpy(values: Tensor) -> Array:
    found: Array = values.detach().cpu().double().numpy()
    return found
