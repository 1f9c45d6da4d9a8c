"""Reads a memory: an index of the segments, then memory-mapped blocks of rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dualhook.errors import StoreError
from dualhook.maps import map_of
from dualhook.records import INEXACT, VALUE, FactorVectors, History, LayerSpec, OriginPart, Rows
from dualhook.store.checking import check_origin
from dualhook.store.eightbit import EightBitRows
from dualhook.store.inspection import inspected
from dualhook.store.lanes import Lanes, Segment
from dualhook.store.layout import Layout, Manifest, open_tensors, read_header, tensor_names, write_tensors
from dualhook.store.ledger import fit_vectors, unpack
from dualhook.store.spans import Span, stored_in
from dualhook.store.streams import USE

__all__ = ["Store"]


class Store:
    """A memory on disk, as it was when it was opened; a :class:`~dualhook.records.RowSource`.

    ``on_damage="skip"`` looks at every bit, and goes on without the damaged files and rows.

    Raises:
        StoreError: no memory, or a damaged one.
    """

    def __init__(self, root: Path, *, on_damage: Literal["raise", "skip"] = "raise") -> None:
        self.manifest = Manifest.read(Layout(root))
        found = inspected(Layout(root), self.manifest, deep=on_damage == "skip")
        while found.damage:  # or segments have been folded away, or made into others, while they were looked at
            before, self.manifest = found, Manifest.read(Layout(root))
            found = inspected(Layout(root), self.manifest, deep=on_damage == "skip")
            if found.damage == before.damage:
                break
        self.layout = Layout(root, self.manifest.generation)
        if found.damage and (on_damage == "raise" or not found.origins):
            raise StoreError(
                f"{root} is damaged: {'; '.join(map(str, found.damage))}. Bring the files back from a copy"
                + (", or open the rest with dualhook.load(path, on_damage='skip')" if on_damage == "raise" else "")
            )
        self.damage = found.damage
        """What is left out."""
        self._damaged_paths = found.damaged_paths
        self._origin_headers = found.origins
        # what a moved origin has swallowed may still lie there, if the recording was cut off in that moment
        folded = max((header["folded"] for header in self._origin_headers.values()), default=0)
        self.segments = found.segments
        self._key_headers = found.keys
        self.first_step = folded
        self._counted: dict[str, list[int]] = {}
        self._lanes = Lanes(self.segments, self.manifest.ranks, folded)
        self.on_rows: Callable[[int], None] | None = None
        """Called with the number of patterns of every piece that has been worked on."""

    @cached_property
    def histories(self) -> dict[str, History]:
        """The ledger of every recorded parameter, from its origin on."""
        parts = [(segment.ledger(), segment.header) for segment in self.segments]
        begins = self.origin_steps
        found = unpack(parts)
        lost = [name for name, history in found.items() if name not in begins and len(history)]
        if lost and not self.damage:
            raise StoreError(f"{self.layout.root} is damaged: no file in origin/ holds {lost[0]!r}")
        last = self.last_step  # beyond it some process may have the rows, but not all
        return {
            name: history.where((history.step > begins[name]) & (history.step <= last))
            for name, history in found.items()
            if name in begins
        }

    @property
    def note_of_loss(self) -> str:
        """One line on what is damaged, and what compacting has dropped; empty where nothing is."""
        dropped = ", ".join(f"{count:,} of {layer}" for layer, count in self.manifest.dropped.items())
        damaged = "; ".join(map(str, self.damage))
        notes = (("dropped by compacting: rows ", dropped), ("left out, since damaged: ", damaged))
        return "; ".join(title + note for title, note in notes if note)

    @cached_property
    def origin_steps(self) -> dict[str, int]:
        """After which step each parameter's recording begins."""
        return {name: self._origin_headers[path]["step"] for name, path in self._origin_files.items()}

    @cached_property
    def _origin_files(self) -> dict[str, Path]:
        """Which file holds each parameter's origin: the newest that names it."""
        return {name: path for path, header in self._origin_headers.items() for name in header["parameters"]}

    def _origin_file(self, parameter: str) -> Path:
        if parameter not in self._origin_files:
            raise StoreError(f"{self.layout.root} is damaged: no file in origin/ holds {parameter!r}")
        return self._origin_files[parameter]

    def fitted(self, parameter: str) -> Iterator[tuple[int, FactorVectors]]:
        """The vectors of a parameter's fitted steps with their step, newest first."""
        begins = self.origin_steps[parameter]
        for segment in reversed(self.segments):
            found = fit_vectors(open_tensors(segment.path), parameter)
            yield from ((step, vectors) for step, vectors in reversed(found) if step > begins)

    @cached_property
    def _snapshot_headers(self) -> dict[Path, dict[str, Any]]:
        paths = [path for path in self.layout.snapshots() if path not in self._damaged_paths]
        return {path: read_header(path, open_tensors(path)) for path in paths}

    def snapshots(self, parameter: str) -> dict[int, Path]:
        """The files that hold snapshots of a parameter's optimiser state, by their step, oldest first."""
        headers = self._snapshot_headers.items()
        return {int(header["step"]): path for path, header in headers if parameter in header["parameters"]}

    def snapshot(self, parameter: str, step: int) -> dict[str, Tensor]:
        """Tensors of a parameter's optimiser state as they were after ``step``."""
        path = self.snapshots(parameter)[step]
        names, file = self._snapshot_headers[path]["parameters"][parameter], open_tensors(path)
        return {part: file.get_tensor(f"{parameter}//{part}") for part in names}

    def inexact_steps(self, parameter: str, last_step: int) -> int:
        """How many steps of a parameter up to ``last_step`` are marked inexact, folded ones and lost ones included."""
        path = self._origin_files.get(parameter)
        found = 0 if path is None else int(self._origin_headers[path]["inexact"].get(parameter, 0))
        history = self.histories.get(parameter)
        found += self._lost_steps(parameter, last_step)
        return found if history is None else found + int((history.marked(INEXACT) & (history.step <= last_step)).sum())

    def _lost_steps(self, parameter: str, last_step: int) -> int:
        """How many steps have rows or ledger entries of a parameter in damaged files."""
        own = {spec.name for spec in self.manifest.layers if parameter in spec.parameters}
        found = reached = 0
        for first, last in sorted(o.steps for o in self.damage if o.steps and (not o.layers or own & o.layers)):
            first, last = max(first, reached + 1), min(last, last_step)
            found, reached = found + max(0, last - first + 1), max(reached, last)
        return found

    def superseded_by(self, parameters: Container[str]) -> list[Path]:
        """The origin files that hold nothing but these parameters: a newer origin of them takes their place."""
        return [
            path for path, header in self._origin_headers.items() if all(n in parameters for n in header["parameters"])
        ]

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The layers that have been trained, in the model's order; each weight once."""
        trained = {spec.weight: spec for spec in reversed(self.trained_uses)}
        trained |= {spec.weight: spec for spec in reversed(self.trained_uses) if spec.slots == 1}
        return tuple(spec for spec in self.trained_uses if trained[spec.weight] is spec)

    @cached_property
    def trained_uses(self) -> tuple[LayerSpec, ...]:
        """The same with every use of a weight that several layers share, if it was seen."""
        trained = [spec for spec in self.manifest.layers if any(p in self.origin_steps for p in spec.parameters)]
        seen = {spec.name for spec in trained if any(segment.count(spec.name) for segment in self.segments)}
        told = {spec.weight for spec in trained if spec.name in seen}
        return tuple(spec for spec in trained if spec.name in seen or spec.weight not in told)

    @property
    def last_step(self) -> int:
        """The newest recorded step; where several processes have recorded, the newest that all have on disk."""
        return self._lanes.last_step

    @property
    def nbytes(self) -> int:
        """Bytes of all segments, and of the keys that they refer to."""
        paths = {path for segment in self.segments for path in (segment.path, *segment.key_files)}
        return sum(path.stat().st_size for path in paths)

    @property
    def is_sparse(self) -> bool:
        """Whether any rows are kept without their zeros."""
        headers = [*(segment.header for segment in self.segments), *self._key_headers.values()]
        return any("sparse" in rows for header in headers for rows in header["rows"].values())

    @property
    def is_eight_bit(self) -> bool:
        """Whether any rows are kept in 8 bits."""
        return any("eight_bit" in rows for segment in self.segments for rows in segment.header["rows"].values())

    def is_rounded(self, parameter: str) -> bool:
        """Whether rows of a parameter are kept in fewer bits than they may have been computed in."""
        own = [spec for spec in self.trained_uses if parameter in spec.parameters]
        rows = (stored.tensors for segment in self.segments for stored in stored_in(segment, own))
        return any(
            found["key"].dtype.itemsize < torch.float32.itemsize
            or any(isinstance(values, EightBitRows) for values in found.values())
            for found in rows
        )

    @cached_property
    def fingerprint(self) -> str:
        """What tells this memory from another, and from itself after more steps or folding: segments and ledger."""
        found = hashlib.sha256(f"{self.first_step}".encode())
        for segment in self.segments:
            found.update(f"{segment.path.name} {segment.path.stat().st_size} {sorted(segment.left_out) or ''}".encode())
        for name, history in self.histories.items():
            found.update(f"{name} {self.origin_steps[name]} ".encode())
            for values in (history.step, history.scale, history.residual):  # as good as the rows themselves
                found.update(values.contiguous().numpy().tobytes())
        return found.hexdigest()

    def count(self, layer: str) -> int:
        """How many patterns the layer has, those of all its uses."""
        return sum(self._segment_counts(layer))

    def count_by_step(self, layer: str, *, own: bool = False) -> Tensor:
        """How many patterns the layer has of every step [t + 1]; of its ``own`` use of the weight, or of all."""
        found = torch.zeros(self.last_step + 1, dtype=torch.int64)
        for segment in self.segments:
            for stored in stored_in(segment, [self._by_name[layer]] if own else self.uses(layer)):
                _, stop = stored.between(0, self.last_step)
                steps = stored.tensors["step"][:stop]
                found.index_add_(0, steps, torch.ones_like(steps) if stored.counts is None else stored.counts[:stop])
        return found

    def uses(self, layer: str) -> list[LayerSpec]:
        """The layer and the others that use the same weight, in the model's order."""
        own = self._by_name[layer]
        return [spec for spec in self.trained_uses if spec.weight == own.weight] or [own]

    @cached_property
    def _by_name(self) -> dict[str, LayerSpec]:
        return {spec.name: spec for spec in self.manifest.layers}

    def _segment_counts(self, layer: str) -> list[int]:
        """The patterns of every segment."""
        if layer not in self._counted:
            uses = self.uses(layer)
            if len(uses) == 1 and not map_of(uses[0]).stores_maps:
                self._counted[layer] = [segment.count(layer, self.last_step) for segment in self.segments]
            else:
                self._counted[layer] = [self._patterns(segment, uses, self.last_step) for segment in self.segments]
        return self._counted[layer]

    def _count_before(self, layer: str, step: int) -> int:
        """How many patterns come before those of a step."""
        found = 0
        for segment, count in zip(self.segments, self._segment_counts(layer), strict=True):
            if segment.last_step < step:
                found += count
            elif segment.first_step < step:
                found += self._patterns(segment, self.uses(layer), step - 1)
        return found

    def _patterns(self, segment: Segment, uses: Sequence[LayerSpec], last_step: int) -> int:
        """How many patterns of some uses a segment holds up to a step."""
        return sum(stored.patterns(stored.between(0, last_step)[1]) for stored in stored_in(segment, uses))

    def _first_number(self, layer: str, uses: Sequence[LayerSpec]) -> int:
        """The number of the first pattern that is left; folded ones keep theirs, where a stored row is a pattern."""
        if len(uses) > 1 or map_of(uses[0]).stores_maps:
            return 0
        return next((int(s.header["rows"][layer]["first"]) for s in self.segments if s.count(layer)), 0)

    def origin(self, parameter: str) -> OriginPart:
        """Where the recording of a parameter begins."""
        path = self._origin_file(parameter)
        header, file = self._origin_headers[path], open_tensors(path)
        names = header["parameters"][parameter]
        tensors = {part: file.get_tensor(f"{parameter}//{part}") for part in names}
        try:
            for spec in self.manifest.layers:
                if parameter in spec.parameters:
                    check_origin(spec, parameter, tensors[VALUE])
        except ValueError as error:
            raise StoreError(f"{path} does not fit the manifest: {error}") from error
        return OriginPart(header["step"], tensors)

    def dtype(self, parameter: str) -> torch.dtype:
        """The dtype the model has a parameter in."""
        path = self._origin_file(parameter)
        return getattr(torch, self._origin_headers[path]["dtypes"][parameter])  # type: ignore[no-any-return]

    def latest(self) -> tuple[int, dict[str, Tensor]] | None:
        """The weights after the last recorded step and that step, or None if the recording was cut off."""
        if not self.layout.latest.is_file() or self.layout.latest in self._damaged_paths:
            return None
        file = open_tensors(self.layout.latest)
        step = int(read_header(self.layout.latest, file)["step"])
        return step, {name: file.get_tensor(name) for name in tensor_names(file)}

    def pieces(self, layer: str, *, last_step: int, first_step: int = 0) -> Iterator[Span]:
        """The layer's patterns of ``first_step`` to ``last_step`` in pieces, oldest first; none is empty."""
        uses, asked = self.uses(layer), self._by_name[layer]
        number = self._first_number(layer, uses) + self._count_before(layer, first_step)
        for begin, end, segments in self._lanes.spans(first_step, last_step):
            span = Span(asked, uses, [segment.holding(uses) for segment in segments], begin, end, number)
            if span.count:
                yield span
            number += span.count

    def blocks(self, layer: str, *, last_step: int, block_rows: int, first_step: int = 0) -> Iterator[Rows]:
        """The layer's patterns of ``first_step`` to ``last_step``, oldest first, at most ``block_rows`` at a time."""
        for piece in self.pieces(layer, first_step=first_step, last_step=last_step):
            for rows in piece.blocks(block_rows):
                yield rows
                self.worked_on(len(rows))

    def worked_on(self, patterns: int) -> None:
        """Say that so many more patterns have been through."""
        if self.on_rows is not None:
            self.on_rows(patterns)

    def coordinates(self, layer: str, name: str) -> Iterator[Tensor]:
        """Values of one coordinate or recorded column over the layer's patterns, each value at least once."""
        for segment in self.segments:
            for stored in stored_in(segment, self.uses(layer)):
                if name == "position" and stored.counts is not None:
                    places = torch.arange(int(stored.counts.max()) // stored.spec.slots)
                    yield (torch.unique(stored.tensors["position"])[:, None] + places).flatten()
                    continue
                if name == f"column/{USE}" and name not in stored.tensors:
                    yield torch.tensor([stored.number])
                    continue
                _, stop = stored.between(0, self.last_step)
                absent = torch.full((stop,), float("nan"), dtype=torch.float64)
                yield stored.tensors.get(name, absent)[:stop]

    def places(self, layer: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Sample and position [n] of the layer's patterns, each pair at least once."""
        for segment in self.segments:
            for stored in stored_in(segment, self.uses(layer)):
                _, stop = stored.between(0, self.last_step)
                sample, position = (stored.tensors[name][:stop] for name in ("sample", "position"))
                if stored.counts is not None:
                    maps = torch.stack([sample, position, stored.counts[:stop] // stored.spec.slots])
                    sample, position, count = torch.unique(maps, dim=1)
                    begins = (count.cumsum(0) - count).repeat_interleave(count)
                    sample, position = sample.repeat_interleave(count), position.repeat_interleave(count)
                    position = position + torch.arange(len(begins)) - begins
                yield sample, position

    def row_columns(self) -> list[str]:
        """The columns that were recorded with the rows."""
        found = {name: None for segment in self.segments for name in sorted(segment.columns)}
        if len(self.trained_uses) > len(self.layers):
            found[USE] = None
        return list(found)

    def sample_columns(self) -> dict[str, tuple[Tensor, list[str] | None]]:
        """The columns over the samples: values [sample], and the category names if the values number them."""
        found = {}
        for path in self.layout.columns():
            if path in self._damaged_paths:
                continue
            file = open_tensors(path)
            found[path.stem] = (file.get_tensor(VALUE), read_header(path, file)["categories"])
        return found

    def write_column(self, name: str, values: Tensor, categories: list[str] | None) -> None:
        """Keep a column over the samples beside the memory.

        Raises:
            StoreError: a bad name.
        """
        path = self.layout.column(name)
        path.parent.mkdir(exist_ok=True)
        header = {"kind": "column", "name": name, "categories": categories} | self.manifest.stamp
        write_tensors(path, {VALUE: values}, header)
