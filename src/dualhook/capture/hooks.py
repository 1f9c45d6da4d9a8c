"""What all hooks on a user's model have in common."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dualhook.host import HostBlocks

__all__ = ["OPEN_TO_ERRORS", "Guard", "Hook", "is_plain_call", "observing", "tapped"]


class Hook:
    """A hook of ours; its copy in a deep-copied or pickled model does nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _silent

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_silent, ()


class Guard:
    """A block of what torch calls, in which nothing that goes wrong reaches training unless the recorder says so.

    Tensors of our own are made in host memory in it.

    ``failed(error)``, a bound method, is told and returns whether training goes on. It is held weakly, and once there
    is no recorder any more nobody minds. Without it errors pass; all exceptions that are no ``Exception`` do, and
    warnings that somebody has made errors.
    """

    def __init__(self, failed: Callable[[Exception], bool] | None = None) -> None:
        self._failed = None if failed is None else weakref.WeakMethod(failed)

    def __enter__(self) -> None:
        _BLOCKS.enter()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        _BLOCKS.leave()
        if self._failed is None or not isinstance(error, Exception) or isinstance(error, Warning):
            return False
        failed = self._failed()
        return failed is None or failed(error)


_BLOCKS = HostBlocks()

OPEN_TO_ERRORS = Guard()
"""The guard of whoever is asked and does not train."""


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
