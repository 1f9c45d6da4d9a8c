"""Which parameters of a model are linear maps, of what kind, and where they are used."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from dualhook.records import LayerSpec

__all__ = ["ROOT", "Tapped", "linear_maps"]

ROOT = "(model)"  # the layer name of a model that is itself a linear map
NO_MAPS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, ParametrizationList)
STOCK = (nn.Linear, nn.Embedding)
SEQUENCES = (nn.MultiheadAttention, nn.RNNBase)


@dataclass(frozen=True)
class Tapped:
    """One linear map of a model: the module that holds its parameters, and how its calls are seen.

    ``by``: ``"module"`` (a hook on the module), ``"function"`` (the module uses its parameter in a function such as
    ``F.linear``), ``"recurrent"`` (one fused operation of many products). ``attributes`` are the parameters' names in
    the module, ``reason`` says why it cannot be recorded, ``is_default`` whether it is recorded unless asked otherwise.
    """

    spec: LayerSpec
    module: nn.Module
    path: str
    attributes: tuple[str, ...]
    by: str = "module"
    is_default: bool = True
    is_sequence_first: bool | None = None
    reason: str = ""
    is_provisional: bool = False
    """Whether it is one only if the first forward pass shows it: a further use of an embedding's weight."""

    @property
    def has_own_forward(self) -> bool:
        """Whether the module's class computes something else around its linear map: the function inside is it."""
        stock = next((kind for kind in STOCK if isinstance(self.module, kind)), None)
        return stock is not None and type(self.module).forward is not stock.forward

    @property
    def weight(self) -> Tensor | None:
        """The parameter; None where it is computed from others."""
        return self.module._parameters.get(self.attributes[0])


@dataclass
class _Finder:
    names: dict[int, str]
    hints: dict[str, bool] = field(default_factory=dict)

    def make(
        self,
        module: nn.Module,
        path: str,
        name: str,
        attributes: tuple[str, ...],
        shape: tuple[int, int],
        kind: str,
        *,
        slots: int = 1,
        by: str = "module",
        default: bool = True,
        reason: str = "",
        options: dict[str, Any] | None = None,
    ) -> Tapped:
        parameters = [module._parameters.get(attribute) for attribute in attributes]
        there = tuple(a for a, p in zip(attributes, parameters, strict=True) if p is not None)
        full = [f"{path}.{attribute}" if path else attribute for attribute in attributes]
        named = [full[k] if p is None else self.names.get(id(p), full[k]) for k, p in enumerate(parameters)]
        bias = named[1] if len(attributes) > 1 and parameters[1] is not None else None
        spec = LayerSpec(name or ROOT, shape[1], shape[0], named[0], bias, kind, slots, options or {})
        weight = parameters[0]
        if not reason and weight is None:
            reason = "its weight is computed from other parameters (a parametrisation; not recorded yet)"
        if not reason and isinstance(weight, UninitializedParameter):
            reason = "its shape is not known before the first forward pass: run one, then instrument"
        if not reason and weight is not None and not weight.is_floating_point():
            reason = f"weights of dtype {weight.dtype} are not recorded"
        first = self._is_sequence_first(module, path)
        return Tapped(spec, module, path, there or attributes[:1], by, default, first, reason)

    def _is_sequence_first(self, module: nn.Module, path: str) -> bool | None:
        """What the nearest module around says of the order of its dimensions."""
        if isinstance(module, nn.MultiheadAttention):
            return True  # inside, whatever it is given
        while True:
            if path in self.hints:
                return self.hints[path]
            if not path:
                return None
            path = path.rpartition(".")[0]


def linear_maps(model: nn.Module) -> list[Tapped]:
    """Every linear map that some parameter of the model may be, in the model's order, recordable or not."""
    finder = _Finder({id(parameter): name for name, parameter in model.named_parameters()})
    for path, module in model.named_modules():
        batch_first = getattr(module, "batch_first", None)
        if isinstance(module, SEQUENCES) and isinstance(batch_first, bool):
            finder.hints.setdefault(path.rpartition(".")[0], not batch_first)
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            finder.hints[path] = True
    return [found for path, module in model.named_modules() for found in _of_module(finder, path, module)]


def _of_module(finder: _Finder, path: str, module: nn.Module) -> Iterator[Tapped]:
    if isinstance(module, nn.Linear):
        shape = module.out_features, module.in_features
        yield finder.make(module, path, path, ("weight", "bias"), shape, "linear")
    elif _is_conv1d_of_transformers(module):
        weight = module._parameters["weight"]
        assert weight is not None
        shape = weight.shape[1], weight.shape[0]
        yield finder.make(module, path, path, ("weight", "bias"), shape, "transposed")
    elif isinstance(module, _ConvNd):
        yield _convolution(finder, path, module)
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        reason = ""
        if module.max_norm is not None:
            reason = "max_norm rescales its rows in the forward pass"
        elif isinstance(module, nn.EmbeddingBag) and module.mode == "max":
            reason = "the maximum over a bag is no linear map"
        elif isinstance(module, nn.EmbeddingBag) and module.scale_grad_by_freq:
            reason = "scale_grad_by_freq of an embedding bag is not recorded"
        slots, shape = module.num_embeddings, (module.embedding_dim, module.num_embeddings)
        yield finder.make(
            module, path, path, ("weight",), shape, "embedding", slots=slots, default=False, reason=reason
        )
        if isinstance(module, nn.Embedding):  # F.linear(x, embedding.weight): a head without a module
            name = f"{path}.linear".lstrip(".")
            head = finder.make(
                module,
                path,
                name,
                ("weight",),
                (shape[1], shape[0]),
                "linear",
                by="function",
                default=False,
                reason=reason,
            )
            yield replace(head, is_provisional=True)
    elif isinstance(module, nn.Bilinear):
        widths = [module.in1_features, module.in2_features]
        shape = module.out_features, widths[0] * widths[1]
        yield finder.make(
            module, path, path, ("weight", "bias"), shape, "bilinear", default=False, options={"widths": widths}
        )
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        yield from _recurrent(finder, path, module)
    elif isinstance(module, nn.MultiheadAttention):
        yield from _attention(finder, path, module)
    elif not isinstance(module, NO_MAPS):
        yield from _own_parameters(finder, path, module)


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def _convolution(finder: _Finder, path: str, module: _ConvNd) -> Tapped:
    d, reversed_padding = len(module.kernel_size), module._reversed_padding_repeated_twice
    padding = [p for k in range(d) for p in reversed_padding[2 * (d - 1 - k) : 2 * (d - k)]]
    options = {
        "kernel": list(module.kernel_size),
        "stride": list(module.stride),
        "dilation": list(module.dilation),
        "padding": padding,
        "padding_mode": module.padding_mode,
        "channels": module.in_channels,
    }
    outputs = module.out_channels // module.groups
    inputs = module.in_channels
    for size in module.kernel_size:
        inputs *= size
    kind = "conv_transpose" if module.transposed else "conv"
    return finder.make(
        module, path, path, ("weight", "bias"), (outputs, inputs), kind, slots=module.groups, default=False,
        options=options,
    )  # fmt: skip


def _recurrent(finder: _Finder, path: str, module: nn.RNNBase | nn.RNNCellBase) -> Iterator[Tapped]:
    for attribute, weight in module._parameters.items():
        if attribute.startswith("weight_") and weight is not None:
            name = f"{path}.{attribute.removeprefix('weight_')}".lstrip(".")
            pair = attribute, attribute.replace("weight_", "bias_")
            shape = weight.shape[0], weight.shape[1]
            yield finder.make(module, path, name, pair, shape, "linear", by="recurrent", default=False)


def _attention(finder: _Finder, path: str, module: nn.MultiheadAttention) -> Iterator[Tapped]:
    prefix = f"{path}." if path else ""
    if module.in_proj_weight is not None:
        shape = module.in_proj_weight.shape[0], module.in_proj_weight.shape[1]
        pair = "in_proj_weight", "in_proj_bias"
        yield finder.make(module, path, f"{prefix}in_proj", pair, shape, "linear", by="function")
    for which in ("q", "k", "v"):
        weight = module._parameters.get(f"{which}_proj_weight")
        if weight is not None:
            shape = weight.shape[0], weight.shape[1]
            name = f"{prefix}{which}_proj"
            yield finder.make(module, path, name, (f"{which}_proj_weight",), shape, "linear", by="function")
    bias = module._parameters.get("in_proj_bias")
    if module.in_proj_weight is None and bias is not None:  # of all three, each of which uses a part of it
        yield finder.make(module, path, f"{prefix}in_proj", ("in_proj_bias",), (len(bias), 1), "bias", by="function")


def _own_parameters(finder: _Finder, path: str, module: nn.Module) -> Iterator[Tapped]:
    """Parameters of a module of the user's own that may be linear maps: the first forward pass tells."""
    for attribute, weight in module._parameters.items():
        if weight is None or isinstance(weight, UninitializedParameter) or weight.dim() not in (2, 3):
            continue
        if attribute.endswith("_bias") and attribute.removesuffix("_bias") in module._parameters:
            continue
        place = f"{path}.{attribute}" if path else attribute
        name = place.removesuffix(".weight").removesuffix("_weight")
        if weight.dim() == 2:
            bias = "bias" if attribute == "weight" else attribute.replace("weight", "bias")
            pair = (attribute, bias) if bias != attribute and bias in module._parameters else (attribute,)
            shape = weight.shape[0], weight.shape[1]
            yield finder.make(module, path, name, pair, shape, "linear", by="function")
            continue
        turned = bool(getattr(module, "is_transposed", False))
        experts, o, i = weight.shape if not turned else (weight.shape[0], weight.shape[2], weight.shape[1])
        pair = (attribute, f"{attribute}_bias") if f"{attribute}_bias" in module._parameters else (attribute,)
        kind = "transposed_experts" if turned else "experts"
        yield finder.make(module, path, name, pair, (o, experts * i), kind, slots=experts, by="function", default=False)
