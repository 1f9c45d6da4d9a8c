"""The segments of a memory by the process that wrote them, and the rows of all processes as one run.

Every process that trains a model together with others writes its own rows. What a question sees are the steps that all
of them have on disk, in ascending order, and within a step the processes one after the other: pattern numbers count
that order, and do not change as more steps come.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualhook.records import FIELDS, LayerSpec, Rows
from dualhook.store.layout import open_tensors, tensor_names
from dualhook.store.streams import Stored

__all__ = ["Lanes", "Segment", "absent"]


@dataclass(frozen=True)
class Segment:
    """One committed file: its steps, and per layer its first pattern number and how many it holds."""

    path: Path
    header: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """The process that wrote it."""
        return int(self.header.get("rank", 0))

    @property
    def first_step(self) -> int:
        """The oldest step in the segment."""
        return int(self.header["steps"][0])

    @property
    def last_step(self) -> int:
        """The newest step in the segment."""
        return int(self.header["steps"][1])

    def count(self, layer: str, last_step: int | None = None) -> int:
        """How many of the layer's patterns the segment holds, up to ``last_step``."""
        count = int(self.header["rows"].get(layer, {"count": 0})["count"])
        if not count or last_step is None or self.last_step <= last_step:
            return count
        if self.first_step > last_step:
            return 0
        steps = open_tensors(self.path).get_tensor(f"rows/{layer}/step")
        return int(torch.searchsorted(steps, last_step, right=True))

    def stored(self, spec: LayerSpec) -> Stored | None:
        """The layer's rows, memory-mapped; None if there are none."""
        if not self.count(spec.name):
            return None
        file, prefix = open_tensors(self.path), f"rows/{spec.name}/"
        names = [name for name in tensor_names(file) if name.startswith(prefix)]
        return Stored(spec, {name.removeprefix(prefix): file.get_tensor(name) for name in names})


class Lanes:
    """The segments of several processes, side by side."""

    def __init__(self, segments: Sequence[Segment], ranks: int, first_step: int) -> None:
        self._lanes = [[segment for segment in segments if segment.rank == rank] for rank in range(ranks)]
        self.last_step = min(max((segment.last_step for segment in lane), default=first_step) for lane in self._lanes)
        """The newest step that every process has on disk."""

    def blocks(self, spec: LayerSpec, first_step: int, last_step: int) -> Iterator[Rows]:
        """The patterns of a linear layer in these steps, a few segments at a time."""
        last_step = min(last_step, self.last_step)
        ends = {segment.last_step for lane in self._lanes for segment in lane}
        edges = [first_step - 1, *sorted(end for end in ends if first_step <= end < last_step), last_step]
        first = sum(segment.count(spec.name, first_step - 1) for lane in self._lanes for segment in lane)
        for before, end in pairwise(edges):
            found = (segment.stored(spec) for lane in self._lanes for segment in lane)
            cut = (stored.rows(*stored.between(before + 1, end)) for stored in found if stored is not None)
            parts = [part for part in cut if len(part)]
            if parts:
                merged = _merged(parts, first)
                first += len(merged)
                yield merged


def absent(like: Tensor) -> float:
    """What stands for "no value" in a column: NaN, or -1 among whole numbers."""
    return math.nan if like.is_floating_point() else -1


def _merged(parts: Sequence[Rows], first: int) -> Rows:
    """Rows whose steps rise in every part, as rows whose steps rise; within a step in the order of the parts."""
    runs = []
    for number, part in enumerate(parts):
        steps, counts = torch.unique_consecutive(part.step, return_counts=True)
        stops = counts.cumsum(0).tolist()
        starts = [0, *stops[:-1]]
        runs += [(step, number, slice(*cut)) for step, *cut in zip(steps.tolist(), starts, stops, strict=True)]
    runs.sort(key=lambda run: run[:2])
    columns: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for part in parts for name in part.columns):
        like = next(part.columns[name] for part in parts if name in part.columns)
        own = [part.columns.get(name, like.new_full((len(part),), absent(like))) for part in parts]
        columns[name] = torch.cat([own[number][cut] for _, number, cut in runs])
    key, output_grad, step, sample, position = (
        torch.cat([getattr(parts[number], name)[cut] for _, number, cut in runs]) for name in FIELDS
    )
    return Rows(key, output_grad, step, sample, position, columns, first)
