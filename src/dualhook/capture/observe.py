"""Watches one forward and backward pass from outside training: what the recorded layers saw for a question."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dualhook.capture.calls import Call, call_input
from dualhook.capture.hooks import OPEN_TO_ERRORS, observing
from dualhook.capture.installing import install
from dualhook.capture.kinds import Tapped
from dualhook.capture.recurrent_tap import written_out
from dualhook.capture.taps import produced
from dualhook.errors import LayerError
from dualhook.records import LayerSpec

__all__ = ["Observed", "directions", "observe"]


@dataclass(frozen=True)
class Observed:
    """One call of a layer, and where in the autograd graph its output [..., o] came about."""

    call: Call
    shape: torch.Size
    edge: GradientEdge | None


def directions(scores: Tensor, calls: Sequence[Observed]) -> list[Tensor]:
    """The gradient [..., o] of the sum of ``scores`` at the output of every call, zero where it does not matter.

    The edges were taken before anything could change the outputs in place; no parameter's ``grad`` is touched,
    and the graph is kept.
    """
    edges = [call.edge for call in calls if call.edge is not None]
    found: Iterator[Tensor | None] = iter(())
    if edges and scores.requires_grad:
        found = iter(torch.autograd.grad(scores.sum(), edges, retain_graph=True, allow_unused=True))
    gradients = [next(found, None) if call.edge is not None else None for call in calls]
    return [
        scores.new_zeros(call.shape) if gradient is None else gradient.reshape(call.shape)
        for call, gradient in zip(calls, gradients, strict=True)
    ]


class _Observer:
    """Notes the calls of one layer in place of an intake."""

    guard = OPEN_TO_ERRORS
    number = -1

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        self.calls: list[Observed] = []

    def on_call(self, call: Call) -> None:
        return None

    def on_late_call(self) -> None:
        return None

    def on_silent_call(self) -> None:
        return None

    def on_output(self, call: Call, output: Tensor) -> Tensor | None:
        replaced = None
        if torch.is_grad_enabled() and not output.requires_grad:
            # a frozen model: start the graph here, and not with a leaf, which could not be changed in place
            output = replaced = output.detach().requires_grad_().clone()
        edge = get_gradient_edge(produced(output)) if output.requires_grad else None
        self.calls.append(Observed(call.owned(copy=False), output.shape, edge))
        return replaced


def _width_check(spec: LayerSpec) -> Callable[..., None]:
    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        width = call_input(args, kwargs).shape[-1]
        if width != spec.in_features:
            raise LayerError(
                f"layer {spec.name!r} got inputs of width {width}, expected {spec.in_features}: "
                "shape the query like the training inputs"
            )

    return check


@contextmanager
def observe(model: nn.Module, layers: Iterable[Tapped]) -> Iterator[Mapping[str, Sequence[Observed]]]:
    """Note every call of the given layers of a model while the block runs; layers that share a weight are told apart.

    Recurrent layers run written out meanwhile, which gives the same within rounding.
    """
    layers = list(layers)
    observers = {tapped.spec.name: _Observer(tapped.spec) for tapped in layers}
    with ExitStack() as block:
        block.enter_context(observing())
        if hasattr(torch.backends, "mha"):  # the fast path of frozen transformers computes all in one
            was = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            block.callback(torch.backends.mha.set_fastpath_enabled, was)
        others = [tapped for tapped in layers if tapped.by != "recurrent"]
        for tapped in others:
            if tapped.by == "module" and tapped.spec.kind in ("linear", "transposed"):
                check = _width_check(tapped.spec)
                block.callback(tapped.module.register_forward_pre_hook(check, with_kwargs=True).remove)
        for handle in install(model, [(tapped, observers[tapped.spec.name]) for tapped in others]):
            block.callback(handle.remove)
        recurrent: dict[nn.Module, dict[str, _Observer]] = {}
        for tapped in layers:
            if tapped.by == "recurrent":
                recurrent.setdefault(tapped.module, {})[tapped.attributes[0]] = observers[tapped.spec.name]
        for module, own in recurrent.items():
            module.forward = written_out(module, own)
            block.callback(delattr, module, "forward")
        yield {name: observer.calls for name, observer in observers.items()}
