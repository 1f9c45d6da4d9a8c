"""Which layers are recorded: names, globs, module types, a predicate or presets."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dualhook.capture.audit import Verdict
from dualhook.capture.kinds import Tapped, linear_maps
from dualhook.capture.presets import PRESETS, default_layers, preset_layers
from dualhook.errors import LayerError
from dualhook.records import LayerSpec

__all__ = ["LayerChoice", "Selection", "select_layers", "unwrapped"]

LayerChoice = str | type[nn.Module] | Callable[[str, nn.Module], bool] | Iterable[str | type[nn.Module]]


@dataclass(frozen=True)
class Selection:
    """The recorded layers, each with every module that uses it, and why others are not."""

    layers: Sequence[Tapped]
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """The recorded layers, each once, in the model's order."""
        return tuple({tapped.spec.name: tapped.spec for tapped in self.layers}.values())

    def audited(self, verdict: Verdict) -> Selection:
        """What is left to record once an audit knows the uses of parameters that no tap sees.

        Layers of which the weight has such a use go, biases with one go alone, and so does what was thought to be a
        further use of a weight and is none.
        """
        left, reasons, unseen = [], dict(self.reasons), verdict.unseen
        for tapped in self.layers:
            spec = tapped.spec
            if spec.weight in unseen:
                reasons[spec.name] = unseen[spec.weight]
            elif tapped.is_provisional and spec.name not in verdict.seen:
                continue
            elif spec.bias in unseen:
                left.append(replace(tapped, spec=replace(spec, bias=None), attributes=tapped.attributes[:1]))
            else:
                left.append(tapped)
        return Selection(left, reasons)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model inside torch's wrappers, so that layers keep the names they have in it."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):  # of torch.compile
            model = inner
        else:
            return model


def select_layers(model: nn.Module, layers: LayerChoice | None, *, with_uses: bool = True) -> Selection:
    """The linear maps of ``model`` that ``layers`` names.

    ``layers`` is None (linear layers and what is like them), a name, a glob, a module type, a predicate
    ``(name, module) -> bool``, a preset, or several names, globs, types and presets. Uses of one weight are chosen
    together, unless without ``with_uses``. A layer or module that the model itself calls so wins over a preset:

    - ``"all"``: convolutions, embeddings, recurrent and expert weights too.
    - ``"head"``: the last linear layer.
    - ``"attention"``: the projections of queries, keys, values and outputs in all blocks.
    - ``"mlp"``: the other linear layers of all blocks, routers and experts included.
    - ``"last_block"``: every linear map of the model's last block but its embeddings, and the head.

    What a block is and what in it is attention, :mod:`dualhook.capture.blocks` says.

    Raises:
        LayerError: the model has no linear map, a name or glob matches none, or a preset does not apply to the model.
    """
    every = linear_maps(model)
    known = {(tapped.spec.weight, tapped.spec.kind) for tapped in every if not tapped.is_provisional}
    every = [t for t in every if not t.is_provisional or (t.spec.weight, t.spec.kind) not in known]
    reasons = _reasons(every)
    usable = {tapped.spec.name: tapped for tapped in every if tapped.spec.name not in reasons}
    if not usable:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise LayerError(
            f"{type(model).__name__} has no linear map to record: expected at least one torch.nn.Linear"
            + (f" ({why})" if why else "")
        )
    chosen = _chosen(model, usable, layers, reasons)
    if with_uses:
        weights = {usable[name].spec.weight for name in chosen}
        chosen = {name for name, tapped in usable.items() if tapped.spec.weight in weights}
    why = "recorded when asked for by layers=" if layers is None else "not chosen by layers="
    reasons |= {name: why for name in usable if name not in chosen}
    return Selection(_shared([usable[name] for name in usable if name in chosen], reasons), reasons)


def _reasons(every: Sequence[Tapped]) -> dict[str, str]:
    """Why some linear maps cannot be recorded; a weight with a use that cannot be is not recorded at all."""
    reasons = {tapped.spec.name: tapped.reason for tapped in every if tapped.reason}
    lost = {tapped.spec.weight: tapped.spec.name for tapped in every if tapped.reason and tapped.weight is not None}
    for tapped in every:
        if tapped.spec.weight in lost and not tapped.reason:
            reasons[tapped.spec.name] = f"shares its weight with {lost[tapped.spec.weight]}, which is not recorded"
    return reasons


def _chosen(
    model: nn.Module, usable: dict[str, Tapped], layers: LayerChoice | None, reasons: dict[str, str]
) -> set[str]:
    if layers is None:
        return set(default_layers(usable))
    if callable(layers) and not isinstance(layers, type):
        chosen = {name for name, tapped in usable.items() if layers(name, tapped.module)}
        if not chosen:
            raise LayerError(f"the predicate given as layers= chose none of {_listed(usable)}")
        return chosen
    if not isinstance(layers, (str, type, Iterable)):
        presets = ", ".join(map(repr, PRESETS))
        raise LayerError(f"layers={layers!r}: expected names, globs, module types, a predicate or a preset ({presets})")
    chosen = set()
    for wanted in [layers] if isinstance(layers, (str, type)) else layers:
        if isinstance(wanted, type):
            hits = {name for name, tapped in usable.items() if isinstance(tapped.module, wanted)}
        else:
            hits = {name for name in usable if name == wanted or name.startswith(f"{wanted}.")}  # a block by its name
            if not hits and wanted in PRESETS:
                hits = preset_layers(model, usable, wanted)
            hits |= {name for name in usable if fnmatch.fnmatchcase(name, wanted)}
        if not hits:
            raise LayerError(_no_match(wanted, usable, reasons))
        chosen |= hits
    if not chosen:
        raise LayerError(f"layers= names nothing: expected some of {_listed(usable)}, or None for all")
    return chosen


def _no_match(wanted: str | type, usable: dict[str, Tapped], reasons: dict[str, str]) -> str:
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


def _shared(chosen: Sequence[Tapped], reasons: dict[str, str]) -> list[Tapped]:
    """The chosen maps; modules that share weight and bias, and use them alike, are one layer under the first name."""
    first: dict[tuple[str, str], LayerSpec] = {}
    found = []
    for tapped in chosen:
        spec = first.setdefault((tapped.spec.weight, tapped.spec.kind), tapped.spec)
        if spec.bias != tapped.spec.bias:
            reasons[tapped.spec.name] = f"shares its weight with {spec.name} but not its bias (not recorded yet)"
            continue
        found.append(replace(tapped, spec=spec))
    return found
