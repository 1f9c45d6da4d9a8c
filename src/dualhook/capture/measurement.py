"""A step's gradients against what the rows rebuild of them: the scale between the two, and whether it explains all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Array", "Computed", "Fit", "Measurement", "Seen", "fit_scales", "tolerance"]

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# of the sum of absolute row contributions: near-null gradients make the gradient's own size a wrong yardstick

SUBNORMAL = torch.finfo(torch.float32).tiny  # below it rounding is no longer relative to the number

EPS = float(np.finfo(np.float64).eps)

Array = npt.NDArray[np.float64]


class Computed(NamedTuple):
    """As what a gradient was computed, and where."""

    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Seen:
    """What has been seen of the gradients of a layer, each as ``computed`` by its parameter's name."""

    computed: dict[str, Computed]
    entries: list[Tensor]
    """The probed ones [k] of each."""
    sums: list[Tensor]
    """Every output's sums [o, s] over all inputs, with signs, of each; empty: not taken."""
    outputs: Tensor | None
    """Of which outputs they are to be compared; None: all."""
    is_whole: bool
    """Whether they are in any case: nothing may go on in other entries."""

    @property
    def tensors(self) -> list[Tensor]:
        """All numbers."""
        return [*self.entries, *self.sums]

    def each(self, change: Callable[[Tensor], Tensor]) -> Seen:
        """The same with a change to each of :attr:`tensors`, in their order."""
        return replace(self, entries=list(map(change, self.entries)), sums=list(map(change, self.sums)))


@dataclass(frozen=True)
class Measurement:
    """One parameter's probed entries [k]: the gradient, what the rows rebuild, and the sum of their absolute parts."""

    gradient: Array
    rebuilt: Array
    absolute: Array
    dtype: torch.dtype
    whole: Measurement | None = None  # the same of every output's sum over all inputs with random signs
    rounding: float = 0.0  # of the rows, where it is more than that of the dtype

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
    limit = max(tolerance(measured.dtype), measured.rounding) * abs(scale) * measured.size + SUBNORMAL
    explained = left <= limit and (measured.whole is None or _adds_up(measured.whole, scale))
    return Fit(scale, left / size if size else 0.0, explained, math.isfinite(left))


def _adds_up(sums: Measurement, scale: float) -> bool:
    """Whether every single sum is explained, up to the rounding of its own parts."""
    left = abs(sums.gradient - scale * sums.rebuilt)
    relative = max(tolerance(sums.dtype), sums.rounding)
    return bool((left <= relative * abs(scale) * sums.absolute + SUBNORMAL).all())


def _dot(a: Array, b: Array) -> float:
    return float(a @ b)


def tolerance(dtype: torch.dtype) -> float:
    """What rounding in a dtype leaves open, as a share of the absolute parts of a sum."""
    return TOLERANCE.get(dtype, 1e-2)
