"""The tap on a module: a forward hook that hooks its own output's gradient.

Pairing is by closure: the gradient hook holds the input of the very call that made the output, so a module may be
called any number of times, its output modified in place, half of its calls unused. A full backward hook would break
on the in-place ReLUs of torchvision's AlexNet and VGG heads.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dualhook.capture.calls import Call, compiled_input, module_call
from dualhook.capture.compiled import compiled_tap
from dualhook.capture.hooks import Guard, Hook
from dualhook.records import LayerSpec

__all__ = ["Listener", "ModuleTap", "hook_gradient", "produced", "report"]


class Listener(Protocol):
    """What a tap reports to; an intake is one."""

    spec: LayerSpec
    guard: Guard
    number: int  # which one it is in code that torch compiles

    def on_call(self, call: Call) -> Callable[[Tensor], None] | None:
        """A differentiable call: what to do with ∂L/∂y when it arrives, or None."""
        ...

    def on_late_call(self) -> Callable[[Call, Tensor], None] | None:
        """A differentiable call whose rows are known with their gradients only: what to do with both."""
        ...

    def on_silent_call(self) -> None:
        """A call without gradients, which a backward pass may repeat."""
        ...

    def on_output(self, call: Call, output: Tensor) -> Tensor | None:
        """What the call has made; a tensor to go on with in its place, or None."""
        ...


class ModuleTap(Hook):
    """Reports every call of one linear map that a gradient may come back to."""

    def __init__(self, module: nn.Module, listener: Listener, *, has_own_forward: bool = False) -> None:
        self._module = weakref.ref(module)
        self._listener = listener
        self._has_own_forward = has_own_forward
        self._seen: weakref.ref[Tensor] | None = None  # an output that has been reported from inside the module
        self._seen_place = 0  # where the numbers of one lie that compiled code has reported
        self.is_seen_inside = has_own_forward
        """Whether in compiled code the function inside is left to tell."""

    def attach(self) -> RemovableHandle:
        """Hook the module, before any other forward hook could replace its output."""
        module = self._module()
        assert module is not None
        return module.register_forward_hook(self, prepend=True, with_kwargs=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor | None:
        if module is not self._module():
            return None
        if torch.compiler.is_compiling():
            if self.is_seen_inside:
                return None
            key = compiled_input(module, args, kwargs)
            return None if key is None else compiled_tap(output, key, self._listener.number)
        if self._seen_place and self._seen_place == output.data_ptr():
            self._seen_place = 0
            return None
        if self._seen is not None:
            seen, self._seen = self._seen(), None
            if seen is output or self._has_own_forward:
                return None
        return report(self._listener, lambda: module_call(module, self._listener.spec, args, kwargs), output)

    def saw(self, output: Tensor) -> None:
        """The output of a functional call has been reported: not to be again, if it is the module's own."""
        self._seen = weakref.ref(output)

    def saw_compiled(self, output: Tensor) -> None:
        """The same in compiled code, of which only the inside of the module may be a part."""
        self._seen_place = output.data_ptr()


def produced(output: Tensor) -> Tensor:
    """The tensor that the linear map itself has made, which ``output`` may only be a view of.

    Before torch 2.15 inputs of three and more dimensions give a view, and changing that in place (an activation right
    behind the layer) takes the view's node out of the graph, hooks and all; the node of its base stays.
    """
    base = output._base
    return base if base is not None and base.grad_fn is not None and base.numel() == output.numel() else output


def report(listener: Listener, made: Callable[[], Call], output: Tensor) -> Tensor | None:
    """Tell a listener of a call that has made ``output``; what is to take the output's place, or None."""
    with listener.guard:
        return _reported(listener, made, output)
    return None


def _reported(listener: Listener, made: Callable[[], Call], output: Tensor) -> Tensor | None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None  # torch.func gives gradients back and accumulates none
    if not torch.is_grad_enabled():
        listener.on_silent_call()
        return None
    call = made()
    replaced = listener.on_output(call, output)
    output = output if replaced is None else replaced
    if output.requires_grad:
        on_grad = listener.on_call(call)
        if on_grad is not None:
            hook_gradient(output, on_grad, listener.guard)
    return replaced


def hook_gradient(output: Tensor, on_grad: Callable[[Tensor], None], guard: Guard) -> None:
    """Call ``on_grad``, guarded, with ∂L/∂output as the linear map's node gets it.

    That is before anything that changes the output in place, and after the hooks that the output itself carries.
    """
    source, shape = produced(output), output.shape
    node, number = source.grad_fn, source.output_nr
    if node is None:  # made by a forward of the user's own that returns a leaf

        def on_leaf(gradient: Tensor) -> None:
            with guard:
                on_grad(gradient)

        output.register_hook(on_leaf)  # type: ignore[no-untyped-call]
        return

    def on_node(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[number]
        if gradient is not None:
            with guard:
                on_grad(gradient.reshape(shape))

    node.register_prehook(on_node)
