"""The two things about a running backward pass that torch tells only through its internals.

Both are what torch.utils.checkpoint, DDP and FSDP themselves build on, unchanged since torch 2.0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["at_task_end", "current_task"]


def current_task() -> int:
    """Number of the backward pass this thread is in, -1 outside one; a nested pass has its own number."""
    return int(torch._C._current_graph_task_id())


def at_task_end(callback: Callable[[], None]) -> None:
    """Call ``callback`` when the current backward pass has finished, gradients accumulated."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)
