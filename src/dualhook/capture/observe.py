"""Watches one forward and backward pass from outside training: what the recorded layers saw for a question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dualhook.capture.linear import call_input, produced
from dualhook.errors import LayerError
from dualhook.records import LayerSpec

__all__ = ["Observed", "directions", "observe"]


@dataclass(frozen=True)
class Observed:
    """One call of a layer: its input [..., i], and where in the autograd graph its output [..., o] came about."""

    query: Tensor
    shape: torch.Size
    edge: GradientEdge | None


def directions(scores: Tensor, calls: Sequence[Observed]) -> list[Tensor]:
    """The gradient [..., o] of the sum of ``scores`` at the output of every call, zero where it does not matter.

    The edges were taken before anything could change the outputs in place; no parameter's ``grad`` is touched.
    """
    edges = [call.edge for call in calls if call.edge is not None]
    found = iter(torch.autograd.grad(scores.sum(), edges, allow_unused=True) if edges and scores.requires_grad else ())
    gradients = [next(found, None) if call.edge is not None else None for call in calls]
    return [
        call.query.new_zeros(call.shape) if gradient is None else gradient.reshape(call.shape)
        for call, gradient in zip(calls, gradients, strict=True)
    ]


@contextmanager
def observe(modules: Iterable[tuple[LayerSpec, nn.Module]]) -> Iterator[Mapping[str, Sequence[Observed]]]:
    """Note every call of the given layers while the block runs; layers that share a weight are one."""
    modules = list(modules)
    calls: dict[str, list[Observed]] = {spec.name: [] for spec, _ in modules}
    handles = []
    try:
        for spec, module in modules:
            handles.append(module.register_forward_pre_hook(_width_check(spec), with_kwargs=True))
            handles.append(module.register_forward_hook(_note(calls[spec.name]), prepend=True, with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _width_check(spec: LayerSpec) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        width = call_input(args, kwargs).shape[-1]
        if width != spec.in_features:
            raise LayerError(
                f"layer {spec.name!r} got inputs of width {width}, expected {spec.in_features}: "
                "shape the query like the training inputs"
            )

    return check


def _note(calls: list[Observed]) -> Callable[..., Tensor | None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        replaced = None
        if torch.is_grad_enabled() and not output.requires_grad:
            # a frozen model: start the graph here, and not with a leaf, which could not be changed in place
            output = replaced = output.detach().requires_grad_().clone()
        edge = get_gradient_edge(produced(output)) if output.requires_grad else None
        calls.append(Observed(call_input(args, kwargs).detach(), output.shape, edge))
        return replaced

    return note
