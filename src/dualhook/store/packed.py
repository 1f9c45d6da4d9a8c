"""Packed output gradients in a segment: what is kept of every row, and the weights of every step that has such rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dualhook.packing import FORMS, Largest, Packed, Scaled, Softmax
from dualhook.store.direct import empty_in_blocks

__all__ = ["PER_STEP", "WEIGHT_STEP", "StepWeights", "form_of", "packed_rows", "packed_width", "unpacked"]

WEIGHT, WEIGHT_STEP = PER_STEP = ("weight", "weight_step")
"""The tensors of a layer that have no row for every pattern: weights [step, o, i] and their steps, ascending."""


class StepWeights:
    """The weights that rows of a softmax are computed with, one for each step; memory is kept and filled again."""

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._steps: list[int] = []
        self._is_pending = False

    def take(self, weight: Tensor) -> None:
        """Copy the weight that the rows of the coming step are made with, if this has not been done."""
        if self._is_pending:
            return
        self._is_pending, count = True, len(self._steps)
        if self._values is None or len(self._values) == count:
            grown = empty_in_blocks((count + 1 + count // 2, *weight.shape), weight.dtype)
            if self._values is not None:
                grown[:count] = self._values
            self._values = grown
        self._values[count] = weight

    def commit(self, step: int) -> None:
        """The coming step is ``step``."""
        if self._is_pending and self._steps[-1:] != [step]:  # of one step all rows are made with the same
            self._steps.append(step)
        self._is_pending = False

    def rewind(self) -> None:
        """Forget that of the coming step."""
        self._is_pending = False

    def withdraw(self, step: int) -> None:
        """Forget those after a step."""
        self._steps, self._is_pending = [own for own in self._steps if own <= step], False

    def reset(self) -> None:
        """Forget all."""
        self._steps, self._is_pending = [], False

    def of(self, step: int | None) -> Tensor:
        """The weight of a step; None: of the coming one."""
        assert self._values is not None
        return self._values[len(self._steps) if step is None else self._steps.index(step)]

    @property
    def nbytes(self) -> int:
        """Bytes of the weights of steps that have been."""
        return len(self._steps) * self._values[0].nbytes if self._values is not None else 0

    def tensors(self) -> dict[str, Tensor]:
        """What is to be written."""
        if self._values is None or not self._steps:
            return {}
        return {WEIGHT: self._values[: len(self._steps)], WEIGHT_STEP: torch.tensor(self._steps)}


def form_of(names: Iterable[str]) -> str | None:
    """How the output gradients of rows with tensors of these names are packed; None: they are not."""
    return next((form for form in FORMS if any(name.startswith(f"{form}/") for name in names)), None)


def packed_width(tensors: Mapping[str, Tensor], outputs: int) -> int | None:
    """How many numbers unpacked output gradients of a stored row are, in a layer of so many ``outputs``; None: none."""
    form = form_of(tensors)
    return tensors[f"{Scaled.name}/value"].shape[1] if form == Scaled.name else outputs if form else None


def packed_rows(tensors: Mapping[str, Tensor], start: int, stop: int, width: int) -> Packed:
    """What stands for the output gradients [n, o] of some stored rows, those computed are of one step."""
    form = FORMS[form_of(tensors) or ""]
    fields: dict[str, Any] = {field: tensors[f"{form.name}/{field}"][start:stop] for field in form.fields}
    if form is Largest:
        return Largest(**fields, width=width)
    if form is Scaled:
        return Scaled(**fields)
    place = int(torch.searchsorted(tensors[WEIGHT_STEP], tensors["step"][start]))
    return Softmax(**fields, weight=tensors[WEIGHT][place])


def unpacked(tensors: Mapping[str, Tensor], key: Tensor, start: int, stop: int, width: int) -> Tensor:
    """The output gradients [n, o] of some stored rows, ``start`` to ``stop``, with their keys [n, i]."""
    if form_of(tensors) != Softmax.name:
        return packed_rows(tensors, start, stop, width).dense(key)
    counts = torch.unique_consecutive(tensors["step"][start:stop], return_counts=True)[1].tolist()
    parts, at = [], start
    for count in counts:
        parts.append(packed_rows(tensors, at, at + count, width).dense(key[at - start : at - start + count]))
        at += count
    return torch.cat(parts) if parts else key.new_zeros(0, width)
