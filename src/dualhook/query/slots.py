"""Products with keys that fill one slot of a matrix's columns; where a layer has one slot only, plain products.

Letters: ``n`` pattern, ``q`` query, ``p`` position, ``o`` output, ``c`` column of a slot; ``s · c`` are all columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dualhook.maps import gradient
from dualhook.records import Rows

__all__ = ["answered", "bias_gradient", "constants", "dots", "met", "products"]

AT_A_TIME = 2**16  # components of pairs: with more the system hands out fresh memory, which takes six times as long


def products(query: Tensor, slot: Tensor | None, rows: Rows, dtype: torch.dtype) -> Tensor:
    """``key · query`` [q, p, n] for queries [q, p, c] in their slots [q, p], zero between different ones."""
    if slot is not None and rows.slot is None:  # whole keys: each query looks at the columns of its slot
        flat, columns = query.to(dtype).flatten(0, 1), _columns(slot.flatten(), query.shape[-1])
        found = torch.stack([rows.key[:, own].to(dtype) @ q for own, q in zip(columns, flat, strict=True)])
    else:
        found = query.to(dtype).flatten(0, 1) @ rows.key.to(dtype).T
    found = found.reshape(*query.shape[:2], -1)
    return found if slot is None or rows.slot is None else found.mul_(slot[..., None] == rows.slot)


def dots(queries: Tensor, query: Tensor, rows: Tensor, pattern: Tensor) -> Tensor:
    """Products [m] of some of ``queries`` [q, d] with some of ``rows`` [n, d], in the dtype and place of the queries.

    Each is summed up by itself, in an order that nothing else has a part in.
    """
    found = queries.new_empty(len(query))
    pairs = max(2, AT_A_TIME // rows.shape[1])
    for own in (slice(start, start + pairs) for start in range(0, len(query), pairs)):
        factors = queries.index_select(0, query[own])
        factors *= rows.index_select(0, pattern[own].to(rows.device)).to(factors.device)
        if len(factors) == 1:  # torch would share out the sum among its threads
            factors = factors.expand(2, -1)
        found[own] = factors.sum(1)[: len(found[own])]
    return found


def constants(slot: Tensor | None, rows: Rows, dtype: torch.dtype) -> Tensor | None:
    """What the bias's components of keys and queries make together [q, p, n]; None: 1 throughout."""
    if slot is None:
        return None if rows.constant is None else rows.constant.to(dtype)
    one = torch.ones(len(rows), dtype=dtype, device=slot.device) if rows.constant is None else rows.constant.to(dtype)
    return one * (slot[..., None] == rows.slot) if rows.slot is not None else one.expand(*slot.shape, -1)


def met(rows: Rows, vectors: Tensor) -> Tensor:
    """What vectors [n, s · c] hold where the rows' keys are [n, c]."""
    if rows.slot is None:
        return vectors
    blocks = vectors.reshape(len(rows), -1, rows.key.shape[1])
    return blocks[torch.arange(len(rows), device=blocks.device), rows.slot]


def bias_gradient(values: Tensor, rows: Rows, slots: int) -> Tensor:
    """What values [n, o] add to a bias [o], or [o, slots]."""
    if rows.constant is not None:
        values = values * rows.constant.to(values.dtype)[:, None]
    if slots == 1:
        return values.sum(0)
    return gradient(values, torch.ones_like(values[:, :1]), rows.slot, slots)


def answered(query: Tensor, slot: Tensor | None, matrix: Tensor) -> Tensor:
    """``W query`` [q, p, o] in the matrix's dtype, for a matrix [o, s · c]."""
    query = query.to(matrix.dtype)
    if slot is None:
        return query @ matrix.T
    columns = _columns(slot.flatten(), query.shape[-1])
    flat = [matrix[:, own] @ q for own, q in zip(columns, query.flatten(0, 1), strict=True)]
    return torch.stack(flat).reshape(*query.shape[:2], -1)


def _columns(slots: Tensor, width: int) -> Iterator[slice]:
    """The columns of every slot; of none for the slot -1, where padded queries are."""
    for slot in slots.tolist():
        yield slice(slot * width, (slot + 1) * width) if slot >= 0 else slice(0, width)
