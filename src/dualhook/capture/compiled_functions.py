"""Functions on parameters in code that torch compiles.

A custom operator behind the function gets what it was given: which parameter that is, or a view of which, is asked as
the code runs, by where its numbers lie.
"""

from __future__ import annotations

import ast
import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from dualhook.capture.calls import Call, Places, embedding_call
from dualhook.capture.compiled import OPTIONS
from dualhook.capture.sites import Site, grouped_call, has_settings, linear_call

__all__ = ["OPEN", "compiled_convolution", "compiled_embedding", "compiled_grouped", "compiled_linear"]


class HasSites(Protocol):
    """Somebody who is to be told of the uses that compiled code makes of parameters."""

    sites: Sequence[Site]

    def begin(self) -> None:
        """Code is about to be compiled."""
        ...


OPEN: weakref.WeakSet[HasSites] = weakref.WeakSet()
"""Those who are told, as long as they are there."""


def compiled_linear(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What stands for the output of ``F.linear`` in a traced graph."""
    output = _tapped(output, input.detach().to(output.dtype), weight, "linear")
    return output if bias is None else _tapped(output, output.new_ones(*output.shape[:-1], 1), bias, "bias")


def compiled_embedding(output: Tensor, ids: Tensor, weight: Tensor, padding: int | None, scaled: bool) -> Tensor:
    """What stands for the output of ``F.embedding`` in a traced graph."""
    return _tapped(output, ids, weight, "embedding by frequency" if scaled else "embedding", padding=padding)


def compiled_grouped(output: Tensor, input: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """What stands for the output of ``F.grouped_mm`` in a traced graph."""
    return _tapped(output, input.detach().to(output.dtype), weight, "experts", offsets=offsets)


def compiled_convolution(output: Tensor, input: Tensor, weight: Tensor, settings: Mapping[str, Any]) -> Tensor:
    """What stands for the output of ``F.conv2d`` and its like in a traced graph."""
    return _tapped(output, input.detach().to(output.dtype), weight, f"conv {settings}")


def _tapped(
    output: Tensor, input: Tensor, weight: Tensor, what: str, offsets: Tensor | None = None, padding: int | None = None
) -> Tensor:
    tapped: Tensor = torch.ops.dualhook.tap_function(output, input, weight.detach(), offsets, padding, what)
    return tapped


KINDS = {
    "linear": ("linear", "experts"),
    "bias": ("bias",),
    "embedding": ("embedding",),
    "embedding by frequency": ("embedding",),
    "experts": ("experts", "transposed_experts"),
    "conv": ("conv",),
}
"""The kinds of layers whose weight each function uses."""


def _site_of(weight: Tensor, what: str) -> Site | None:
    """The use of a parameter that a function makes of ``weight``; None if it is not recorded."""
    place, settings = weight.untyped_storage().data_ptr(), None
    if what.startswith("conv "):
        what, settings = "conv", ast.literal_eval(what.removeprefix("conv "))
    for site in itertools.chain(*(one.sites for one in list(OPEN))):
        own = site.tapped.weight
        if own is None or site.tapped.spec.kind not in KINDS[what]:
            continue
        inside = 0 <= weight.storage_offset() - own.storage_offset() < own.numel()  # several may share one storage
        if inside and own.device == weight.device and own.untyped_storage().data_ptr() == place:
            return site if settings is None or has_settings(site.tapped.module, settings) else None
    return None


def _tap(
    output: Tensor, input: Tensor, weight: Tensor, offsets: Tensor | None, padding: int | None, what: str
) -> Tensor:
    site, output = _site_of(weight, what), output.clone()
    if site is not None:
        with site.listener.guard:
            site.listener.on_silent_call()  # compiled code has one autograd node, in whose forward this runs
            if site.tap is not None:
                site.tap.saw_compiled(output)
    return output


def _taken(
    output_grad: Tensor, input: Tensor, weight: Tensor, offsets: Tensor | None, padding: int | None, what: str
) -> Tensor:
    site = _site_of(weight, what)
    if site is not None:
        with site.listener.guard:
            call = _call(site, input.clone(), weight, offsets, padding, what)
            arrive = site.listener.on_call(replace(call, is_fixed=False))  # it is off the graph: nobody knows
            if arrive is not None:
                arrive(output_grad.clone())
    return output_grad.clone()


def _call(site: Site, input: Tensor, weight: Tensor, offsets: Tensor | None, padding: int | None, what: str) -> Call:
    tapped = site.tapped
    if tapped.spec.kind == "conv":
        return Call(input)
    if tapped.spec.kind == "embedding":
        return embedding_call(input, weight.dtype, padding, what != "embedding")
    number = torch.arange(len(input))  # whose rows an expert is given, compiled code does not tell
    unknown = Places(torch.full_like(number, -1), 0, number)
    if offsets is not None:
        return grouped_call(tapped.spec, input, offsets, unknown)
    assert tapped.weight is not None
    return linear_call(tapped, tapped.weight, weight, input, unknown if tapped.spec.kind == "experts" else None)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *tensors, ctx.padding, ctx.what = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, output_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 5
    if output_grad is None:
        return None, *nothing
    return torch.ops.dualhook.function_taken(output_grad, *ctx.saved_tensors, ctx.padding, ctx.what), *nothing


_ARGUMENTS = "Tensor input, Tensor weight, Tensor? offsets, SymInt? padding, str what) -> Tensor"
_TAP = torch.library.custom_op("dualhook::tap_function", _tap, schema=f"(Tensor output, {_ARGUMENTS}", **OPTIONS)
_TAKEN = torch.library.custom_op(
    "dualhook::function_taken", _taken, schema=f"(Tensor output_grad, {_ARGUMENTS}", **OPTIONS
)
_TAP.register_fake(lambda output, *rest: torch.empty_like(output))
_TAKEN.register_fake(lambda output_grad, *rest: torch.empty_like(output_grad))
_TAP.register_autograd(_backward, setup_context=_save)
