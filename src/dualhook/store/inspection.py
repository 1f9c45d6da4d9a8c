"""What is wrong with the files of a memory: which cannot be read, are missing, in each other's place or another's."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from dualhook.errors import StoreError
from dualhook.store.checking import SEGMENT_TEXTS, check_header
from dualhook.store.checksums import CHECKSUMS, HEADER_ITSELF, mismatches
from dualhook.store.keyfiles import check_keys
from dualhook.store.lanes import Segment
from dualhook.store.layout import UNREADABLE, Layout, Manifest, glance, key_file_name, open_tensors, segment_name

__all__ = ["Damage", "Inspection", "inspected"]

KINDS = {"segments": "segment", "keys": "keys", "origin": "origin", "snapshots": "snapshot", "columns": "column"}
"""Kinds of files by the folder that they lie in; keys lie among the segments."""
Lane = Sequence[tuple[int, Path, "Segment | None"]]  # one process's files by number, None where one is damaged
COLUMN = "/column/"  # between a layer's rows and the name of a column
Loss = tuple[tuple[int, int], frozenset[str]]  # steps and layers
NAMED = 3  # damaged tensors, or layers, that are named one by one


@dataclass(frozen=True)
class Damage:
    """One file that is not what it was or should be, by its name in the memory's directory.

    ``steps``, the first and the last, are lost with it; of a segment's damaged rows to these ``layers`` only (empty:
    to all).
    """

    file: str
    what: str
    steps: tuple[int, int] | None = None
    layers: frozenset[str] = frozenset()

    def __str__(self) -> str:
        lost = (
            ""
            if self.steps is None
            else " (step {}{})".format(self.steps[0], "" if self.steps[0] == self.steps[1] else f" to {self.steps[1]}")
        )
        return f"{self.file} {self.what}{lost}"


@dataclass
class Inspection:
    """The healthy files of a memory, and the damage."""

    segments: list[Segment] = field(default_factory=list)
    origins: dict[Path, Mapping[str, Any]] = field(default_factory=dict)
    keys: dict[Path, Mapping[str, Any]] = field(default_factory=dict)
    damage: list[Damage] = field(default_factory=list)
    damaged_paths: set[Path] = field(default_factory=set)
    without_checksums: int = 0
    """How many files an earlier version has written, of which bits are not checked."""


class _FileError(Exception):
    """What is wrong with a file as a whole."""


def inspected(
    layout: Layout, manifest: Manifest, *, deep: bool = False, on_file: Callable[[int], None] | None = None
) -> Inspection:
    """Look at the files of a memory; ``deep``: at every bit of all of them, else at the headers of what is needed.

    ``on_file`` is called with the bytes of every file that has been looked at.
    """
    found, layout = Inspection(), replace(layout, generation=manifest.generation)
    # before the segments, which a recorder that is at work writes first
    latest = _looked_at(layout.latest, "latest", layout, manifest, found, deep=deep) if layout.latest.exists() else None
    segments = layout.segments()  # before the keys that they refer to, which are written first
    folders = {"origin": layout.origins(), "keys": layout.key_files(), "segments": segments}
    if deep:
        folders |= {"snapshots": layout.snapshots(), "columns": layout.columns()}
    lanes: dict[int, list[tuple[int, Path, Segment | None]]] = {rank: [] for rank in range(manifest.ranks)}
    before: dict[str, Any] = {}
    lost_keys: dict[Path, Loss] = {}
    with _nothing_to_collect():
        for folder, path in ((folder, path) for folder, paths in folders.items() for path in paths):
            header = _looked_at(path, KINDS[folder], layout, manifest, found, deep=deep)
            if folder == "origin" and header is not None:
                found.origins[path] = header
            elif folder == "keys" and header is not None:
                found.keys[path] = header
            elif folder == "segments":
                before = before if header is None else _kept_once(header, before)
                if header is not None:
                    header = _with_lost_keys(Segment(path, header), found.keys, lost_keys)
                rank, number = _place(path)
                segment = _segment(path, header, manifest, found, layout.root, deep=deep)
                lanes.setdefault(rank, []).append((number, path, segment))
            if on_file is not None:
                on_file(path.stat().st_size)
    _note_keys(lost_keys, set(folders["keys"]), found, layout.root)
    folded = max((int(header["folded"]) for header in found.origins.values()), default=0)
    is_known = all(path in found.origins for path in folders["origin"])
    for rank, lane in lanes.items():
        own = [one for one in lane if one[2] is None or one[2].last_step > folded]
        begin, last = _beginning(own, folded) if is_known or not own else (own[0][0], None)
        reach = 0 if latest is None or rank else int(latest["step"])
        _check_order(own, begin, last, reach, partial(layout.segment, rank=rank), found, layout.root)
    if deep and is_known:
        known = {name for spec in manifest.layers for name in spec.parameters}
        begun = {name for header in found.origins.values() for name in header["parameters"]}
        stepped = {name for segment in found.segments for name in _stepped(segment)}
        if lost := sorted((stepped & known) - begun):
            found.damage.append(Damage("origin/", f"lacks the file that holds {', '.join(map(repr, lost))}"))
    return found


@contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """While headers are read, all of which are kept: Python would look through them again and again for garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _kept_once(header: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """A segment's header, with the lists of the one before it where its own are the same, as nearly all are."""
    for what in SEGMENT_TEXTS:
        if header[what] == before.get(what):
            header[what] = before[what]
    return header


def _looked_at(
    path: Path, kind: str, layout: Layout, manifest: Manifest, found: Inspection, *, deep: bool
) -> dict[str, Any] | None:
    """The header of a file, with ``columns``, those of its rows, and ``left_out``, the layers of damaged ones.

    None if more is damaged. That is noted.
    """
    try:
        try:
            header, names = glance(path)
            file = open_tensors(path) if deep else None
        except StoreError as error:
            raise _FileError(str(error).removeprefix(f"{path} ")) from error
        _check_place(path, kind, header, layout, manifest)
        try:
            check_header(kind, header, names)
        except UNREADABLE as error:
            raise _FileError(f"has a header that makes no sense: {error}") from error
        columns = {name.rpartition(COLUMN)[2] for name in names if COLUMN in name}
        if file is None:
            header.pop(CHECKSUMS, None)  # most of it, and looked at with the tensors
            return header | {"columns": columns} if columns else header
        if kind == "keys":
            check_keys(path, header)
        found.without_checksums += CHECKSUMS not in header
        damaged = list(mismatches(file, header))
        if not damaged:
            return header | {"columns": columns}
        layers = _layers_of(damaged, header) if kind == "segment" else frozenset()
        steps = None if kind != "segment" or HEADER_ITSELF in damaged else (header["steps"][0], header["steps"][1])
        damaged = ["its header" if name == HEADER_ITSELF else name for name in damaged]
        found.damage.append(
            Damage(_name(path, layout.root), f"is not as it was written: {_some(damaged)}", steps, layers)
        )
        if layers:
            return header | {"columns": columns, "left_out": layers}
    except (_FileError, StoreError) as damaged_file:
        what = str(damaged_file).removeprefix(f"{path} ")
        found.damage.append(Damage(_name(path, layout.root), what))
    found.damaged_paths.add(path)
    return None


def _check_place(path: Path, kind: str, header: Mapping[str, Any], layout: Layout, manifest: Manifest) -> None:
    """Is it the file that belongs there?"""
    if header.get("kind") != kind:
        raise _FileError(f"is of kind {header.get('kind')!r}: expected {kind!r}")
    if None not in (manifest.id, header.get("memory")) and header["memory"] != manifest.id:
        raise _FileError("belongs to another memory")
    try:
        expected = _file_name(kind, header, path, layout)
    except (*UNREADABLE, OverflowError, StoreError) as error:
        raise _FileError(f"does not say which file it is: {error}") from error
    if expected != path.name:
        raise _FileError(f"is in the place of another file, it was {_name(path.with_name(expected), layout.root)}")


def _file_name(kind: str, header: Mapping[str, Any], path: Path, layout: Layout) -> str:
    """What a header says that its file is called."""
    if kind in ("segment", "keys"):  # of these there are many
        called = segment_name if kind == "segment" else key_file_name
        return called(int(header["number"]), int(header.get("rank", 0)))
    if kind == "origin":
        return layout.origin(int(header.get("number", path.stem))).name
    if kind == "snapshot":
        return layout.snapshot(int(header["step"])).name
    return layout.column(header.get("name", path.stem)).name if kind == "column" else layout.latest.name


def _stepped(segment: Segment) -> Iterator[str]:
    """The parameters that the ledger of a segment has entries of."""
    entries = segment.ledger()["ledger/entry"]
    return (segment.header["parameters"][number] for number in set(entries[:, 1].tolist()))


def _segment(
    path: Path, header: Mapping[str, Any] | None, manifest: Manifest, found: Inspection, root: Path, *, deep: bool
) -> Segment | None:
    """A segment that can be read; ``deep``: whose rows and ledger make sense, as checksums do not tell."""
    if header is None:
        return None
    segment = Segment(path, header, frozenset(header.get("left_out", ())), frozenset(header.get("columns", ())))
    try:
        if deep:
            segment.ledger()
            for spec in manifest.layers:
                segment.stored(spec, deep=True)
    except StoreError as error:
        what = str(error).removeprefix(f"{path} ")
        found.damage.append(Damage(_name(path, root), what, (segment.first_step, segment.last_step)))
        found.damaged_paths.add(path)
        return None
    return segment


def _with_lost_keys(segment: Segment, keys: Mapping[Path, Mapping[str, Any]], lost: dict[Path, Loss]) -> dict[str, Any]:
    """A segment's header, layers left out whose keys are in no file as it says; that is noted in ``lost``."""
    header, left_out = dict(segment.header), frozenset(segment.header.get("left_out", ()))
    for layer, own in header["rows"].items():
        holder = own.get("key_of", layer)
        for path, count in segment.key_paths(layer):
            if keys.get(path, {}).get("rows", {}).get(holder, {}).get("count") == count:
                continue
            left_out |= {layer}
            (first, last), layers = lost.get(path, ((segment.first_step, segment.last_step), frozenset()))
            lost[path] = (min(first, segment.first_step), max(last, segment.last_step)), layers | {layer}
    return header | {"left_out": left_out} if left_out else header


def _note_keys(lost: Mapping[Path, Loss], there: Set[Path], found: Inspection, root: Path) -> None:
    """Files of keys that segments refer to: missing, or damaged, with what is lost with them; others do not matter."""
    unused = {_name(path, root) for path in there - lost.keys()}
    found.damage = [one for one in found.damage if one.file not in unused]
    known = {one.file: at for at, one in enumerate(found.damage)}
    for path, (steps, layers) in lost.items():
        if (at := known.get(_name(path, root))) is not None:
            found.damage[at] = replace(found.damage[at], steps=steps, layers=layers)
        else:
            what = "lacks keys that segments refer to" if path in there else "is missing"
            found.damage.append(Damage(_name(path, root), f"{what}: those of {_some(sorted(layers))}", steps, layers))
            found.damaged_paths.add(path)


def _layers_of(damaged: Sequence[str], header: Mapping[str, Any]) -> frozenset[str]:
    """The layers whose rows are damaged, with those that read their keys there; none if more than rows is."""
    layers: set[str] = set()
    for name in damaged:
        owner = next((layer for layer in header["rows"] if name.startswith(f"rows/{layer}/")), None)
        if owner is None:
            return frozenset()
        layers.add(owner)
    layers |= {layer for layer, own in header["rows"].items() if own.get("key_of") in layers}
    return frozenset(layers)


def _beginning(lane: Lane, folded: int) -> tuple[int, int]:
    """The number of the segment that one process's begin with, and the step before it."""
    if not folded or not lane:
        return 0, folded
    number, _, segment = lane[0]
    return number - (segment is not None and segment.first_step > folded + 1), folded


def _check_order(
    lane: Lane, begin: int, last: int | None, reach: int, named: Callable[[int], Path], found: Inspection, root: Path
) -> None:
    """Do one process's segments follow each other, from ``begin`` on to the step that is to be ``reach``ed?

    ``last`` is the step before them, None where that is not known.
    """
    number = begin - 1
    for own, segment in ((own, segment) for own, _, segment in lane if segment is not None):
        before = number
        last = segment.first_step - 1 if last is None else last
        if own == before + 1 and not last <= segment.first_step <= last + 1:
            what = f"begins with step {segment.first_step}: expected {last + 1}"
            found.damage.append(Damage(_name(segment.path, root), what))
            found.damaged_paths.add(segment.path)
            continue
        if own > before + 1:
            _note_gap(map(named, range(before + 1, own)), (last + 1, segment.first_step - 1), found, root)
        found.segments.append(segment)
        number, last = own, segment.last_step
    last = last or 0
    end = max([number + (reach > last), *(own for own, _, _ in lane[-1:])])
    _note_gap(map(named, range(number + 1, end + 1)), (last + 1, max(reach, last + 1)), found, root)


def _note_gap(paths: Iterable[Path], steps: tuple[int, int], found: Inspection, root: Path) -> None:
    """Segments between two healthy ones: missing, or damaged so that they do not say which steps they hold."""
    known = {one.file: at for at, one in enumerate(found.damage)}
    lost = steps if steps[0] <= steps[1] else None
    for name in (_name(path, root) for path in paths):
        if name not in known:
            found.damage.append(Damage(name, "is missing", lost))
        elif found.damage[known[name]].steps is None:
            found.damage[known[name]] = replace(found.damage[known[name]], steps=lost)


def _place(path: Path) -> tuple[int, int]:
    """The process and the number that a segment's file name tells."""
    rank, _, number = path.name.removesuffix(".safetensors").rpartition("-")
    return int(rank.removeprefix("r") or 0), int(number)


def _some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
