"""``compact``: a memory in fewer and smaller files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from dualhook.errors import DualHookError
from dualhook.host import on_host
from dualhook.memory import DualMemory
from dualhook.store import SEGMENT_BYTES, Saving, compacted

__all__ = ["compact"]


@on_host()
def compact(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    min_share: float = 0.0,
    sparse: bool | None = None,
    segment_bytes: int = SEGMENT_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> DualMemory:
    """Write the segments of the memory at ``path`` once more: small ones together, in less room if that is asked for.

    Without ``dtype`` and ``min_share`` nothing is lost. It takes the disk space of both until it is done; interrupted
    or killed at any moment, the memory is the old one or the new one. Memories that are open have to be loaded again.

    Args:
        path: directory of the memory, which nobody is recording to.
        dtype: floating-point dtype of the rows or ``torch.int8``, as ``instrument(dtype=)`` has it. What rounding loses
            shows in the receipts. Rows that are in 8 bits already are not rounded again. In 8 bits keys that come
            again in every epoch lie with their rows each time.
        min_share: drop rows below this share of their step: the norm of the output gradient times that of the key,
            as part of the sum over all rows of the layer in the step. They are missing from then on: receipts say what
            the rest explains, the steps count as inexact, and every table names how many rows there were.
        sparse: keep rows that are mostly zeros without them, as ``instrument(sparse=True)`` does, or whole again; None:
            as the memory is, sparse if any of it is. Nothing is lost either way.
        segment_bytes: what a segment may grow to.
        on_bytes: called with the bytes that have been read, now and then.

    Raises:
        StoreError: there is no memory, it is damaged or being written, or the disk refused; it is as it was then.
        DualHookError: an argument of a wrong kind.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype == torch.int8)):
        raise DualHookError(f"dtype={dtype}: expected a floating-point torch.dtype or torch.int8 for the rows, or None")
    if not 0 <= min_share < 1:
        raise DualHookError(f"min_share={min_share}: expected a share of a step, from 0 (drop nothing) to below 1")
    if sparse is not None and not isinstance(sparse, bool):
        raise DualHookError(f"sparse={sparse!r}: expected True, False, or None to leave it as it is")
    if segment_bytes < 1:
        raise DualHookError(f"segment_bytes={segment_bytes}: expected a number of bytes above 0")
    compacted(Path(path), Saving(dtype, min_share, sparse), segment_bytes, on_bytes or (lambda count: None))
    return DualMemory(path)
