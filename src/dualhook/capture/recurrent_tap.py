"""The tap on a recurrent layer: its products' rows come from a recomputation in the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dualhook.capture.calls import Call, Places
from dualhook.capture.hooks import Hook
from dualhook.capture.recurrent import Ambient, NotRecomputableError, fingerprint, gate_rows, on_output_grads
from dualhook.capture.taps import Listener
from dualhook.capture.unrolled import Hidden, Product, flat, recurrent_weights, unrolled

__all__ = ["RecurrentTap", "written_out"]


class RecurrentTap(Hook):
    """Reports the products of one recurrent module, each weight's to its own of the ``listeners``."""

    def __init__(self, module: nn.Module, listeners: Mapping[str, Listener]) -> None:
        self._module = weakref.ref(module)
        self._listeners = listeners
        self._guard = next(iter(listeners.values())).guard
        self._ambient = Ambient()

    def attach(self) -> list[RemovableHandle]:
        """Hook the module before and after its forward pass."""
        module = self._module()
        assert module is not None
        return [
            module.register_forward_pre_hook(_Before(self), prepend=True, with_kwargs=True),
            module.register_forward_hook(self, prepend=True, with_kwargs=True),
        ]

    def before(self, args: Sequence[Any], kwargs: Mapping[str, Any], module: nn.Module) -> None:
        """Note what the call that comes will draw on."""
        with self._guard:
            self._ambient = Ambient.now(module, flat(_arguments(args, kwargs)[0])[0].device)

    def __call__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any) -> Any:
        if module is not self._module() or torch.compiler.is_compiling():
            return None
        with self._guard:
            return self._reported(module, args, kwargs, outputs)
        return None

    def _reported(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Any) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return None
        if not torch.is_grad_enabled():
            for listener in self._listeners.values():
                listener.on_silent_call()
            return None
        if not any(output.requires_grad for output in flat(outputs)):
            return None
        input, hx = _arguments(args, kwargs)
        weights, ambient, seen = recurrent_weights(module), self._ambient, fingerprint(flat(outputs))
        on_grads = self._on_grads(module, input, hx, weights, ambient, seen)
        return None if on_grads is None else on_output_grads(outputs, on_grads)

    def _on_grads(
        self,
        module: nn.Module,
        input: Any,
        hx: Hidden,
        weights: Mapping[str, Tensor],
        ambient: Ambient,
        seen: Sequence[Tensor],
    ) -> Callable[[tuple[Tensor | None, ...]], None] | None:
        size = _samples(module, input)
        calls = {name: listener.on_late_call() for name, listener in self._listeners.items()}
        if all(arrive is None for arrive in calls.values()):
            return None

        def on_grads(gradients: tuple[Tensor | None, ...]) -> None:
            try:
                found = gate_rows(module, input, hx, gradients, weights, ambient=ambient, expected=seen)
            except NotRecomputableError:
                return  # the probe will say that rows are missing
            for rows in found:
                arrive = calls.get(rows.weight)
                if arrive is not None:
                    places = Places(rows.sample, size, rows.position)
                    arrive(Call(rows.key, places=places), rows.output_grad)

        def guarded(gradients: tuple[Tensor | None, ...]) -> None:
            with self._guard:
                on_grads(gradients)

        return guarded


class _Before(Hook):
    def __init__(self, tap: RecurrentTap) -> None:
        self._tap = tap

    def __call__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._tap.before(args, kwargs, module)


def written_out(module: nn.Module, listeners: Mapping[str, Listener]) -> Callable[..., Any]:
    """A forward pass for the module in which every product is a call that is reported."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        input, hx = _arguments(args, kwargs)
        size = _samples(module, input)
        made: list[Product] = []
        result = unrolled(module, input, hx, linear=_observable, products=made)
        for product in made:
            if product.weight in listeners:
                call = Call(product.key, places=Places(product.sample, size, product.position))
                listeners[product.weight].on_output(call, product.output)
        return result

    return forward


def _observable(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` whose output is in the graph, also of a frozen layer."""
    output = torch.nn.functional.linear(x, weight, bias)
    return output if output.requires_grad or not torch.is_grad_enabled() else output.detach().requires_grad_().clone()


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    both = [*args, *kwargs.values(), None]
    return both[0], both[1]


def _samples(module: nn.Module, input: Any) -> int:
    """The number of samples in a call."""
    if isinstance(input, Tensor):
        if not isinstance(module, nn.RNNBase):
            return int(input.shape[0]) if input.dim() == 2 else 1
        return int(input.shape[0 if module.batch_first else 1]) if input.dim() == 3 else 1
    return int(input.batch_sizes[0])
