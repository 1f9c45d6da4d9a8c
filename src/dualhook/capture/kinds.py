"""Which parameters of a model are linear maps, of what kind, and where they are used."""

from __future__ import annotations

import math
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
        kind: str = "linear",
        *,
        shape: tuple[int, int] | None = None,
        slots: int = 1,
        by: str = "module",
        default: bool = True,
        reason: str = "",
        options: dict[str, Any] | None = None,
    ) -> Tapped:
        """One map; its matrix has the ``shape`` [o, i], by default that of the weight."""
        parameters = [module._parameters.get(attribute) for attribute in attributes]
        there = tuple(a for a, p in zip(attributes, parameters, strict=True) if p is not None)
        full = [_joined(path, attribute) for attribute in attributes]
        named = [full[k] if p is None else self.names.get(id(p), full[k]) for k, p in enumerate(parameters)]
        bias = named[1] if len(attributes) > 1 and parameters[1] is not None else None
        weight = parameters[0]
        outputs, inputs = shape or ((0, 0) if weight is None else weight.shape)
        spec = LayerSpec(name or ROOT, inputs, outputs, named[0], bias, kind, slots, options or {})
        if not reason and weight is None:
            reason = "its weight is computed from other parameters (a parametrisation; not recorded yet)"
        if not reason and isinstance(weight, UninitializedParameter):
            reason = "its shape is not known before the first forward pass: run one, then instrument"
        if not reason and weight is not None and not weight.is_floating_point():
            reason = f"weights of dtype {weight.dtype} are not recorded"
        first = self._is_sequence_first(path)
        return Tapped(spec, module, path, there or attributes[:1], by, default, first, reason)

    def _is_sequence_first(self, path: str) -> bool | None:
        """What the nearest module around says of the order of its dimensions."""
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
        if isinstance(module, SEQUENCES):  # what is beside it has the order that it is given
            finder.hints.setdefault(path.rpartition(".")[0], not module.batch_first)
        if isinstance(module, nn.MultiheadAttention):  # inside, whatever it is given
            finder.hints[path] = True
    return [found for path, module in model.named_modules() for found in _of_module(finder, path, module)]


def _of_module(finder: _Finder, path: str, module: nn.Module) -> Iterator[Tapped]:
    pair = "weight", "bias"
    if isinstance(module, nn.Linear):
        yield finder.make(module, path, path, pair, shape=(module.out_features, module.in_features))
    elif _is_conv1d_of_transformers(module):
        inputs, outputs = module._parameters["weight"].shape  # type: ignore[union-attr]
        yield finder.make(module, path, path, pair, "transposed", shape=(outputs, inputs))
    elif isinstance(module, _ConvNd):
        yield _convolution(finder, path, module)
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        yield from _embedding(finder, path, module)
    elif isinstance(module, nn.Bilinear):
        widths = [module.in1_features, module.in2_features]
        shape = module.out_features, widths[0] * widths[1]
        yield finder.make(module, path, path, pair, "bilinear", shape=shape, default=False, options={"widths": widths})
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
    shape = module.out_channels // module.groups, module.in_channels * math.prod(module.kernel_size)
    kind = "conv_transpose" if module.transposed else "conv"
    return finder.make(
        module, path, path, ("weight", "bias"), kind, shape=shape, slots=module.groups, default=False, options=options
    )


def _embedding(finder: _Finder, path: str, module: nn.Embedding | nn.EmbeddingBag) -> Iterator[Tapped]:
    reason, is_bag = "", isinstance(module, nn.EmbeddingBag)
    if module.max_norm is not None:
        reason = "max_norm rescales its rows in the forward pass"
    elif isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        reason = "the maximum over a bag is no linear map"
    elif is_bag and module.scale_grad_by_freq:
        reason = "scale_grad_by_freq of an embedding bag is not recorded"
    tokens, width = module.num_embeddings, module.embedding_dim
    settings: dict[str, Any] = {"default": False, "reason": reason}
    yield finder.make(module, path, path, ("weight",), "embedding", shape=(width, tokens), slots=tokens, **settings)
    if not is_bag:  # F.linear(x, embedding.weight): a head without a module
        head = finder.make(module, path, _joined(path, "linear"), ("weight",), by="function", **settings)
        yield replace(head, is_provisional=True)


def _recurrent(finder: _Finder, path: str, module: nn.RNNBase | nn.RNNCellBase) -> Iterator[Tapped]:
    for attribute in module._parameters:
        if attribute.startswith("weight_"):
            pair = attribute, attribute.replace("weight_", "bias_")
            name = _joined(path, attribute.removeprefix("weight_"))
            yield finder.make(module, path, name, pair, by="recurrent", default=False)


def _attention(finder: _Finder, path: str, module: nn.MultiheadAttention) -> Iterator[Tapped]:
    name = _joined(path, "in_proj")
    if module._parameters.get("in_proj_weight") is not None:
        yield finder.make(module, path, name, ("in_proj_weight", "in_proj_bias"), by="function")
        return
    for which in ("q_proj", "k_proj", "v_proj"):
        yield finder.make(module, path, _joined(path, which), (f"{which}_weight",), by="function")
    bias = module._parameters.get("in_proj_bias")
    if bias is not None:  # of all three, each of which uses a part of it
        yield finder.make(module, path, name, ("in_proj_bias",), "bias", shape=(len(bias), 1), by="function")


def _own_parameters(finder: _Finder, path: str, module: nn.Module) -> Iterator[Tapped]:
    """Parameters of a module of the user's own that may be linear maps: the first forward pass tells."""
    for attribute, weight in module._parameters.items():
        if weight is None or isinstance(weight, UninitializedParameter) or weight.dim() not in (2, 3):
            continue
        if attribute.endswith("_bias") and attribute.removesuffix("_bias") in module._parameters:
            continue
        name = _joined(path, attribute).removesuffix(".weight").removesuffix("_weight")
        if weight.dim() == 2:
            bias = attribute.replace("weight", "bias")
            pair = (attribute, bias) if bias != attribute else (attribute,)
            yield finder.make(module, path, name, pair, by="function")
            continue
        kind, (experts, outputs, inputs) = "experts", weight.shape
        if getattr(module, "is_transposed", False):
            kind, outputs, inputs = "transposed_experts", inputs, outputs
        pair = attribute, f"{attribute}_bias"
        shape = outputs, experts * inputs
        yield finder.make(module, path, name, pair, kind, shape=shape, slots=experts, by="function", default=False)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
