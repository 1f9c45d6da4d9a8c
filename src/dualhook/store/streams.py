"""From stored rows to a layer's patterns: maps are taken apart, and the uses of a tied parameter come together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dualhook.maps import map_of
from dualhook.records import FIELDS, OPTIONAL, LayerSpec, Rows

__all__ = ["USE", "Stored", "patterns_of", "rows_of"]

USE = "use"  # the column that tells the uses of one weight apart, by their numbers
UNFOLDED_BYTES = 2**26  # of the keys of a map that are taken apart at a time


@dataclass(frozen=True)
class Stored:
    """One use's rows in one segment, memory-mapped; steps ascend."""

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
        return map_of(self.spec).counts(self.rows(0, len(self.step))) if "extent" in self.tensors else None

    def patterns(self, stop: int) -> int:
        """How many patterns the first ``stop`` stored rows make."""
        return stop if self.counts is None else int(self.counts[:stop].sum())

    def rows(self, start: int, stop: int) -> Rows:
        """Stored rows without a copy."""
        part = {name: values[start:stop] for name, values in self.tensors.items()}
        return rows_of(part)

    def between(self, first_step: int, last_step: int) -> tuple[int, int]:
        """Where the rows of some steps lie."""
        begin = int(torch.searchsorted(self.step, first_step))
        return begin, int(torch.searchsorted(self.step, last_step, right=True))

    def blocks(self, start: int, stop: int, block_rows: int) -> Iterator[Rows]:
        """The patterns of stored rows in blocks, numbered from 0."""
        most = min(block_rows, max(1, UNFOLDED_BYTES // (4 * self.spec.in_features // self.spec.slots)))
        own, most = map_of(self.spec), block_rows if self.spec.kind == "linear" else most
        for rows in own.patterns(self.rows(start, stop), most):
            for at in range(0, len(rows), block_rows):
                yield rows.part(at, min(len(rows), at + block_rows))


def patterns_of(
    asked: LayerSpec, uses: Sequence[Stored], first_step: int, last_step: int, block_rows: int, number: int
) -> Iterator[Rows]:
    """A segment's patterns as the ``asked`` use sees them, oldest first; the segment's first has the ``number``."""
    if len(uses) == 1 and uses[0].spec == asked:
        start, stop = uses[0].between(first_step, last_step)
        number += uses[0].patterns(start)
        yield from _numbered(uses[0].blocks(start, stop, block_rows), number)
        return
    number += sum(use.patterns(use.between(first_step, last_step)[0]) for use in uses)
    steps = torch.unique(torch.cat([use.step[slice(*use.between(first_step, last_step))] for use in uses]))
    for step in steps.tolist():
        for use in uses:
            for rows in use.blocks(*use.between(step, step), block_rows):
                seen = map_of(use.spec).seen_from(asked, rows)
                told_apart = {USE: torch.full((len(rows),), use.number), **rows.columns}
                yield replace(seen, first=number, columns=told_apart)
                number += len(rows)


def rows_of(tensors: Mapping[str, Tensor], first: int = 0) -> Rows:
    """Rows from their tensors by name."""
    fields: dict[str, Any] = {name: tensors[name] for name in FIELDS}
    fields |= {name: tensors[name] for name in OPTIONAL if name in tensors}
    columns = {name.removeprefix("column/"): tensors[name] for name in tensors if name.startswith("column/")}
    return Rows(columns=columns, first=first, **fields)


def _numbered(blocks: Iterator[Rows], number: int) -> Iterator[Rows]:
    for rows in blocks:
        yield replace(rows, first=number)
        number += len(rows)
