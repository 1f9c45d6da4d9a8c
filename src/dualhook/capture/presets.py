"""Choices of layers that have a name of their own, whatever a model calls its layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from dualhook.capture.blocks import blocks_of, is_attention, is_within
from dualhook.capture.kinds import Tapped
from dualhook.errors import LayerError

__all__ = ["PRESETS", "default_layers", "preset_layers"]

PRESETS = ("all", "head", "last_block", "mlp", "attention")
EXPERTS = ("experts", "transposed_experts")


def default_layers(usable: Mapping[str, Tapped]) -> list[str]:
    """The layers that are recorded unless others are asked for.

    Raises:
        LayerError: there are none.
    """
    found = [name for name, tapped in usable.items() if tapped.is_default]
    if not found:
        names = [*list(usable)[:8], *(["…"] if len(usable) > 8 else [])]
        raise LayerError(
            "the model has no linear layer to record, of other kinds only "
            f"{', '.join(names)}: record them with layers='all' or by name"
        )
    return found


def preset_layers(model: nn.Module, usable: Mapping[str, Tapped], preset: str) -> set[str]:
    """The layers that a preset chooses.

    Raises:
        LayerError: it does not apply to the model.
    """
    if preset == "all":
        return set(usable)
    if preset == "head":
        return set(default_layers(usable)[-1:])
    blocks = blocks_of(model, usable.values())
    found = _of_blocks(model, usable, blocks)
    if found[preset]:
        return found[preset]
    why = "no repeated blocks (modules of one class in an nn.ModuleList or nn.Sequential)"
    if blocks:
        lacking = {"mlp": "feed-forward part in its blocks", "attention": "attention in its blocks"}
        why = f"no {lacking.get(preset, 'linear map in the last of its blocks')} ({blocks[0]}, …)"
    has_head = any(tapped.is_default for tapped in usable.values())
    others = ["all", *(["head"] if has_head else []), *(name for name in found if found[name])]
    raise LayerError(
        f"layers={preset!r} does not apply to {type(model).__name__}, which has {why}: "
        f"expected one of {', '.join(map(repr, others))}, or names or globs of layers"
    )


def _of_blocks(model: nn.Module, usable: Mapping[str, Tapped], blocks: list[str]) -> dict[str, set[str]]:
    """What the presets choose that know blocks; nothing where the model has no such thing."""
    found: dict[str, set[str]] = {"last_block": set(), "mlp": set(), "attention": set()}
    modules = dict(model.named_modules())
    for name, tapped in usable.items():
        block = next((block for block in blocks if is_within(tapped.path, block)), None)
        if block is None:
            continue
        if block == blocks[-1] and not isinstance(tapped.module, (nn.Embedding, nn.EmbeddingBag)):
            found["last_block"].add(name)
        if is_attention(modules, block, tapped.path):
            found["attention"] |= {name} if tapped.is_default else set()
        elif tapped.is_default or tapped.spec.kind in EXPERTS:
            found["mlp"].add(name)
    if found["last_block"]:
        found["last_block"] |= set([name for name, tapped in usable.items() if tapped.is_default][-1:])
    return found
