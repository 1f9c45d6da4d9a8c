"""Makes a memory ready for a recording that goes on with it: what lies after its step goes, and what was left half."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import Tensor

from dualhook.store.durable import remove
from dualhook.store.lanes import Segment
from dualhook.store.layout import Layout, open_tensors, read_header, tensor_names, write_tensors
from dualhook.store.packed import PER_STEP, WEIGHT_STEP

__all__ = ["cut_after", "tidy"]


def cut_after(layout: Layout, step: int, *, rank: int = 0) -> None:
    """Remove the rows, ledger entries, origins and snapshots of later steps; the rows of other processes stay.

    What is newest goes first: cut off in the middle, the memory is whole up to some later step. Steps that have been
    folded into the origin cannot be cut.
    """
    if not rank:
        remove(layout.latest)  # no weights are better than those of another step
    for path in reversed(layout.segments(rank)):  # other processes are at theirs
        segment = Segment(path, read_header(path, open_tensors(path)))
        if segment.first_step > step:
            remove(path)
        elif segment.last_step > step:
            tensors, header = _shortened(segment, step)
            write_tensors(path, tensors, header)
    _remove_unused_keys(layout, rank)
    if rank:
        return
    for path in layout.snapshots():
        if int(read_header(path, open_tensors(path))["step"]) > step:
            remove(path)
    for path in layout.origins():  # a parameter that begins after the step will write another one
        header = read_header(path, open_tensors(path))
        if int(header["step"]) >= step and int(header["folded"]) < step:
            remove(path)


def tidy(layout: Layout) -> None:
    """Remove what was left half: files being written, and what folding or compacting was about to remove."""
    for path in layout.partials():
        path.unlink()
    for folder in layout.other_generations():
        shutil.rmtree(folder)
    headers = {path: read_header(path, open_tensors(path)) for path in layout.origins()}
    folded = max((int(header["folded"]) for header in headers.values()), default=0)
    for path in layout.segments():
        if Segment(path, read_header(path, open_tensors(path))).last_step <= folded:
            path.unlink()
    counting = {name: path for path, header in headers.items() for name in header["parameters"]}
    for path in headers.keys() - set(counting.values()):
        path.unlink()


def _remove_unused_keys(layout: Layout, rank: int) -> None:
    """Remove the files of a process's keys that none of its segments refers to."""
    segments = (Segment(path, read_header(path, open_tensors(path))) for path in layout.segments(rank))
    used = {path for segment in segments for path in segment.key_files}
    for path in layout.key_files(rank):
        if path not in used:
            remove(path)


def _shortened(segment: Segment, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a segment without what lies after a step that is inside it."""
    file, header = open_tensors(segment.path), dict(segment.header)
    there = tensor_names(file)
    counts = {layer: segment.count(layer, step) for layer in header["rows"]}
    header["steps"] = [segment.first_step, step]
    header["rows"] = {layer: {**own, "count": counts[layer]} for layer, own in header["rows"].items() if counts[layer]}
    early = file.get_tensor("ledger/entry")[:, 0] <= step
    numbers_left: dict[str, int] = {}  # of sparse rows there may be none
    for layer, count in counts.items():
        for part in segment.header["rows"][layer].get("sparse", ()) if count else ():
            if (name := f"rows/{layer}/{part}") + "/end" in there:  # else another layer holds them
                numbers_left[f"{name}/value"] = int(file.get_tensor(f"{name}/end")[count - 1])
    tensors: dict[str, Tensor] = {}
    for name in there:
        values, kept = file.get_tensor(name), 1
        room, _, rest = name.partition("/")
        owner = rest.rpartition("/")[0]
        if room == "rows":
            layer = next(layer for layer in counts if rest.startswith(f"{layer}/"))
            kept = count = counts[layer]
            if rest.removeprefix(f"{layer}/") in PER_STEP:
                count = int(torch.searchsorted(file.get_tensor(f"rows/{layer}/{WEIGHT_STEP}"), step, right=True))
            values = values[: numbers_left.get(name, count)]
        elif name in ("ledger/entry", "ledger/measured"):
            values = values[early]
        elif room == "fit":
            values = values[: int(torch.searchsorted(file.get_tensor(f"fit/{owner}/step"), step, right=True))]
            kept = len(values)
        if kept:
            tensors[name] = values.clone()  # the file that it is mapped from is about to be replaced
    return tensors, header
