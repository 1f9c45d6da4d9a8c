"""How the output gradients of wide layers are kept: a head has one for every word of a vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dualhook.capture import is_sharded
from dualhook.packing import Packed, pack_largest, pack_softmax
from dualhook.recorder.settings import HeadGrads
from dualhook.records import LayerSpec, Rows

__all__ = ["Heads", "computed_bytes"]

WIDE = 512  # outputs of a layer from where on it is looked at
WORTH = (
    2  # times as many rows in a step as keys have numbers: its weights take less than half the output gradients then
)


def is_head(spec: LayerSpec) -> bool:
    """Whether a layer's output gradients may be kept in another way than whole."""
    return spec.kind == "linear" and spec.out_features >= WIDE


def computed_bytes(spec: LayerSpec, rows: int, itemsize: int) -> int | None:
    """What a step's output gradients take if they are computed again; None: they will not be."""
    width = spec.in_features + (spec.bias is not None)
    if not is_head(spec) or rows < WORTH * (spec.in_features + 1):
        return None
    return rows * (2 * itemsize + torch.int32.itemsize) + spec.out_features * width * itemsize


@dataclass
class Head:
    """What is known of one layer."""

    rows: int = 0  # of the step to come, so far
    is_computed: bool = False  # in the step to come
    made_with: tuple[int, ...] = ()  # which weights these are, in which version
    why_whole: str = ""  # why its rows are not computed again in any step


class Heads:
    """Packs the rows of wide linear layers.

    Under softmax cross-entropy their output gradients are computed again when they are asked for, where the weights
    that it takes, a matrix for every step, are clearly smaller. Others are kept whole, or by their largest numbers.
    """

    def __init__(self, choice: HeadGrads) -> None:
        self._choice = choice
        self._heads: dict[str, Head] = {}
        self.forms: dict[str, str] = {}
        """How every wide layer's output gradients are kept, in words."""

    def pack(self, spec: LayerSpec, rows: Rows, parameters: Mapping[str, Tensor], *, is_first: bool) -> Rows:
        """Rows as they are to be kept; ``parameters`` are the layer's by name, as the forward pass has used them.

        Whether the rows of a step are computed again is decided with its first ones. If later ones cannot be, they come
        back in another way than those before, which must be unpacked.
        """
        if self._choice == "dense" or not is_head(spec) or not len(rows):
            return rows
        head = self._heads.setdefault(spec.name, Head())
        usual, head.rows = head.rows, len(rows) + (0 if is_first else head.rows)
        if is_first:
            enough = max(usual, head.rows) >= WORTH * (spec.in_features + 1)
            head.is_computed = enough and not head.why_whole
        if head.is_computed:
            packed = self._computed(head, spec, rows, parameters, is_first=is_first)
            if packed is not None:
                self.forms[spec.name] = "output gradients computed again from keys, targets and each step's weights"
                return replace(rows, output_grad=rows.output_grad[:, :0], packed=packed)
            head.is_computed = False
        if isinstance(self._choice, int):
            self.forms[spec.name] = f"the {self._choice} largest output gradients of each row"
            packed = pack_largest(rows.output_grad, self._choice)
            return replace(rows, output_grad=rows.output_grad[:, :0], packed=packed)
        self.forms[spec.name] = f"output gradients whole: {head.why_whole or 'few rows a step'}"
        return rows

    @staticmethod
    def _computed(
        head: Head, spec: LayerSpec, rows: Rows, parameters: Mapping[str, Tensor], *, is_first: bool
    ) -> Packed | None:
        """Rows under softmax cross-entropy; None, for good, if these or their weights are something else."""
        used = [parameters[name].detach() for name in spec.parameters if name in parameters]
        made_with = tuple(number for values in used for number in (values.data_ptr(), values._version))
        if len(used) < len(spec.parameters) or any(is_sharded(values) for values in used):
            head.why_whole = "weights in several processes"
        elif not is_first and made_with != head.made_with:
            head.why_whole = "weights change within a step"
        else:
            head.made_with = made_with
            weight = used[0] if len(used) == 1 else torch.cat([used[0], used[1][:, None]], 1)
            packed = pack_softmax(rows.key, rows.output_grad, weight, rows.first + len(rows))
            if packed is not None:
                return packed
            head.why_whole = "no softmax cross-entropy"
        return None
