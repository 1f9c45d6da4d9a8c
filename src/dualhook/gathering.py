"""Some columns of a matrix. Neighbours are read together: of every row some cache lines, not one for each column."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["columns_at", "in_runs", "runs"]

FEW = 8  # runs, up to which they are read one after the other


def in_runs(size: int, count: int, run: int, generator: torch.Generator) -> Tensor:
    """About ``count`` of the numbers below ``size``, at least one, in runs of ``run`` at random places, ascending."""
    starts = torch.randperm(max(1, -(-size // run)), generator=generator)[: max(1, count // run)] * run
    found = (starts[:, None] + torch.arange(run)).flatten()
    return found[found < size].sort().values


def columns_at(values: Tensor, index: Tensor) -> Tensor:
    """The columns of ``values`` [n, c] at ``index`` [k] as [n, k], perhaps without a copy."""
    found = list(runs(index.tolist()))
    if not 0 < len(found) <= FEW:
        return values.index_select(1, index.to(values.device))
    parts = [values[:, start:stop] for start, stop in found]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Where runs of consecutive numbers begin and end."""
    start = stop = numbers[0] if numbers else 0
    for number in numbers:
        if number != stop:
            yield start, stop
            start = number
        stop = number + 1
    if stop > start:
        yield start, stop
