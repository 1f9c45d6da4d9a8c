"""The tap under ``torch.compile``: a custom operator behind the layer, since a Python hook on a gradient breaks graphs.

``tap`` hands the layer's output on and keeps its input for the backward pass; there ``taken`` gets the output gradient.
Both run as they are, outside the compiled code, also where their surroundings are fused; what they return is a copy,
as operators may not return what they were given, and so is what they keep, as compiled code uses its buffers again.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dualhook.records import Batch

__all__ = ["Caller", "compiled_tap", "forget_compiled_code", "register"]

RECENT = 256  # batches between their forward and their backward pass, at most
NOBODY = -1

Arrive = Callable[[Tensor], None]


class Caller(Protocol):
    """What a compiled call reports to; an intake is one."""

    def batch_of_call(self) -> Batch | None:
        """What the training loop is working on, as a forward pass sees it."""
        ...

    def on_silent_call(self) -> None:
        """A call without gradients, which a backward pass may repeat."""
        ...

    def expect(self, key: Tensor, batch: Batch | None) -> Arrive | None:
        """What to do with the output gradient of a call on ``key``; None: nothing."""
        ...


class _Recent:
    """The newest batches that compiled calls have seen, each with a number that a tensor can carry."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._batches: dict[int, Batch] = {}
        self._last = NOBODY

    def number(self, batch: Batch | None) -> int:
        if batch is None:
            return NOBODY
        if self._batches.get(self._last) is not batch:
            self._last = next(self._numbers)
            self._batches[self._last] = batch
            self._batches.pop(self._last - RECENT, None)
        return self._last

    def batch(self, number: int) -> Batch | None:
        return self._batches.get(number)


_NUMBERS = itertools.count()
_CALLERS: weakref.WeakValueDictionary[int, Caller] = weakref.WeakValueDictionary()
_RECENT = _Recent()


def register(caller: Caller) -> int:
    """The number under which compiled code knows ``caller``; held weakly, the code may outlive it."""
    number = next(_NUMBERS)
    _CALLERS[number] = caller
    return number


def compiled_tap(output: Tensor, key: Tensor, number: int) -> Tensor:
    """What stands for a layer's ``output`` [..., o] in a traced graph, so that its call on ``key`` [..., i] is seen."""
    # the cast that autocast has put before the layer, so that no second copy of the input waits for the backward pass
    tapped: Tensor = torch.ops.dualhook.tap(output, key.detach().to(output.dtype), number)[0]
    return tapped


def forget_compiled_code() -> None:
    """Make torch trace again what it has compiled: it does not notice hooks that modules get afterwards."""
    if "torch._dynamo.convert_frame" in sys.modules:
        torch._dynamo.reset()


def _tap(output: Tensor, key: Tensor, number: int) -> tuple[Tensor, Tensor]:
    caller = _CALLERS.get(number)
    batch = None if caller is None else caller.batch_of_call()
    if caller is not None and not torch.is_grad_enabled():
        caller.on_silent_call()
    return output.clone(), torch.tensor(_RECENT.number(batch))


def _taken(output_grad: Tensor, key: Tensor, batch: Tensor, number: int) -> Tensor:
    caller = _CALLERS.get(number)
    if caller is not None:
        arrive = caller.expect(key.clone(), _RECENT.batch(int(batch)))
        if arrive is not None:
            arrive(output_grad.clone())
    return output_grad.clone()


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    _, key, ctx.number = inputs
    ctx.save_for_backward(key, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, output_grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None]:
    if output_grad is None:
        return None, None, None
    key, batch = ctx.saved_tensors
    return torch.ops.dualhook.taken(output_grad, key, batch, ctx.number), None, None


# a CUDA graph would replay the copies and not the Python beside them
_OPTIONS: Any = {"mutates_args": ()}
if hasattr(torch.Tag, "cudagraph_unsafe"):  # torch 2.9 and newer; before, the tensor on the CPU keeps CUDA graphs away
    _OPTIONS["tags"] = torch.Tag.cudagraph_unsafe

_TAP = torch.library.custom_op(
    "dualhook::tap", _tap, schema="(Tensor output, Tensor key, SymInt number) -> (Tensor, Tensor)", **_OPTIONS
)
_TAKEN = torch.library.custom_op(
    "dualhook::taken",
    _taken,
    schema="(Tensor output_grad, Tensor key, Tensor batch, SymInt number) -> Tensor",
    **_OPTIONS,
)
_TAP.register_fake(lambda output, key, number: (torch.empty_like(output), torch.empty((), dtype=torch.int64)))
_TAKEN.register_fake(lambda output_grad, key, batch, number: torch.empty_like(output_grad))
_TAP.register_autograd(_backward, setup_context=_save)
