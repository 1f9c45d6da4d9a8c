"""A device that is not the processor, played by it: tensors that say they are elsewhere and hold their numbers here.

Whoever lets them meet tensors of the processor, or looks at their memory, gets the error that a CUDA device would give.
Copies are made by ``.cpu()`` and ``.to``, as ever. In :func:`elsewhere` everything made on ``DEVICE`` is such a tensor,
and the recorder's copies come late, as a CUDA stream's do.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from dualhook.host import default_device

DEVICE = torch.device("meta")  # autograd needs no queue of its own for it, as it would for another

MOVES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default, torch.ops.aten.index.Tensor,
         torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default,
         torch.ops.aten._index_put_impl_.default}  # fmt: skip
"""What takes tensors of both: copies, and indices of the processor's."""


class Elsewhere(Tensor):
    """A tensor on ``DEVICE``; its numbers are in ``held``."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Elsewhere({self.held!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        WAITS.append(places())
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


WAITS: list[list[str]] = []
"""Where this package was, innermost first, each time that training had to wait for ``DEVICE``."""


def places() -> list[str]:
    """The frames of the package that are running, as ``file:line``."""
    frames = reversed(traceback.extract_stack())
    return [f"{Path(one.filename).name}:{one.lineno}" for one in frames if "/src/dualhook/" in one.filename]


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on what its tensors hold; its results are where they are."""
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = [value for value in given if isinstance(value, Elsewhere)]
    if there and func not in MOVES and any(value.dim() for value in given if not isinstance(value, Elsewhere)):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {DEVICE} and cpu")
    asked = kwargs.get("device")
    if func is torch.ops.aten._local_scalar_dense.default:
        stays = False
    elif func is torch.ops.aten.copy_.default or (func is torch.ops.aten._to_copy.default and asked is None):
        stays = isinstance(args[0], Elsewhere)
    elif asked is not None:
        stays = torch.device(asked).type == DEVICE.type
    else:
        stays = bool(there)
    if bool(there) != stays and (there or func in MOVES):  # from there, and to there from memory that is not pinned
        WAITS.append(places())
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(held_by, (args, kwargs))
    if func is torch.ops.aten.histc.default and not args[0].is_floating_point():  # CUDA's takes whole numbers
        args = (args[0].double(), *args[1:])
    found = func(*args, **kwargs)
    if not stays:
        return found
    known = {id(value.held): value for value in there}  # what is changed in place stays the tensor it was

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Elsewhere(value)

    return tree_map(moved, found)


def held_by(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


class _Everywhere(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


class _FromNumbers(TorchFunctionMode):
    """``torch.tensor`` fills no tensor of ``DEVICE``: it is made here and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor):
            asked = torch.device(kwargs.get("device") or default_device() or "cpu")
            if asked.type == DEVICE.type:
                return func(*args, **{**kwargs, "device": torch.device("cpu")}).to(DEVICE)
        return func(*args, **kwargs)


class LateCourier:
    """Copies from ``DEVICE`` that have ended when so many others have begun; until then they are garbage."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.count = 0
        self._begun: list[tuple[Tensor, Tensor]] = []

    def copies(self, values: Sequence[Tensor]) -> list[Tensor]:
        self.count += 1
        garbage = [torch.full(one.shape, 77, dtype=one.dtype, device="cpu") for one in values]
        self._begun += zip(values, garbage, strict=True)
        return garbage

    def done(self) -> Late:
        begun, self._begun = self._begun, []
        return Late(self, begun)


class Late:
    """What tells of copies of a courier."""

    def __init__(self, courier: LateCourier, copies: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._courier = courier
        self._copies = copies
        self._ends_at = courier.count + courier.lag

    def query(self) -> bool:
        if has_ended := self._courier.count >= self._ends_at:
            self.synchronize()
        return has_ended

    def synchronize(self) -> None:
        for here, there in self._copies:  # as they are now: nobody may have written to them
            there.copy_(here.held)
        self._copies = []


@contextmanager
def elsewhere(lag: int = 9) -> Iterator[torch.device]:
    """A block in which ``DEVICE`` is one that holds numbers; they come to the host some steps later."""

    def courier_of(device: torch.device) -> LateCourier | None:
        return LateCourier(lag) if device.type == DEVICE.type else None

    with _Everywhere(), _FromNumbers(), mock.patch("dualhook.recorder.staging.courier_of", courier_of):
        yield DEVICE


@contextmanager
def placed() -> Iterator[None]:
    """A block whose tensors are made on the device that DUALHOOK_DEVICE names: ``cuda``, or ``elsewhere``."""
    name = os.environ.get("DUALHOOK_DEVICE")
    if name == "elsewhere":
        with elsewhere() as device, device:
            yield
    elif name == "cuda":  # cuDNN's convolutions are made of fewer digits, and not always in one order, unless told
        with torch.device(name), torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
            yield
    else:
        yield


def generator(seed: int) -> torch.Generator:
    """Random numbers for the default device."""
    device = default_device()
    is_cuda = device is not None and device.type == "cuda"
    return torch.Generator("cuda" if is_cuda else "cpu").manual_seed(seed)
