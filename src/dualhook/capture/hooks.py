"""What all hooks on a user's model have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["Hook", "is_plain_call", "observing", "tapped"]


class Hook:
    """A hook of ours; its copy in a deep-copied or pickled model does nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _silent

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_silent, ()


def _silent(*args: Any, **kwargs: Any) -> None:
    """A hook that does nothing."""


def _make_silent() -> Callable[..., None]:
    return _silent


def tapped(model: nn.Module) -> bool:
    """Whether a recorder is attached to any part of the model."""
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    return any(isinstance(hook, Hook) for hook in hooks)


class _Observing(threading.local):
    depth = 0


_OBSERVING = _Observing()


@contextmanager
def observing() -> Iterator[None]:
    """A block in which models run to be asked, in this thread, and not to train."""
    _OBSERVING.depth += 1
    try:
        yield
    finally:
        _OBSERVING.depth -= 1


def is_plain_call() -> bool:
    """Whether a model that is called now may be training: neither traced, nor transformed, nor asked."""
    traced = torch.compiler.is_compiling()
    return not (traced or _OBSERVING.depth or torch._C._functorch.peek_interpreter_stack() is not None)
