"""The tap on ``nn.Linear``: a forward hook that hooks its own output's gradient.

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

from dualhook.capture.compiled import compiled_tap
from dualhook.records import NO_SAMPLE, Batch, Rows

__all__ = ["LinearTap", "as_rows", "call_input", "nonzero_rows", "produced", "tapped"]


class Listener(Protocol):
    """What a tap reports to; an intake is one."""

    number: int  # which one it is in code that torch compiles

    def on_call(self, key: Tensor) -> Callable[[Tensor], None] | None:
        """A differentiable call on ``key`` [..., i]: what to do with ∂L/∂y when it arrives, or None."""
        ...

    def on_silent_call(self) -> None:
        """A call without gradients, which a backward pass may repeat."""
        ...


class LinearTap:
    """Reports every call of one linear map that a gradient may come back to.

    A copy of the tap (in a deep-copied or pickled model) reports nothing.
    """

    def __init__(self, module: nn.Module, listener: Listener) -> None:
        self._module = weakref.ref(module)
        self._listener = listener

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
            return compiled_tap(output, call_input(args, kwargs), self._listener.number)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return None  # torch.func gives gradients back and accumulates none
        if not torch.is_grad_enabled():
            self._listener.on_silent_call()
        elif output.requires_grad:
            on_grad = self._listener.on_call(call_input(args, kwargs))
            if on_grad is not None:
                _hook_gradient(output, on_grad)
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return silent

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_silent, ()


def produced(output: Tensor) -> Tensor:
    """The tensor that the linear map itself has made, which ``output`` may only be a view of.

    Before torch 2.15 inputs of three and more dimensions give a view, and changing that in place (an activation right
    behind the layer) takes the view's node out of the graph, hooks and all; the node of its base stays.
    """
    base = output._base
    return base if base is not None and base.grad_fn is not None and base.numel() == output.numel() else output


def _hook_gradient(output: Tensor, on_grad: Callable[[Tensor], None]) -> None:
    """Call ``on_grad`` with ∂L/∂output as the linear map's node gets it.

    That is before anything that changes the output in place, and after the hooks that the output itself carries.
    """
    source, shape = produced(output), output.shape
    node, number = source.grad_fn, source.output_nr
    if node is None:  # made by a forward of the user's own that returns a leaf
        output.register_hook(on_grad)  # type: ignore[no-untyped-call]
        return

    def on_node(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[number]
        if gradient is not None:
            on_grad(gradient.reshape(shape))

    node.register_prehook(on_node)


def silent(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
    """What a tap becomes in a copy of the model: a hook that does nothing."""


def _make_silent() -> Callable[..., None]:
    return silent


def tapped(model: nn.Module) -> bool:
    """Whether a recorder is attached to any part of the model."""
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    return any(isinstance(hook, LinearTap) for hook in hooks)


def call_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a call to a linear map, however it was passed."""
    x = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(x, Tensor)
    return x


def as_rows(key: Tensor, output_grad: Tensor, batch: Batch | None) -> Rows:
    """The rows of one call: ``key`` [..., i] and ``output_grad`` [..., o] flattened, with their coordinates.

    The first dimension counts the samples if its length is the batch's; the dimensions between are the position.
    Rows whose output gradient is exactly zero are left out: they add nothing to any weight.
    """
    count = output_grad.numel() // output_grad.shape[-1] if output_grad.numel() else 0
    samples = output_grad.shape[0] if output_grad.dim() > 1 else 1
    positions = count // samples if samples else 0
    sample = torch.full((count,), NO_SAMPLE)
    columns = {}
    if batch is not None and batch.samples.numel() == samples:
        sample = batch.samples.repeat_interleave(positions)
        columns = {name: values.repeat_interleave(positions) for name, values in batch.columns.items()}
    rows = Rows(
        # under autocast the map ran on the input cast to the output's dtype
        key.reshape(count, key.shape[-1]).to(output_grad.dtype),
        output_grad.reshape(count, output_grad.shape[-1]),
        torch.zeros_like(sample),  # the step is known when one uses the rows
        sample,
        torch.arange(positions).expand(samples, positions).reshape(-1),
        columns,
    )
    # on a CUDA device the look at the numbers would make training wait: it is taken where they have come to the host
    return rows if rows.key.is_cuda else nonzero_rows(rows)


def nonzero_rows(rows: Rows) -> Rows:
    """The rows whose output gradient is not exactly zero."""
    used = rows.output_grad.abs().amax(dim=1) != 0 if len(rows) else rows.sample.bool()  # three times as fast as any()
    return rows if bool(used.all()) else _chosen(rows, used.nonzero().squeeze(1))


def _chosen(rows: Rows, index: Tensor) -> Rows:
    there = index.cpu()
    return Rows(
        rows.key[index],
        rows.output_grad[index],
        rows.step[there],
        rows.sample[there],
        rows.position[there],
        {name: values[there] for name, values in rows.columns.items()},
    )
