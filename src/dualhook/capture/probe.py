"""The probe: do the recorded rows rebuild the gradient that the optimiser sees, and at what scale?

A grid of some thousand entries of every weight's gradient is rebuilt from the rows and regressed against ``p.grad``.
The slope is the scale between the two, however it came about (clipping, loss scaling, averaging over ranks); the
residual says whether the rows explain the gradient at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """One parameter's probed entries: the gradient, what the rows rebuild, and the sum of their absolute parts."""

    gradient: Array
    rebuilt: Array
    absolute: Array
    dtype: torch.dtype


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

    def measure(self, gradients: Mapping[str, Tensor], rows: Rows | None) -> dict[str, Measurement]:
        """Compare the gradients of the layer's parameters, by name, with what ``rows`` rebuild."""
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
            at = gradient.detach()[outputs.to(gradient.device)]
            seen = at[:, inputs.to(gradient.device)] if is_weight else at
            found[name] = Measurement(
                seen.cpu().double().numpy(),
                d.T @ x if is_weight else d.sum(axis=0),
                absolute if is_weight else abs(d).sum(axis=0),
                _coarser(rows.output_grad.dtype, gradient.dtype),
            )
        return found

    def _without_rows(self, gradient: Tensor) -> Measurement:
        largest = gradient.detach().abs().max().cpu().double().reshape(1).numpy()
        return Measurement(largest, np.zeros(1), np.zeros(1), gradient.dtype)


def fit_scales(measurements: Sequence[Measurement]) -> list[Fit]:
    """The scale of every parameter of one optimiser step.

    A parameter whose rows nearly cancel (its gradient is rounding noise) says nothing about its scale and takes the
    one that the step's other parameters agree on.
    """
    with np.errstate(all="ignore"):
        telling = [measurement for measurement in measurements if _tells_scale(measurement)]
        crossed = sum(float((m.gradient * m.rebuilt).sum()) for m in telling)
        squared = sum(float((m.rebuilt**2).sum()) for m in telling)
        shared = crossed / squared if telling else 1.0
        return [_fit(measurement, shared) for measurement in measurements]


def _fit(measured: Measurement, shared: float) -> Fit:
    gradient, rebuilt, absolute = measured.gradient, measured.rebuilt, measured.absolute
    if not np.isfinite(rebuilt).all():
        return Fit(1.0, 0.0, True, False)  # the rows carry the NaN themselves
    squared = float((rebuilt**2).sum())
    scale = shared
    if _tells_scale(measured):
        scale = float((gradient * rebuilt).sum()) / squared
        # indistinguishable from 1 means that nothing was scaled: do not put the rounding of one step into it
        spread = math.sqrt(float(((gradient - scale * rebuilt) ** 2).mean()) / squared) if math.isfinite(scale) else 0.0
        if abs(scale - 1.0) <= 4 * max(spread, float(np.finfo(np.float64).eps)):
            scale = 1.0
    if not math.isfinite(scale):
        return Fit(scale, 0.0, True, False)
    residual = float(np.linalg.norm(gradient - scale * rebuilt))
    size = float(np.linalg.norm(gradient))
    limit = _tolerance(measured.dtype) * abs(scale) * float(np.linalg.norm(absolute))
    return Fit(scale, residual / size if size else 0.0, residual <= limit, math.isfinite(residual))


def _tells_scale(measured: Measurement) -> bool:
    noise = 1e4 * torch.finfo(measured.dtype).eps if measured.dtype.itemsize > 2 else 1e-2
    return bool(np.linalg.norm(measured.rebuilt) > noise * np.linalg.norm(measured.absolute))


def _tolerance(dtype: torch.dtype) -> float:
    reduced = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return REDUCED if reduced else TOLERANCE.get(dtype, 1e-2)


def _coarser(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return max(a, b, key=lambda dtype: TOLERANCE.get(dtype, 1e-2))


def _gather(values: Tensor, index: Tensor) -> Array:
    gathered: Array = values.detach().index_select(1, index.to(values.device)).cpu().double().numpy()
    return gathered
