"""Weights from patterns: a layer rebuilt in full, or without chosen patterns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dualhook.query.streaming import BLOCK_ROWS
from dualhook.records import Composition, Rows, RowSource

__all__ = ["rebuild"]

Chosen = Callable[[Rows], Tensor]


def rebuild(source: RowSource, made_of: Composition, leave_out: Chosen | None = None) -> dict[str, Tensor]:
    """The layer's parameters by name, float64: origin and every pattern up to the horizon.

    ``leave_out`` masks the patterns [n] of a block whose values are not wanted.
    """
    weight = made_of.origin_weight.clone()
    bias = None if made_of.origin_bias is None else made_of.origin_bias.clone()
    for rows in source.blocks(made_of.spec.name, last_step=made_of.horizon, block_rows=BLOCK_ROWS):
        key, output_grad, step = rows.key, rows.output_grad, rows.step
        if leave_out is not None:
            wanted = (~leave_out(rows)).nonzero().squeeze(1)
            key, output_grad, step = key[wanted], output_grad[wanted], step[wanted]
        dtype = torch.promote_types(key.dtype, torch.float32)
        output_grad = output_grad.to(dtype)
        # [o, n] · [n, i] in the rows' precision, summed over the blocks in float64
        weight -= (output_grad * made_of.weight[step].to(dtype)[:, None]).T @ key.to(dtype)
        if bias is not None and made_of.bias is not None:
            bias -= output_grad.double().T @ made_of.bias[step]
    return {name: part for name, part in zip(made_of.spec.parameters, (weight, bias), strict=False) if part is not None}
