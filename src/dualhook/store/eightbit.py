"""Rows in 8 bits: whole steps of a scale of their own, up or down to which every number is rounded by chance.

A number between two steps becomes the nearer one the more often, in proportion: on average it is itself. Zeros stay
zeros. The chances come from a generator of their own, which training does not see.

Letters: ``n`` row, ``w`` number of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
import xxhash
from torch import Tensor

__all__ = [
    "EIGHT_BIT_DTYPES",
    "EIGHT_BIT_FIELDS",
    "EightBitRows",
    "eight_bit_bytes",
    "in_eight_bits",
    "scale_of",
    "with_eight_bits",
]

LARGEST = 127  # steps
AT_ONCE = 2**17  # numbers: as many as stay in a processor's cache
EIGHT_BIT_FIELDS = ("key", "output_grad")
"""The tensors of a layer's rows that may be kept so."""
EIGHT_BIT_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
"""What they may have been before, by the name that a header has for it."""


@dataclass(frozen=True)
class EightBitRows:
    """Rows [n, w]; they read like a tensor of ``dtype``, of which each cut is made whole in fresh memory."""

    FIELDS: ClassVar[tuple[str, ...]] = ("code", "scale")

    code: Tensor
    """How many steps each number is [n, w] int8."""
    scale: Tensor
    """What a step is in each row [n], float32 or float64; 0 in a row of zeros."""
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Rows, and numbers of each."""
        return self.code.shape

    def dim(self) -> int:
        """Dimensions."""
        return 2

    def is_floating_point(self) -> bool:
        """Whether the numbers are."""
        return True

    def __len__(self) -> int:
        return len(self.code)

    def __getitem__(self, rows: slice) -> Tensor:
        return self._made(self.code[rows], self.scale[rows])

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Some rows ``index`` [k], in that order; ``dim`` is 0."""
        return self._made(self.code.index_select(dim, index), self.scale.index_select(dim, index))

    def check(self) -> None:
        """Look at every code.

        Raises:
            ValueError: one that no number is rounded to.
        """
        if len(self) and int(self.code.min()) < -LARGEST:
            raise ValueError(f"codes below {-LARGEST}")

    def _made(self, code: Tensor, scale: Tensor) -> Tensor:
        return code.to(scale.dtype).mul_(scale[:, None]).to(self.dtype)


def eight_bit_bytes(width: int, dtype: torch.dtype) -> int:
    """What a row of so many numbers takes that are asked for in 8 bits: with its scale, or whole if that is no more."""
    return min(width * dtype.itemsize, width + _computed_in(dtype).itemsize)


def with_eight_bits(tensors: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """A layer's tensors by name, those of some ``dtypes`` that are in 8 bits in one each, which reads like one.

    Raises:
        ValueError: what there is does not make such rows.
    """
    found = dict(tensors)
    for name, before in dtypes.items():
        code, scale = (found.pop(f"{name}/{field}") for field in EightBitRows.FIELDS)
        dtype = EIGHT_BIT_DTYPES[before]
        is_so = (
            code.dtype == torch.int8
            and scale.dtype == _computed_in(dtype)
            and (code.dim(), scale.dim()) == (2, 1)
            and len(code) == len(scale)
            and bool(((scale >= 0) & scale.isfinite()).all())
        )
        if not is_so:
            raise ValueError(f"{name!r} is no rows in 8 bits")
        found[name] = cast(Tensor, EightBitRows(code, scale, dtype))
    return found


def in_eight_bits(values: Tensor, seed: str, known: Tensor | None = None) -> EightBitRows | None:
    """Rows [n, w] in 8 bits, rounded by ``seed``; None: they are to stay whole, since not all numbers are finite.

    Or since they are so narrow that it would be no less. ``known`` [n] are the scales of rows that have been in 8 bits
    before, and are not rounded again; NaN of others.
    """
    if values.dim() != 2 or not len(values) or eight_bit_bytes(values.shape[1], values.dtype) == values[0].nbytes:
        return None
    count, width = values.shape
    code, scale = torch.empty((count, width), dtype=torch.int8), torch.empty(count, dtype=_computed_in(values.dtype))
    chances = np.random.Generator(np.random.SFC64(xxhash.xxh3_64_intdigest(seed.encode())))
    for begin in range(0, count, step := max(1, AT_ONCE // width)):
        part = slice(begin, begin + step)
        own = values[part].to(scale.dtype).numpy()
        scales = _scales(own)
        if scales is None:
            return None
        chance = chances.random(own.shape, dtype=np.float32)
        if known is not None:
            before = known[part].numpy()
            scales = np.where(np.isnan(before), scales, before)
            chance[~np.isnan(before)] = 0.5  # to the step that they are, but for the rounding of its product
        steps = own / np.where(scales, scales, 1)[:, None]
        rounded = np.floor(steps)
        rounded += chance < steps - rounded
        code.numpy()[part] = np.clip(rounded, -LARGEST, LARGEST, out=rounded)
        scale.numpy()[part] = scales
    return EightBitRows(code, scale, values.dtype)


def scale_of(name: str) -> str:
    """The name of the tensor that holds the scales of one in 8 bits."""
    return f"{name}/scale"


def _scales(values: np.ndarray) -> np.ndarray | None:
    """Of rows [n, w] a step each, as small as the row's largest number allows; None: some number is not finite."""
    largest, limits = np.abs(values).max(1), np.finfo(values.dtype)
    if not np.isfinite(largest).all():
        return None
    # neither below what can be divided by nor so large that the largest code is no number
    scales = np.clip(largest / LARGEST, limits.tiny, np.nextafter(limits.max / LARGEST, 0, dtype=values.dtype))
    return np.where(largest, scales, 0)


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
