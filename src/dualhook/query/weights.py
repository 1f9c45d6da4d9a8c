"""Weights from patterns: a layer rebuilt in full, or without chosen patterns."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dualhook.maps import gradient
from dualhook.query.parts import Composition
from dualhook.query.replay import Replay
from dualhook.query.slots import bias_gradient, met
from dualhook.query.streaming import BLOCK_ROWS
from dualhook.records import Rows, RowSource

__all__ = ["rebuild"]

Chosen = Callable[[Rows], Tensor]


def rebuild(source: RowSource, made_of: Composition, leave_out: Chosen | None = None) -> dict[str, Tensor]:
    """The layer's parameters by name, float64: origin, every pattern up to the horizon, and the named parts.

    ``leave_out`` masks the patterns [n] of a block whose values are not wanted.
    """
    weight = made_of.origin_weight.clone()
    bias = None if made_of.origin_bias is None else made_of.origin_bias.clone()
    found = dict(zip(made_of.spec.parameters, (weight, bias), strict=False))
    for rows in () if made_of.only_replays else _blocks(source, made_of):
        if leave_out is not None:
            rows = rows.at((~leave_out(rows)).nonzero().squeeze(1))
        key, output_grad, step = rows.key, rows.output_grad, rows.step
        dtype = torch.promote_types(key.dtype, torch.float32)
        output_grad, key = output_grad.to(dtype), key.to(dtype)
        values = output_grad * made_of.weight[step].to(dtype)[:, None]
        if (factor := made_of.factor) is not None:
            values, key = values * factor.row[step].to(dtype), key * met(rows, factor.column[step]).to(dtype)
        # [o, n] · [n, i] in the rows' precision, summed over the blocks in float64
        weight -= gradient(values, key, rows.slot, weight.shape[1])
        if bias is not None and made_of.bias is not None:
            bias -= bias_gradient(output_grad.double() * made_of.bias[step][:, None], rows, made_of.spec.slots)
    if made_of.replays:
        replay = Replay(source, made_of.spec.name, made_of.replays, budget=made_of.replay_bytes)
        counted = None if leave_out is None else lambda rows: ~leave_out(rows)
        for _ in replay.backward(None, totals=True, counted=counted, tick=made_of.tick):
            pass
        for share, totals in zip(made_of.replays, replay.sums(), strict=True):
            if leave_out is None:
                share.totals = totals
            found[share.parameter] = totals.value
    return {name: part for name, part in found.items() if part is not None}


def _blocks(source: RowSource, made_of: Composition) -> Iterator[Rows]:
    return source.blocks(made_of.spec.name, last_step=made_of.horizon, block_rows=BLOCK_ROWS)
