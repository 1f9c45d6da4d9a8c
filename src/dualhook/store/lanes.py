"""The segments of a memory by the process that wrote them, side by side.

Every process that trains a model together with others writes its own rows. What a question sees are the steps that all
of them have on disk, in ascending order, and within a step the processes one after the other: pattern numbers count
that order, and do not change as more steps come.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dualhook.errors import StoreError
from dualhook.records import LayerSpec
from dualhook.store.checking import check_ledger, check_rows
from dualhook.store.eightbit import EightBitRows, with_eight_bits
from dualhook.store.keyfiles import KEY_FILES, PooledKeys
from dualhook.store.layout import UNREADABLE, key_file_name, open_tensors, tensor_names
from dualhook.store.ledger import LEDGER
from dualhook.store.sharing import KEY_ROW
from dualhook.store.sparse import SparseRows, with_sparse
from dualhook.store.streams import Stored

__all__ = ["Lanes", "Segment"]


@dataclass(frozen=True)
class Segment:
    """One committed file: its steps, and per layer its first pattern number and how many it holds."""

    path: Path
    header: Mapping[str, Any]
    left_out: frozenset[str] = frozenset()
    """Layers whose rows in it are damaged."""
    columns: frozenset[str] = frozenset()
    """Columns that were recorded with the rows of some layer."""

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
        if layer in self.left_out:
            return 0
        count = int(self.header["rows"].get(layer, {"count": 0})["count"])
        if not count or last_step is None or self.last_step <= last_step:
            return count
        if self.first_step > last_step:
            return 0
        steps = open_tensors(self.path).get_tensor(f"rows/{layer}/step")
        return int(torch.searchsorted(steps, last_step, right=True))

    def holding(self, uses: Sequence[LayerSpec]) -> Segment:
        """The same as far as the rows of some layers go, without what a header says of others."""
        own = {spec.name: rows for spec in uses if (rows := self.header["rows"].get(spec.name)) is not None}
        return replace(self, header={"steps": self.header["steps"], "rank": self.rank, "rows": own})

    def stored(self, spec: LayerSpec, *, deep: bool = False) -> Stored | None:
        """The layer's rows, memory-mapped; None if there are none. ``deep``: those that are not whole are gone through.

        Raises:
            StoreError: they are not what they have to be.
        """
        if not self.count(spec.name):
            return None
        file, prefix, files = open_tensors(self.path), f"rows/{spec.name}/", self.key_paths(spec.name)
        names = [name for name in tensor_names(file) if name.startswith(prefix)]
        own = self.header["rows"][spec.name]
        places = {name.removeprefix(prefix): name for name in names}
        sparse, eight_bit = own.get("sparse", {}), own.get("eight_bit", {})
        holder = own.get("key_of")
        if files:
            places.setdefault(KEY_ROW, f"rows/{holder or spec.name}/{KEY_ROW}")
        elif holder is not None:
            fields = SparseRows.FIELDS if "key" in sparse else EightBitRows.FIELDS if "key" in eight_bit else ()
            parts = [f"key/{field}" for field in fields] or ["key"]
            places |= {part: f"rows/{holder}/{part}" for part in parts}
        try:
            found = file.get_tensors(list(places.values()))
            tensors = with_sparse({part: found[name] for part, name in places.items()}, sparse)
            tensors = with_eight_bits(tensors, eight_bit)
            if files:
                tensors["key"] = cast(Tensor, PooledKeys(files, holder or spec.name))
            check_rows(spec, tensors, own["count"], self.header["steps"])
            for values in tensors.values() if deep else ():
                if isinstance(values, (SparseRows, EightBitRows)):
                    values.check()
        except UNREADABLE as error:
            raise StoreError(f"{self.path} has rows of {spec.name!r} that make no sense: {error}") from error
        return Stored(spec, tensors)

    def key_paths(self, layer: str) -> list[tuple[Path, int]]:
        """The files that a layer's keys are in, with how many rows they have of it; none: they are in the segment."""
        files = self.header["rows"][layer].get(KEY_FILES, ())
        return [(self.path.parent / key_file_name(number, self.rank), count) for number, count in files]

    @property
    def key_files(self) -> set[Path]:
        """All of these of the layers that are not left out."""
        return {
            path for layer in self.header["rows"] if layer not in self.left_out for path, _ in self.key_paths(layer)
        }

    def tensors(self, layer: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of a layer's tensors by name."""
        file = open_tensors(self.path)
        return {name: file.get_tensor(f"rows/{layer}/{name}") for name in names}

    def ledger(self) -> dict[str, Tensor]:
        """The ledger's tensors by name.

        Raises:
            StoreError: they are not what they have to be.
        """
        file = open_tensors(self.path)
        try:
            tensors = file.get_tensors(LEDGER)
            check_ledger(tensors, self.header)
        except UNREADABLE as error:
            raise StoreError(f"{self.path} has a ledger that makes no sense: {error}") from error
        return tensors


class Lanes:
    """The segments of several processes, side by side."""

    def __init__(self, segments: Sequence[Segment], ranks: int, first_step: int) -> None:
        self._lanes = [[segment for segment in segments if segment.rank == rank] for rank in range(ranks)]
        self.last_step = min(max((segment.last_step for segment in lane), default=first_step) for lane in self._lanes)
        """The newest step that every process has on disk."""
        self._begins = [[segment.first_step for segment in lane] for lane in self._lanes]
        self._ends = [[segment.last_step for segment in lane] for lane in self._lanes]

    def spans(self, first_step: int, last_step: int) -> Iterator[tuple[int, int, list[Segment]]]:
        """Cuts steps where some segment ends: first and last step, and the segments that hold them, by process."""
        last_step = min(last_step, self.last_step)
        ends = sorted({end for own in self._ends for end in own if first_step <= end < last_step})
        for before, end in pairwise([first_step - 1, *ends, last_step]):
            there = [segment for number in range(len(self._lanes)) for segment in self._within(number, before, end)]
            if there:
                yield before + 1, end, there

    def _within(self, number: int, before: int, end: int) -> Sequence[Segment]:
        """The segments of one process that hold steps after ``before`` up to ``end``."""
        start, stop = bisect_right(self._ends[number], before), bisect_right(self._begins[number], end)
        return self._lanes[number][start:stop]
