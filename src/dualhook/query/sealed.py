"""Rows with the matrix of their step multiplied in: under a matrix rule every question is then one plain pass.

``value_s = -Λ_s d_s`` where the matrix acts from the left, ``key_s = Λ_sᵀ x_s`` where it acts from the right: what a
gradient has become at the horizon is one of the two vectors of its row, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from dualhook.optimizers import Side
from dualhook.query.answers import Answers, oldest_first
from dualhook.query.parts import Composition, ReplayShare, SealedRows
from dualhook.query.replay import Replay
from dualhook.query.scoring import RowScores
from dualhook.records import Rows, RowSource

__all__ = ["seal"]


def seal(
    source: RowSource, made_of: Composition, files: Answers, key: str, replaying: AbstractContextManager[None]
) -> Composition:
    """The same layer with sealed rows in place of its weight's replay, from ``files`` or after one replay.

    The replay, if there is one, runs within ``replaying``. The layer stays as it was, if its weight is under no matrix
    rule, or if the rows take more than ``replay_bytes``.
    """
    share = next((share for share in made_of.replays if share.parameter == made_of.spec.weight), None)
    rules = [] if share is None else [step.rule for step in share.steps]
    plain = share is not None and share.map is None
    if not plain or share is None or any(rule.kind != "matrix" for rule in rules) or made_of.preview:
        return made_of
    side = rules[0].side(share.weight)
    width = share.weight.shape[0 if side == "left" else 1]
    if source.count(made_of.spec.name) * width * share.bytes_per_entry > made_of.replay_bytes:
        return made_of
    found = files.get(f"{key}-sealed")
    if found is None:
        with replaying:
            found = _replayed(source, made_of, share, side, width)
        files.put(f"{key}-sealed", found)
    return replace(
        made_of,
        weight=torch.ones_like(made_of.weight),
        origin_weight=found["origin"],
        replays=tuple(other for other in made_of.replays if other is not share),
        sealed=SealedRows(side, found["values"], int(found["first"])),
        rounding=found["rounding"],
    )


def _replayed(
    source: RowSource, made_of: Composition, share: ReplayShare, side: Side, width: int
) -> Mapping[str, Tensor]:
    replay = Replay(source, made_of.spec.name, [share], budget=made_of.replay_bytes)
    values: list[tuple[int, Tensor]] = [(0, torch.zeros(width, 0, dtype=share.computed_in))]
    for rows, vectors in replay.backward(_Vectors(width), totals=True, tick=made_of.tick):
        if vectors is not None:
            values.append((rows.first, vectors))
    totals = replay.sums()[0]
    first = min((number for number, _ in values[1:]), default=0)
    return {
        "values": oldest_first(values).T.contiguous(),
        "first": torch.tensor(first),
        "origin": totals.origin,
        "rounding": totals.rounding,
    }


class _Vectors:
    """In place of queries: asks a replay for the vectors [o or i, n] that the matrices make of the rows."""

    def __init__(self, width: int) -> None:
        self.shape = (width, 1)

    def of(self, share: ReplayShare, units: slice, dtype: torch.dtype) -> RowScores:
        return _BlockVectors(self.shape[0], dtype)


class _BlockVectors:
    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.queries = width
        self._dtype = dtype

    def of(self, rows: Rows, values: Tensor | float, scale: float, side: Side) -> Tensor:
        vectors = (rows.output_grad if side == "left" else rows.key).to(self._dtype).T
        if not isinstance(values, Tensor):
            return vectors * (values * scale)
        return (values if side == "left" else values.T) @ vectors * scale
