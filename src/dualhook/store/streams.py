"""From stored rows to a layer's patterns: maps are taken apart, uses of a weight and processes come together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dualhook.maps import map_of
from dualhook.records import FIELDS, OPTIONAL, LayerSpec, Rows
from dualhook.store.eightbit import EightBitRows
from dualhook.store.keyfiles import PooledKeys
from dualhook.store.packed import PER_STEP, form_of, packed_rows, packed_width, unpacked
from dualhook.store.sharing import KEY_ROW
from dualhook.store.sparse import SparseRows

__all__ = ["USE", "Stored", "patterns_of", "rows_of"]

PLAIN = (*FIELDS, *OPTIONAL)  # what stands in rows as it is stored
USE = "use"  # the column that tells the uses of one weight apart, by their numbers
UNFOLDED_BYTES = 2**26  # of the keys of a map that are taken apart at a time
FILLED_BYTES = 2**22  # of rows that are made whole at a time: they are still in the cache when they are met


@dataclass(frozen=True)
class Stored:
    """One use's rows in one segment, memory-mapped, some as what reads like a tensor; steps ascend."""

    spec: LayerSpec
    tensors: Mapping[str, Tensor]
    number: int = 0
    """Which use of its weight it is, of several."""

    @property
    def step(self) -> Tensor:
        """The step of every stored row [n]."""
        return self.tensors["step"]

    @cached_property
    def counts(self) -> Tensor | None:
        """How many patterns each stored row makes [n]; None: one each."""
        if "extent" not in self.tensors:
            return None
        return map_of(self.spec).counts(rows_of({n: v for n, v in self.tensors.items() if n not in PER_STEP}))

    def patterns(self, stop: int) -> int:
        """How many patterns the first ``stop`` stored rows make."""
        return stop if self.counts is None else int(self.counts[:stop].sum())

    def rows(self, start: int, stop: int) -> Rows:
        """Stored rows; a copy is made of keys that are chosen from others, and of what is not whole."""
        part = self._part(start, stop)
        if form_of(self.tensors) is not None:
            part["output_grad"] = unpacked(self.tensors, part["key"], start, stop, self.spec.out_features)
        return rows_of(part)

    def as_kept(self, start: int, stop: int) -> Rows:
        """Stored rows of one step, those that are packed as they are."""
        part = self._part(start, stop)
        rows = replace(rows_of(part), fixed_keys=isinstance(self.tensors["key"], PooledKeys))
        if form_of(self.tensors) is None or start == stop:
            return rows
        return replace(rows, packed=packed_rows(self.tensors, start, stop, self.spec.out_features))

    def _part(self, start: int, stop: int) -> dict[str, Tensor]:
        own = {name: values for name, values in self.tensors.items() if name in PLAIN or name.startswith("column/")}
        if KEY_ROW not in self.tensors:
            return {name: values[start:stop] for name, values in own.items()}
        key = own.pop("key").index_select(0, self.tensors[KEY_ROW][start:stop])
        return {"key": key, **{name: values[start:stop] for name, values in own.items()}}

    def scales(self, start: int, stop: int) -> dict[str, Tensor]:
        """The scales of stored rows, by the tensors that are in 8 bits."""
        found = {name: values.scale for name, values in self.tensors.items() if isinstance(values, EightBitRows)}
        rows = {"key": self.tensors[KEY_ROW][start:stop].long()} if KEY_ROW in self.tensors else {}
        return {name: scale[rows.get(name, slice(start, stop))] for name, scale in found.items()}

    def between(self, first_step: int, last_step: int) -> tuple[int, int]:
        """Where the rows of some steps lie."""
        begin = int(torch.searchsorted(self.step, first_step))
        return begin, int(torch.searchsorted(self.step, last_step, right=True))

    def blocks(self, start: int, stop: int, block_rows: int) -> Iterator[Rows]:
        """The patterns of stored rows in blocks, numbered from 0."""
        most = min(block_rows, max(1, UNFOLDED_BYTES // (4 * self.spec.in_features // self.spec.slots)))
        own, most = map_of(self.spec), block_rows if self.spec.kind == "linear" else most
        packed = packed_width(self.tensors, self.spec.out_features)
        made = [rows for rows in self.tensors.values() if isinstance(rows, (SparseRows, EightBitRows, PooledKeys))]
        at_once = stop - start
        if packed is not None:
            at_once = min(block_rows, max(1, UNFOLDED_BYTES // (4 * packed)))
        if made:
            widest = max(rows.shape[1] * rows.dtype.itemsize for rows in made)
            at_once = min(block_rows, at_once, max(1, FILLED_BYTES // widest))
        for first in range(start, stop, max(1, at_once)):
            for rows in own.patterns(self.rows(first, min(stop, first + at_once)), most):
                for at in range(0, len(rows), block_rows):
                    yield rows.part(at, min(len(rows), at + block_rows))


def patterns_of(
    asked: LayerSpec, stored: Sequence[Stored], first_step: int, last_step: int, block_rows: int, number: int
) -> Iterator[Rows]:
    """The patterns of some steps as the ``asked`` use sees them, oldest first; the first one has the ``number``.

    Of a step first come those of the first of ``stored``, which are several where a weight has several uses, or several
    processes have recorded.
    """
    are_alike = all(use.spec == asked for use in stored)
    if len(stored) == 1 and are_alike:
        blocks = stored[0].blocks(*stored[0].between(first_step, last_step), block_rows)
    else:
        blocks = _together(_by_step(asked, stored, first_step, last_step, block_rows, are_alike), block_rows)
    for rows in blocks:
        yield replace(rows, first=number)
        number += len(rows)


def _by_step(
    asked: LayerSpec, stored: Sequence[Stored], first_step: int, last_step: int, block_rows: int, are_alike: bool
) -> Iterator[Rows]:
    steps = torch.unique(torch.cat([use.step[slice(*use.between(first_step, last_step))] for use in stored]))
    for step in steps.tolist():
        for use in stored:
            for rows in use.blocks(*use.between(step, step), block_rows):
                if are_alike:
                    yield rows
                else:
                    told_apart = {USE: torch.full((len(rows),), use.number), **rows.columns}
                    yield replace(map_of(use.spec).seen_from(asked, rows), columns=told_apart)


def _together(blocks: Iterable[Rows], block_rows: int) -> Iterator[Rows]:
    """Small blocks as blocks of up to ``block_rows``."""
    waiting: list[Rows] = []
    count = 0
    for rows in blocks:
        if waiting and count + len(rows) > block_rows:
            yield waiting[0].joined(*waiting[1:])
            waiting, count = [], 0
        waiting.append(rows)
        count += len(rows)
    if waiting:
        yield waiting[0].joined(*waiting[1:])


def rows_of(tensors: Mapping[str, Tensor], first: int = 0) -> Rows:
    """Rows from their tensors by name."""
    fields: dict[str, Any] = {name: tensors[name] for name in FIELDS}
    fields |= {name: tensors[name] for name in OPTIONAL if name in tensors}
    columns = {name.removeprefix("column/"): tensors[name] for name in tensors if name.startswith("column/")}
    return Rows(columns=columns, first=first, **fields)
