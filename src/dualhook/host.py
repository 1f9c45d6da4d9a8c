"""Our own tensors are made in host memory, whatever default device the user has set.

``torch.set_default_device("cuda")`` and ``with torch.device("cuda")`` are the calling thread's: hooks, steps and
questions run under them. What a model makes of its own when it is asked belongs where the user wants it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from types import FunctionType
from typing import ParamSpec, TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

__all__ = ["HostBlocks", "asked_on_host", "default_device", "on_default_device", "on_host"]

P = ParamSpec("P")
T = TypeVar("T")


class _Users(threading.local):
    device: torch.device | None = None  # the default outside of our own blocks


_USERS = _Users()


def default_device() -> torch.device | None:
    """The default device that is set in this thread, if any; torch 2.6 itself does not tell of one set by ``with``."""
    if torch._C._len_torch_function_stack():
        for mode in reversed(_get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
            if isinstance(mode, DeviceContext):
                found: torch.device = mode.device
                return found
    return None


@contextmanager
def on_host() -> Iterator[None]:
    """A block, or a function, whose tensors are made in host memory unless it names a device."""
    before, device = _USERS.device, default_device()
    if device is None:
        yield
        return
    with torch.device("cpu"):
        _USERS.device = device if before is None else before
        try:
            yield
        finally:
            _USERS.device = before


@contextmanager
def on_default_device() -> Iterator[None]:
    """Within :func:`on_host`, a block with the user's own default device again."""
    device, _USERS.device = _USERS.device, None
    try:
        with nullcontext() if device is None else device:
            yield
    finally:
        _USERS.device = device


class HostBlocks(threading.local):
    """The same for what is entered and left many times a step: next to nothing where no default device is set."""

    def __init__(self) -> None:
        self._open: list[torch.device | None] = []

    def enter(self) -> None:
        """Begin a block."""
        device = None if default_device() is None else torch.device("cpu")
        if device is not None:
            device.__enter__()
        self._open.append(device)

    def leave(self) -> None:
        """End the block that was begun last."""
        device = self._open.pop()
        if device is not None:
            device.__exit__(None, None, None)


def asked_on_host(cls: type[T]) -> type[T]:
    """A class whose public methods and properties work on the host."""
    for name, member in list(vars(cls).items()):
        if name.startswith("_"):
            continue
        if isinstance(member, FunctionType):
            setattr(cls, name, _hosted(member))
        elif isinstance(member, property) and member.fget is not None:
            setattr(cls, name, property(_hosted(member.fget), member.fset, member.fdel, member.__doc__))
    return cls


def _hosted(function: Callable[P, T]) -> Callable[P, T]:
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with on_host():
            return function(*args, **kwargs)

    return call
