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

from dualhook.capture.hooks import Guard

__all__ = ["OPTIONS", "Caller", "compiled_tap", "forget_compiled_code", "register"]

Arrive = Callable[[Tensor], None]


class Caller(Protocol):
    """What a compiled call reports to; an intake is one."""

    guard: Guard

    def on_silent_call(self) -> None:
        """A call whose output gradient will come, if it comes, in the backward pass of an enclosing autograd node."""
        ...

    def on_compiled_call(self, key: Tensor, *, is_fixed: bool) -> Arrive | None:
        """What to do with the output gradient of a call on ``key``, ``is_fixed`` or trained for; None: nothing."""
        ...


_NUMBERS = itertools.count()
_CALLERS: weakref.WeakValueDictionary[int, Caller] = weakref.WeakValueDictionary()


def register(caller: Caller) -> int:
    """The number under which compiled code knows ``caller``; held weakly, the code may outlive it."""
    number = next(_NUMBERS)
    _CALLERS[number] = caller
    return number


def compiled_tap(output: Tensor, key: Tensor, number: int) -> Tensor:
    """What stands for a layer's ``output`` [..., o] in a traced graph, so that its call on ``key`` [..., i] is seen."""
    # the cast that autocast has put before the layer, so that no second copy of the input waits for the backward pass
    number = number if key.requires_grad else ~number  # no trained weight has had a part in it
    key = key.detach().to(output.dtype) if key.is_floating_point() else key
    tapped: Tensor = torch.ops.dualhook.tap(output, key, number)
    return tapped


def forget_compiled_code() -> None:
    """Make torch trace again what it has compiled: it does not notice hooks that modules get afterwards.

    From here on it looks at hooks before it uses code again, also that of another model of the same class.
    """
    if "torch._dynamo.convert_frame" in sys.modules:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()


def _tap(output: Tensor, key: Tensor, number: int) -> Tensor:
    caller = _CALLERS.get(max(number, ~number))
    if caller is not None:
        with caller.guard:
            caller.on_silent_call()  # compiled code has one autograd node, in whose forward this runs
    return output.clone()


def _taken(output_grad: Tensor, key: Tensor, number: int) -> Tensor:
    caller = _CALLERS.get(max(number, ~number))
    if caller is not None:
        with caller.guard:
            arrive = caller.on_compiled_call(key.clone(), is_fixed=number < 0)
            if arrive is not None:
                arrive(output_grad.clone())
    return output_grad.clone()


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    _, key, ctx.number = inputs
    ctx.save_for_backward(key)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, output_grad: Tensor | None) -> tuple[Tensor | None, None, None]:
    if output_grad is None:
        return None, None, None
    return torch.ops.dualhook.taken(output_grad, *ctx.saved_tensors, ctx.number), None, None


# a CUDA graph would replay the copies and not the Python beside them
OPTIONS: Any = {"mutates_args": ()}
if hasattr(torch.Tag, "cudagraph_unsafe"):
    OPTIONS["tags"] = (torch.Tag.cudagraph_unsafe,)

_TAP = torch.library.custom_op(
    "dualhook::tap", _tap, schema="(Tensor output, Tensor key, SymInt number) -> Tensor", **OPTIONS
)
_TAKEN = torch.library.custom_op(
    "dualhook::taken",
    _taken,
    schema="(Tensor output_grad, Tensor key, SymInt number) -> Tensor",
    **OPTIONS,
)
_TAP.register_fake(lambda output, key, number: torch.empty_like(output))
_TAKEN.register_fake(lambda output_grad, key, number: torch.empty_like(output_grad))
_TAP.register_autograd(_backward, setup_context=_save)
