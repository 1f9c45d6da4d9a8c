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
WORTH = 2  # times the bytes of what is computed with: so many the output gradients of a step have to take
USUAL = 0.5  # how much of the usual number of rows is that of the steps before the last one
COMPARED = 256  # entries of the weights by which they are known again


def is_head(spec: LayerSpec) -> bool:
    """Whether a layer's output gradients may be kept in another way than whole."""
    return spec.kind == "linear" and spec.out_features >= WIDE


def computed_bytes(spec: LayerSpec, rows: float, computed_in: int, stored_in: int) -> float | None:
    """What a step's output gradients take if they are computed again; None: they will not be.

    Numbers have ``computed_in`` bytes, which keys then keep, or would be ``stored_in`` fewer.
    """
    width = spec.in_features + (spec.bias is not None)
    wider = spec.in_features * max(0, computed_in - stored_in)
    found = rows * (wider + 2 * computed_in + torch.int32.itemsize) + spec.out_features * width * computed_in
    return found if is_head(spec) and WORTH * found <= rows * spec.out_features * stored_in else None


@dataclass
class Head:
    """What is known of one layer."""

    rows: int = 0  # of the step to come, so far
    usual: float = 0.0  # of the steps before, on average
    is_computed: bool = False  # in the step to come
    has_been: bool = False  # in any step
    looks: int = 0
    made_with: list[Tensor] | None = None  # entries of the weights
    why_whole: str = ""  # why its rows are not computed again in any step


class Heads:
    """Packs the rows of wide linear layers.

    Under softmax cross-entropy their output gradients are computed again when they are asked for, where the weights
    that it takes, a matrix for every step, are clearly smaller. Others are kept whole, or by their largest numbers.
    """

    def __init__(self, choice: HeadGrads, stored_in: Mapping[str, torch.dtype]) -> None:
        self._choice = choice
        self._stored_in = stored_in
        self._heads: dict[str, Head] = {}
        self.forms: dict[str, str] = {}
        """How every wide layer's output gradients are kept, in words."""

    def pack(
        self, spec: LayerSpec, rows: Rows, parameters: Mapping[str, Tensor], *, is_first: bool, is_open: bool
    ) -> Rows:
        """Rows as they are to be kept; ``parameters`` are the layer's by name, as the forward pass has used them.

        Whether the rows of a step are computed again is decided with its first ones (``is_first``): once, when there
        are enough of them, and then where no others are waiting to be written that a change would cut off
        (``is_open``). If later ones of a step cannot be, they come back in another way than those before, which must be
        unpacked.
        """
        if self._choice == "dense" or not is_head(spec) or not len(rows):
            return rows
        head = self._heads.setdefault(spec.name, Head())
        if is_first:
            head.usual = USUAL * head.usual + (1 - USUAL) * head.rows if head.usual else float(head.rows)
            head.rows = 0
        head.rows += len(rows)
        if is_first and (is_open or not head.has_been):
            itemsize = rows.key.element_size()
            stored_in = self._stored_in.get(spec.name, rows.key.dtype).itemsize
            usual = max(head.usual, float(head.rows))
            head.is_computed = computed_bytes(spec, usual, itemsize, stored_in) is not None
        if head.is_computed and not head.why_whole:
            packed = self._computed(head, spec, rows, parameters, is_first=is_first)
            if packed is not None:
                head.has_been = True
                self.forms[spec.name] = "output gradients computed again from keys, targets and each step's weights"
                return replace(rows, output_grad=rows.output_grad[:, :0], packed=packed)
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
        """Rows under softmax cross-entropy; None, for good but of what is no number, if they are something else."""
        used = [parameters[name].detach() for name in spec.parameters if name in parameters]
        if len(used) < len(spec.parameters) or any(is_sharded(values) for values in used):
            head.why_whole = "weights in several processes"
            return None
        made_with = [values.flatten()[:: max(1, values.numel() // COMPARED)].clone() for values in used]
        before = made_with if is_first or head.made_with is None else head.made_with
        if not all(map(torch.equal, made_with, before)):  # by value: ``.data`` leaves no other trace
            head.why_whole = "weights change within a step"
            return None
        head.made_with, head.looks = made_with, head.looks + 1
        weight = used[0] if len(used) == 1 else torch.cat([used[0], used[1][:, None]], 1)
        packed = pack_softmax(rows.key, rows.output_grad, weight, head.looks)
        if packed is None and bool(rows.output_grad.isfinite().all()):
            head.why_whole = "no softmax cross-entropy"
        return packed
