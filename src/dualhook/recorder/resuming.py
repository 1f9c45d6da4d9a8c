"""Going on with a memory: it has to be one of the same layers, and the model has to be where its steps have left it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dualhook.capture import Selection, whole
from dualhook.errors import LayerError, StoreError
from dualhook.memory import DualMemory
from dualhook.recorder.ranks import Ranks
from dualhook.records import LayerSpec
from dualhook.store import Layout, Manifest, Store, WriterLock, cut_after, tidy

__all__ = ["resumed"]

ENTRIES = 256  # of a parameter, that are compared
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # of their norm: what rebuilding them can be off by
NARROW = 3e-2  # the same in narrower dtypes, and from rows that are kept in such


def resumed(
    root: Path, selection: Selection, ranks: Ranks, step: int | None, lock: WriterLock
) -> tuple[Layout, Selection, int]:
    """Cut a memory after ``step`` (None: its last one); where it lies, what of a selection it records, and the step.

    Raises:
        StoreError: there is no memory, somebody else is writing it, it does not reach to the step, or the model is not
            at the step.
        LayerError: the memory has other layers.
    """
    ranks.share(lambda: _lock(lock, root))
    store = Store(root)  # raises where there is none
    layout = store.layout
    if store.manifest.ranks != ranks.size:
        raise StoreError(
            f"{layout.root} was recorded by {store.manifest.ranks} processes, not {ranks.size}: resume with as many"
        )
    last = store.last_step
    step = last if step is None else step
    if not 0 < step <= last:
        raise StoreError(
            f"{layout.root} is whole up to step {last} and cannot go on from step {step}: load a checkpoint of a step "
            "that is recorded (recorder.flush() with every checkpoint puts its step on disk), or record a new memory"
        )
    if step < (folded := store.first_step):
        raise StoreError(
            f"{layout.root} cannot go on from step {step}: its steps up to {folded} have been folded into the origin; "
            f"resume from a checkpoint of step {folded} or later, or record a new memory with a larger max_bytes="
        )
    selection = _limited(selection, store.manifest, layout)
    _check_weights(store, selection, step)
    ranks.wait()  # until all have read what is about to go
    if not ranks.rank:
        tidy(layout)
    ranks.wait()
    cut_after(layout, step, rank=ranks.rank)
    ranks.wait()
    return layout, selection, step


def _lock(lock: WriterLock, root: Path) -> str:
    if root.is_dir():
        lock.take(root)
    return ""


def _limited(selection: Selection, manifest: Manifest, layout: Layout) -> Selection:
    """The recorded part of a selection: an audit may have left some of it out."""
    known = {spec.name: spec for spec in manifest.layers}
    there = {spec.name: spec for spec in selection.specs}
    for name, spec in known.items():
        if name not in there or not _is_same(spec, there[name]):
            found = "does not record it" if name not in there else f"has it as {_shape(there[name])}"
            raise LayerError(
                f"{layout.root} records layer {name!r} ({_shape(spec)}), this model with this layers= {found}: resume "
                "with the model and the layers= of the first part, or record a new memory"
            )
    layers = [
        replace(tapped, spec=recorded, attributes=tapped.attributes[: len(recorded.parameters)])
        for tapped in selection.layers
        if (recorded := known.get(tapped.spec.name)) is not None
    ]
    why = "not recorded in the first part of the memory"
    return Selection(layers, selection.reasons | {name: why for name in there if name not in known})


def _is_same(recorded: LayerSpec, found: LayerSpec) -> bool:
    """Whether two layers are one, in a manifest's notation; an audit may have taken the bias off the recorded one."""
    if recorded.bias is None:
        found = replace(found, bias=None)
    one, other = (json.loads(json.dumps(asdict(spec))) for spec in (recorded, found))
    return bool(one == other)


def _shape(spec: LayerSpec) -> str:
    return f"{spec.kind}, {spec.in_features} to {spec.out_features}"


def _check_weights(store: Store, selection: Selection, step: int) -> None:
    """Hold some entries of every parameter to what the memory has after the step.

    Raises:
        StoreError: they differ by more than rebuilding them explains.
    """
    written = store.latest()  # after the last flush, with a checkpoint as a rule; of another step they are rebuilt
    if written and written[0] == step:
        recorded, rounded = written[1], frozenset[str]()
    else:  # what some step has left unexplained is not rebuilt as it was
        rebuilt = DualMemory(store.layout.root).state_dict(step).items()
        recorded = {name: value for name, value in rebuilt if not store.inexact_steps(name, step)}
        rounded = frozenset(filter(store.is_rounded, recorded))
    for name, parameter in _parameters(selection):
        if name not in recorded:  # not trained by then
            continue
        own, expected = (_some(values) for values in (whole(parameter), recorded[name]))
        error = float((own - expected).norm() / expected.norm().clamp(min=1e-30))
        tolerance = NARROW if name in rounded else TOLERANCE.get(parameter.dtype, NARROW)
        if own.shape != expected.shape or not error <= tolerance:
            raise StoreError(
                f"{name!r} of this model is off by {error:.2g} of its norm from what the memory has after step {step} "
                f"({float(own.norm()):.6g} against {float(expected.norm()):.6g} in {len(own)} entries): load the "
                "checkpoint of that step before instrument(), or name the step of the checkpoint with resume_at="
            )


def _parameters(selection: Selection) -> Iterator[tuple[str, nn.Parameter]]:
    for tapped in selection.layers:
        for name, attribute in zip(tapped.spec.parameters, tapped.attributes, strict=True):
            parameter = tapped.module._parameters.get(attribute)
            if parameter is not None:
                yield name, parameter


def _some(values: Tensor) -> Tensor:
    index = torch.arange(0, values.numel(), max(1, values.numel() // ENTRIES), device=values.device)
    return torch.take(values, index).double().cpu()
