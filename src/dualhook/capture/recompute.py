"""Which batch a call belongs to that a backward pass runs again: gradient checkpointing.

By then the loop may be at another batch. Reentrant checkpointing first runs its part of the model without gradients,
in the ``forward`` of an autograd function whose node is the one that runs it again: the batch is noted on that node.
So it is on the node of compiled code, which hands all of its rows over in its own backward pass.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from dualhook.records import Batch

__all__ = ["note_batch", "noted_batch", "sequence_number"]

NOTE = "_dualhook_batches"  # on the node: what each sink was working on


def sequence_number() -> int:
    """The number that the next autograd node of this thread will get."""
    return int(torch._C._autograd._get_sequence_nr())


def note_batch(sink: object, batch: Batch | None) -> None:
    """Called inside the ``forward`` of autograd functions, if of any: note the batch on their nodes."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            node = frame.f_locals["ctx"]
            if isinstance(node, BackwardCFunction):
                node.__dict__.setdefault(NOTE, {}).setdefault(id(sink), batch)


def noted_batch(sink: object, batch: Batch | None, since: int) -> Batch | None:
    """The batch of a call that the current backward pass makes; None if it cannot be told.

    ``batch`` is what ``sink`` works on now, and has since autograd nodes had the number ``since``.
    """
    node: Any = torch._C._current_autograd_node()
    notes = getattr(node, NOTE, {})
    if id(sink) in notes:
        found: Batch | None = notes[id(sink)]
        return found
    return batch if node is not None and node._sequence_nr() >= since else None
