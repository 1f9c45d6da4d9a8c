"""A span of steps in the segments that hold them: what a pass reads as one piece, wherever it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from dualhook.gathering import runs
from dualhook.maps import map_of
from dualhook.records import LayerSpec, Rows
from dualhook.store.lanes import Segment
from dualhook.store.streams import Stored, patterns_of

__all__ = ["Span", "stored_in"]

AT_ONCE = 4096  # patterns that are read to choose some of them


@dataclass(frozen=True)
class Span:
    """The patterns of a layer, ``asked`` and the other ``uses`` of its weight, of some steps.

    It can be pickled, and is small: files are opened where it is read.
    """

    asked: LayerSpec
    uses: Sequence[LayerSpec]
    segments: Sequence[Segment]
    first_step: int
    last_step: int
    first: int
    """The number of the first pattern."""

    @cached_property
    def count(self) -> int:
        """How many patterns there are."""
        return sum(self._count(segment) for segment in self.segments)

    def _count(self, segment: Segment) -> int:
        whole = self.first_step <= segment.first_step and segment.last_step <= self.last_step
        if whole and len(self.uses) == 1 and not map_of(self.asked).stores_maps:
            return segment.count(self.asked.name)
        found = 0
        for stored in stored_in(segment, self.uses):
            begin, end = stored.between(self.first_step, self.last_step)
            found += stored.patterns(end) - stored.patterns(begin)
        return found

    def blocks(self, block_rows: int) -> Iterator[Rows]:
        """The patterns, oldest first, at most ``block_rows`` at a time."""
        stored = [one for segment in self.segments for one in stored_in(segment, self.uses)]
        if stored:
            yield from patterns_of(self.asked, stored, self.first_step, self.last_step, block_rows, self.first)

    def at(self, places: Tensor) -> Rows:
        """Some of the patterns, by their ``places`` [k] among these, ascending; they keep no pattern numbers.

        Where a stored row is a pattern, no others are read.
        """
        stored = [one for segment in self.segments for one in stored_in(segment, self.uses)]
        begin, parts = 0, list[Rows]()
        if len(stored) == 1 and stored[0].spec == self.asked and stored[0].counts is None:
            begin, _ = stored[0].between(self.first_step, self.last_step)
            for start, stop in runs(places.tolist()):
                parts += stored[0].blocks(begin + start, begin + stop, stop - start)
        else:
            for rows in self.blocks(AT_ONCE):
                inside = places[(places >= begin) & (places < begin + len(rows))]
                parts += [rows.at(inside - begin)] if len(inside) else []
                begin += len(rows)
        return replace(parts[0].joined(*parts[1:]), first=0)


def stored_in(segment: Segment, uses: Sequence[LayerSpec]) -> list[Stored]:
    """The rows of some uses in a segment."""
    found = ((number, segment.stored(spec)) for number, spec in enumerate(uses))
    return [replace(stored, number=number) for number, stored in found if stored is not None]
