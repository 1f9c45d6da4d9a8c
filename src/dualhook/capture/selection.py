"""Which layers are recorded: names, globs, module types, a predicate or a preset."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedParameter
from torch.optim.swa_utils import AveragedModel

from dualhook.errors import LayerError
from dualhook.records import LayerSpec

__all__ = ["LayerChoice", "Selection", "select_layers", "unwrapped"]

LayerChoice = str | type[nn.Module] | Callable[[str, nn.Module], bool] | Iterable[str | type[nn.Module]]

ROOT = "(model)"  # the layer name of a model that is itself a linear map


@dataclass(frozen=True)
class Selection:
    """The recorded layers with their modules (several where a weight is shared), and why others are not."""

    modules: Sequence[tuple[LayerSpec, nn.Module]]
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """The recorded layers, each once, in the model's order."""
        return tuple({spec.name: spec for spec, _ in self.modules}.values())


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model inside torch's wrappers, so that layers keep the names they have in it."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):  # of torch.compile
            model = inner
        else:
            return model


def select_layers(model: nn.Module, layers: LayerChoice | None) -> Selection:
    """The linear maps of ``model`` that ``layers`` names.

    ``layers`` is None or ``"all"`` (every one), ``"head"`` (the last one), a name, a glob, a module type, a predicate
    ``(name, module) -> bool``, or several names, globs and types.

    Raises:
        LayerError: the model has no linear map, or a name or glob matches none.
    """
    found = {name or ROOT: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    others = _other_users(model)
    reasons = {name: reason for name, module in found.items() if (reason := _unsupported(module, others))}
    usable = {name: module for name, module in found.items() if name not in reasons}
    if not usable:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise LayerError(
            f"{type(model).__name__} has no linear map to record: expected at least one torch.nn.Linear"
            + (f" ({why})" if why else "")
        )
    chosen = _chosen(usable, layers, reasons)
    reasons |= {name: "not chosen by layers=" for name in usable if name not in chosen}
    return Selection(_shared(model, {name: usable[name] for name in usable if name in chosen}, reasons), reasons)


def _chosen(usable: dict[str, nn.Linear], layers: LayerChoice | None, reasons: dict[str, str]) -> set[str]:
    if layers is None or layers == "all":
        return set(usable)
    if layers == "head":
        return {list(usable)[-1]}
    if callable(layers) and not isinstance(layers, type):
        chosen = {name for name, module in usable.items() if layers(name, module)}
        if not chosen:
            raise LayerError(f"the predicate given as layers= chose none of {_listed(usable)}")
        return chosen
    if not isinstance(layers, (str, type, Iterable)):
        raise LayerError(f"layers={layers!r}: expected names, globs, module types, a predicate, 'all' or 'head'")
    chosen = set()
    for wanted in [layers] if isinstance(layers, (str, type)) else layers:
        if isinstance(wanted, type):
            hits = {name for name, module in usable.items() if isinstance(module, wanted)}
        else:
            hits = {name for name in usable if name == wanted or fnmatch.fnmatchcase(name, wanted)}
            hits |= {name for name in usable if name.startswith(f"{wanted}.")}  # a whole block by its name
        if not hits:
            raise LayerError(_no_match(wanted, usable, reasons))
        chosen |= hits
    if not chosen:
        raise LayerError(f"layers= names nothing: expected some of {_listed(usable)}, or None for all")
    return chosen


def _no_match(wanted: str | type, usable: dict[str, nn.Linear], reasons: dict[str, str]) -> str:
    if isinstance(wanted, type):
        return f"no linear map of type {wanted.__name__}: the model has {_listed(usable)}"
    if wanted in reasons:
        return f"layer {wanted!r} cannot be recorded: {reasons[wanted]}"
    near = difflib.get_close_matches(wanted, usable, n=3, cutoff=0.4)
    return f"no linear map matches {wanted!r}: " + (
        f"did you mean {' or '.join(map(repr, near))}?" if near else f"the model has {_listed(usable)}"
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f", … ({len(names)} in all)" if len(names) > 8 else "")


def _other_users(model: nn.Module) -> dict[int, str]:
    """Parameters that a module other than a linear one uses, by identity: what that module is."""
    return {
        id(parameter): f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear)
        for parameter in module._parameters.values()
    }


def _unsupported(module: nn.Linear, others: dict[int, str]) -> str:
    """Why a linear module cannot be recorded, or the empty string."""
    weight = module._parameters.get("weight")  # reading a parametrised attribute may change its state (spectral_norm)
    if weight is None:
        return "its weight is computed from other parameters (a parametrisation; not recorded yet)"
    if id(weight) in others:
        return f"shares its weight with {others[id(weight)]}, whose rows are not recorded yet"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "its forward is never called: nn.MultiheadAttention uses its weight directly (not recorded yet)"
    if isinstance(weight, UninitializedParameter):
        return "its shape is not known before the first forward pass: run one, then instrument"
    if not weight.is_floating_point():
        return f"weights of dtype {weight.dtype} are not recorded"
    return ""


def _shared(
    model: nn.Module, chosen: dict[str, nn.Linear], reasons: dict[str, str]
) -> list[tuple[LayerSpec, nn.Module]]:
    """The specs of the chosen modules; modules that share weight and bias are one layer, under the first name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    specs: dict[int, tuple[LayerSpec, torch.Tensor | None]] = {}
    modules: list[tuple[LayerSpec, nn.Module]] = []
    for name, module in chosen.items():
        spec, bias = specs.get(id(module.weight), (None, None))
        if spec is None:
            own_bias = names[id(module.bias)] if module.bias is not None else None
            spec = LayerSpec(name, module.in_features, module.out_features, names[id(module.weight)], own_bias)
            specs[id(module.weight)] = spec, module.bias
        elif bias is not module.bias:
            reasons[name] = f"shares its weight with {spec.name} but not its bias (not recorded yet)"
            continue
        modules.append((spec, module))
    return modules
