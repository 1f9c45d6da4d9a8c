"""Uses of a parameter in a function: who is told of them, and what the rows of such a call are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dualhook.capture.calls import Call, Places
from dualhook.capture.kinds import Tapped
from dualhook.capture.taps import Listener, ModuleTap
from dualhook.records import LayerSpec

__all__ = ["Site", "grouped_call", "has_settings", "linear_call"]


@dataclass(frozen=True)
class Site:
    """A use of a parameter that a function may be: who is told, and the module's own tap, which must not tell again."""

    tapped: Tapped
    listener: Listener
    tap: ModuleTap | None

    @property
    def is_seen_inside(self) -> bool:
        """Whether a call of the module is one of a function on its weight, and nothing else."""
        kind, padding = self.tapped.spec.kind, getattr(self.tapped.module, "padding_mode", "zeros")
        return kind in ("linear", "embedding") or (kind == "conv" and padding == "zeros")


def linear_call(tapped: Tapped, whole: Tensor, weight: Tensor, input: Tensor, places: Places | None) -> Call:
    """``F.linear`` on the ``whole`` parameter or a view of it: one expert, some rows of a projection."""
    if tapped.spec.kind == "experts":
        expert = (weight.storage_offset() - whole.storage_offset()) // (weight.shape[0] * weight.shape[1])
        slot = torch.full(input.shape[:-1], expert, device=input.device)
        return Call(input, slot, places=places)
    outputs = None
    if weight.shape != whole.shape:  # some rows of a projection for queries, keys and values
        first = int(weight.storage_offset() - whole.storage_offset()) // int(whole.stride(0))
        outputs = first, first + int(weight.shape[0])
    return Call(input, outputs=outputs, is_sequence_first=tapped.is_sequence_first)


def grouped_call(spec: LayerSpec, input: Tensor, offsets: Tensor, places: Places | None) -> Call:
    """``F.grouped_mm``: every expert with its own rows, one expert after the other."""
    number = torch.arange(len(input), device=input.device, dtype=offsets.dtype)
    slot = torch.searchsorted(offsets, number, right=True).clamp(max=spec.slots - 1)
    return Call(input, slot, places=places)


def has_settings(module: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether a convolution's further arguments are the settings of the module whose weight it uses."""
    usual = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **given}
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return False

    def plain(value: Any) -> Any:
        return value if isinstance(value, (int, str)) else tuple(value)

    def fits(own: Any, value: Any) -> bool:
        return own == value or (isinstance(own, tuple) and isinstance(value, int) and set(own) == {value})

    return all(fits(plain(getattr(module, name)), plain(value)) for name, value in usual.items())
