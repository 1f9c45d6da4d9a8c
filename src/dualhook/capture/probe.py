"""The probe: do the recorded rows rebuild the gradient that the optimiser sees, and at what scale?

A grid of some hundred entries of every weight's gradient is rebuilt from the rows and regressed against ``p.grad``.
The slope is the scale between the two, however it came about (clipping, loss scaling, averaging over ranks); the
residual says whether the rows explain the gradient at all. Now and then the whole gradient is looked at through one sum
of random signs per output, which sees what happens to entries off the grid; of a layer with as many outputs as a
vocabulary at some of them, the next time at others.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.linalg import vector_norm

from dualhook.capture.measurement import Array, Computed, Measurement, Seen, tolerance
from dualhook.capture.precision import Operation, is_reduced
from dualhook.capture.sharded import is_sharded, local, rows_at, spread
from dualhook.capture.uses import Use, are_alike, signed_sums
from dualhook.gathering import columns_at, in_runs
from dualhook.maps import map_of
from dualhook.packing import Softmax
from dualhook.records import LayerSpec, Rows

__all__ = ["Corner", "LayerProbe", "Look", "looked"]

GRID = (32, 16)  # outputs × inputs: some hundred entries for two thin gathers
MANY, SEEN = 4096, 2048  # of more outputs than these so many are looked at as a whole, the next time those behind them
AT_ONCE = 1024  # rows of a product: of more of them numpy, too, calls threads in
RUN = 16  # outputs side by side: what is gathered of a row is some cache lines, not as many as there are outputs
# what may be off of the absolute parts of a sum, where it is more than the rounding of a dtype
COMPUTED = 1e-4  # of a softmax that is computed again, whose logits may be large
REDUCED = 1e-2  # where float32 products may be made of fewer digits

BY_MATRICES = frozenset[Operation]({"matmul"})

Look = Generator[Sequence[Tensor], Sequence[Array], dict[str, Measurement]]
"""Measurements in the making: yields tensors wherever they are, and is sent their numbers [k] each."""


def looked(looks: Sequence[Look]) -> list[dict[str, Measurement]]:
    """What looks find. Numbers that they ask for at a time come from a device in one copy: training waits for each."""
    found: list[dict[str, Measurement]] = [{} for _ in looks]
    sent: dict[int, Sequence[Array] | None] = dict.fromkeys(range(len(looks)))
    while sent:
        asked: dict[int, Sequence[Tensor]] = {}
        for number, arrays in sent.items():
            try:
                asked[number] = next(looks[number]) if arrays is None else looks[number].send(arrays)
            except StopIteration as end:
                found[number] = end.value
        brought = iter(_brought([values for own in asked.values() for values in own]))
        sent = {number: [next(brought) for _ in own] for number, own in asked.items()}
    return found


def _brought(asked: Sequence[Tensor]) -> list[Array]:
    """The numbers of tensors [k] each."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for number, values in enumerate(asked):
        if values.device.type != "cpu" and not is_sharded(values):
            alike.setdefault((values.device, values.dtype), []).append(number)
    found = list(asked)
    for numbers in alike.values():
        together, start = torch.cat([asked[number].detach().reshape(-1) for number in numbers]).cpu(), 0
        for number in numbers:
            found[number] = together[start : start + asked[number].numel()]
            start += len(found[number])
    return [_numpy(values).ravel() for values in found]


@dataclass(frozen=True)
class Corner:
    """Where a layer is probed: at some outputs, and some columns of one slot of its matrix."""

    slot: int
    outputs: Tensor
    inputs: Tensor


class LayerProbe:
    """The probed entries of one layer's parameters; ``others`` use its weight as well.

    ``made_by`` are the operations that make their gradients.
    """

    def __init__(
        self,
        spec: LayerSpec,
        others: Sequence[LayerSpec] = (),
        made_by: Collection[Operation] = BY_MATRICES,
    ) -> None:
        self.spec = spec
        self._made_by = made_by
        self.is_slotted = spec.slots > 1 and all(are_alike(spec, other) for other in others)
        """Whether every pattern fills one of several slots."""
        self._map = map_of(spec)
        self.sharing = tuple(others) or (spec,)
        """The layers that use the weight, this one among them."""
        # a slot of an embedding is one column, of which a sum tells no more than the entry itself
        self._sums_per = spec.slots if self.is_slotted and self._map.columns > 1 else 1
        generator = torch.Generator().manual_seed(0)  # its own: training's random numbers stay as they are
        self._kept_on: dict[tuple[torch.device, bool], Tensor] = {}
        self._outputs = in_runs(spec.out_features, GRID[0], RUN, generator)
        self._inputs = self._map.grid_inputs(GRID[1], generator)
        self._entries: dict[tuple[str, torch.device], Tensor] = {}
        self.is_plain = spec.kind in ("linear", "transposed") and spec.slots == 1 and list(others) in ([], [spec])
        """Whether the rows of several steps can be compared with :meth:`glance` in one go."""
        self._signs = 1.0 - 2.0 * torch.randint(0, 2, (spec.in_features,), generator=generator)
        self._looks = -1  # the number of the last one at the whole gradient; in every process the same

    def measure(self, gradients: Mapping[str, Tensor], uses: Sequence[Use], *, whole: bool = False) -> Look:
        """Compare the gradients of the layer's parameters, by name, with what the rows of its ``uses`` rebuild.

        ``whole`` looks at every entry of the gradients, if only in sums; where there are many outputs at the next ones.
        """
        if not any(len(use.rows) for use in uses):
            return (yield from self.without_rows(gradients))
        if whole:
            self.turn()
        slot, _ = self.busiest_slot(uses)
        found = yield from self.at(self.usual(slot), gradients, uses, whole=whole)
        corner = self.largest(slot, *self.sizes(uses, slot)) if self.is_dead(found) else None
        return found if corner is None else (yield from self.at(corner, gradients, uses, whole=whole))

    def turn(self) -> None:
        """Look at other outputs from now on, where they are too many for one look at the whole gradient."""
        self._looks += 1

    @property
    def _in_turn(self) -> Tensor | None:
        """The outputs that a look at the whole gradient sees; None: all."""
        count = self.spec.out_features
        if count <= MANY:
            return None
        begin = self._looks % -(-count // SEEN) * SEEN
        return torch.arange(begin, min(begin + SEEN, count))

    def usual(self, slot: int) -> Corner:
        """Where a slot is probed unless nothing is there."""
        return Corner(slot, self._outputs, self._inputs)

    def at(self, corner: Corner, gradients: Mapping[str, Tensor], uses: Sequence[Use], *, whole: bool) -> Look:
        """The same in one corner; of sharded gradients what is in this process."""
        computed, sums = _computed(gradients), dict[str, Measurement]()
        if whole:
            sums = self._compared_sums((yield self._sums_of(gradients)), computed, uses, self._in_turn)
        seen = yield [self._seen(corner, name, own) for name, own in gradients.items()]
        rebuilt, absolute = self._rebuilt(corner, uses)
        return _with_sums(self._compared(seen, computed, uses, rebuilt, absolute), sums)

    def _compared(
        self,
        seen: Sequence[Array],
        computed: Mapping[str, Computed],
        uses: Sequence[Use],
        rebuilt: Array,
        absolute: Array,
    ) -> dict[str, Measurement]:
        """What is ``seen`` of gradients beside what was rebuilt: [outputs, inputs] and, in a last column, the bias."""
        found = {}
        for (name, own), there in zip(computed.items(), seen, strict=True):
            entries = np.s_[:, :-1] if name == self.spec.weight else np.s_[:, -1]
            made, size = rebuilt[entries].ravel(), absolute[entries].ravel()
            found[name] = Measurement(there, made, size, _dtype_of(own, uses), None, self._rounding(own, uses))
        return found

    def glance(self, gradients: Mapping[str, Tensor], *, whole: bool = False) -> Seen | None:
        """The probed entries of gradients, as copies where these are; :meth:`later` or :meth:`apart` goes on.

        None where that would not do: the corner is dead, or has no numbers. Of gradients elsewhere than in host memory
        that shows later: of them sums are taken too, which say as much. ``whole`` as in :meth:`measure`.
        """
        are_here = all(own.is_cpu for own in gradients.values())
        entries = [torch.take(own.detach(), self._entries_of(name, own)) for name, own in gradients.items()]
        if are_here:
            is_alive = all(0 < float(vector_norm(own, math.inf)) < math.inf for own in entries)
            return Seen(_computed(gradients), entries, [], None, whole) if is_alive else None
        if whole:
            self.turn()
        return Seen(_computed(gradients), entries, self._sums_of(gradients), self._in_turn if whole else None, whole)

    def later(
        self, seen: Sequence[Seen], rows: Rows, bounds: Sequence[tuple[int, int]]
    ) -> list[dict[str, Measurement]]:
        """What glances at several steps say, whose rows within ``bounds`` are not packed; if it :attr:`is_plain`."""
        use = Use(self.spec, self.spec, rows)
        rebuilt, absolute = _products(*self._columns(self.usual(0), use), bounds)
        found = []
        for own, (start, stop), made, size in zip(seen, bounds, rebuilt, absolute, strict=True):
            within = [Use(self.spec, self.spec, rows.part(start, stop))] if own.sums else [use]
            found.append(self._told(own, within, made, size))
        return found

    def apart(self, seen: Seen, uses: Sequence[Use]) -> dict[str, Measurement]:
        """What a glance at the gradients of one step says, with its rows of all uses of the weight."""
        return self._told(seen, uses, *self._rebuilt(self.usual(0), uses))

    def _told(self, seen: Seen, uses: Sequence[Use], rebuilt: Array, absolute: Array) -> dict[str, Measurement]:
        """What a glance says, with what the rows of its step rebuild of the usual corner.

        Sums stand for a dead one, and for one of a single column, as a lookup has for each of its tokens.
        """
        found = self._compared(list(map(_numpy, seen.entries)), seen.computed, uses, rebuilt, absolute)
        by_sums = self._map.columns == 1 or self.is_dead(found)
        if not seen.sums or not (seen.is_whole or by_sums):
            return found
        outputs = None if by_sums else seen.outputs
        sums = self._compared_sums(list(map(_numpy, seen.sums)), seen.computed, uses, outputs)
        return sums if by_sums else _with_sums(found, sums)

    def _entries_of(self, name: str, gradient: Tensor) -> Tensor:
        """Which numbers of a parameter are its probed entries [k], where its gradient is."""
        key = name, gradient.device
        if key not in self._entries:
            index = self._outputs  # of a bias; the first slot's come first
            if name == self.spec.weight:
                index = self._map.numbers(self._outputs, self._inputs, gradient.shape)
            self._entries[key] = index.flatten().to(gradient.device)
        return self._entries[key]

    def _seen(self, corner: Corner, name: str, gradient: Tensor) -> Tensor:
        """What a corner has of a parameter's gradient."""
        seen = rows_at(self._matrix(name, gradient), self._on(gradient.device, corner.outputs))
        if name == self.spec.weight:
            return columns_at(seen, corner.slot * self._map.columns + corner.inputs)
        return seen[:, corner.slot] if seen.dim() == 2 else seen

    def _on(self, device: torch.device, values: Tensor) -> Tensor:
        """Probed outputs or signs on a device; the usual ones are kept there: a copy would make training wait."""
        if values is not self._outputs and values is not self._signs:
            return values.to(device)
        key = device, values is self._signs
        if key not in self._kept_on:
            self._kept_on[key] = values.to(device)
        return self._kept_on[key]

    def _rebuilt(self, corner: Corner, uses: Sequence[Use]) -> tuple[Array, Array]:
        """What the rows rebuild of a corner and, in a last column, of the bias; and the sums of absolute parts."""
        shape = len(corner.outputs), len(corner.inputs) + 1
        rebuilt, absolute = np.zeros(shape), np.zeros(shape)
        for use in uses:
            d, keys = self._columns(corner, use)
            (made,), (size,) = _products(d, keys, [(0, len(d))])
            rebuilt += made
            absolute += size
        return rebuilt, absolute

    def _columns(self, corner: Corner, use: Use) -> tuple[Tensor, Tensor]:
        """Output gradients [n, outputs] and keys [n, inputs + 1] of a corner, with the constant of the bias."""
        d, x, one = use.some(corner.slot, corner.outputs, corner.inputs)
        return d, torch.cat([x, one[:, None]], 1)

    @staticmethod
    def is_dead(found: Mapping[str, Measurement]) -> bool:
        """Whether the probed corner is one that the rows leave untouched."""
        return not all(one.absolute.any() for one in found.values())

    def busiest_slot(self, uses: Sequence[Use]) -> tuple[int, int]:
        """The slot that most of the rows fill, and how many do."""
        slots = [use.slot for use in uses if use.slot is not None and len(use.slot)]
        if not slots:
            return 0, sum(len(use.rows) for use in uses)
        every = torch.cat(slots)
        slot = int(every.mode().values)
        return slot, int((every == slot).sum())

    def sizes(self, uses: Sequence[Use], slot: int) -> tuple[Array, Array]:
        """How large the rows are in every output [o], and in every column of a slot [c]."""
        outputs, inputs = np.zeros(self.spec.out_features), np.zeros(self._map.columns)
        for use in uses:
            of_outputs, of_inputs = use.sizes(slot)
            outputs += _numpy(of_outputs)
            inputs += _numpy(of_inputs)
        return outputs, inputs

    def largest(self, slot: int, outputs: Array, inputs: Array) -> Corner | None:
        """Where rows of these sizes are largest; None where there are none."""
        if not outputs.any():
            return None
        of_outputs, of_inputs = torch.from_numpy(outputs), torch.from_numpy(inputs)
        return Corner(slot, of_outputs.topk(len(self._outputs)).indices, of_inputs.topk(len(self._inputs)).indices)

    def _rounding(self, gradient: Computed, uses: Sequence[Use]) -> float:
        """What is off by more than the rounding of its dtype.

        A gradient of products of fewer digits; output gradients that are computed again, whose exponents carry the
        rounding of logits.
        """
        if gradient.dtype == torch.float32 and any(is_reduced(own, gradient.device) for own in self._made_by):
            return REDUCED
        return COMPUTED if any(isinstance(use.rows.packed, Softmax) for use in uses) else 0.0

    def without_rows(self, gradients: Mapping[str, Tensor]) -> Look:
        """Gradients that no rows stand against: is there anything to explain?"""
        held = {name: local(own).abs() for name, own in gradients.items()}
        largest = yield [own.max().reshape(1) if own.numel() else own.new_zeros(1) for own in held.values()]
        return {
            name: Measurement(most, np.zeros(1), np.zeros(1), held[name].dtype)
            for name, most in zip(held, largest, strict=True)
        }

    def _matrix(self, name: str, gradient: Tensor) -> Tensor:
        """A gradient as a matrix; of a sharded one the rows here if they are rows of the matrix, else all of it.

        What other processes hold is zero then.
        """
        if is_sharded(gradient) and not self._map.keeps_shape:
            gradient = spread(local(gradient), gradient)
        return self._map.matrix(name, gradient)

    def _sums_of(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """Every output's sum over all inputs, of every slot or of all, with random signs: of each gradient."""
        found = []
        for name, own in gradients.items():
            matrix, dtype = self._matrix(name, own.detach()), torch.promote_types(own.dtype, torch.float32)
            held = local(matrix)
            width = held.shape[1:].numel() // self._sums_per
            held = held.reshape(len(held), self._sums_per, width).to(dtype)
            if name == self.spec.weight:
                signs = self._on(held.device, self._signs).reshape(self._sums_per, -1).to(dtype)
                sums = (held[:, 0] @ signs[0])[:, None] if len(signs) == 1 else (held * signs).sum(2)
            else:  # a copy: torch's foreach step with Nesterov momentum adds to the gradients in place
                sums = held.sum(2)
            found.append(spread(sums, matrix))
        return found

    def _compared_sums(
        self,
        seen: Sequence[Array],
        computed: Mapping[str, Computed],
        uses: Sequence[Use],
        outputs: Tensor | None,
    ) -> dict[str, Measurement]:
        """Such sums of some outputs, or all, beside those that the rows rebuild."""
        made, found = signed_sums(self.spec, uses, self._signs, self._sums_per, outputs), {}
        for (name, own), there in zip(computed.items(), seen, strict=True):
            pair = (made.weight, made.size) if name == self.spec.weight else (made.bias, made.ones)
            rebuilt, absolute = (_numpy(values).ravel() for values in pair)
            if outputs is not None:
                there = there.reshape(self.spec.out_features, -1)[outputs.numpy()]
            found[name] = Measurement(
                there.ravel(), rebuilt, absolute, _dtype_of(own, uses), None, self._rounding(own, uses)
            )
        return found


def _products(d: Tensor, keys: Tensor, bounds: Sequence[tuple[int, int]]) -> tuple[Array, Array]:
    """``dᵀ keys`` [b, o, c] of the rows within each of some bounds, and the same of absolute values.

    By numpy: for products as thin as these torch would call threads in, which costs more than the products.
    """
    coarse = torch.promote_types(d.dtype, torch.float32)  # a yardstick for rounding need not be exact
    left, right = d.to(coarse).numpy(), keys.to(coarse).numpy()
    with np.errstate(all="ignore"):  # what is no number is reported as that
        rough = _within(np.abs(left), np.abs(right), bounds)
        return _within(left.astype(np.float64), right.astype(np.float64), bounds), rough


def _within(left: Array, right: Array, bounds: Sequence[tuple[int, int]]) -> Array:
    found = np.zeros((len(bounds), left.shape[1], right.shape[1]))
    for number, (start, stop) in enumerate(bounds):
        for begin in range(start, stop, AT_ONCE):
            part = slice(begin, min(stop, begin + AT_ONCE))
            found[number] += left[part].T @ right[part]
    return found


def _with_sums(found: dict[str, Measurement], sums: Mapping[str, Measurement]) -> dict[str, Measurement]:
    return {name: replace(one, whole=sums.get(name)) for name, one in found.items()}


def _computed(gradients: Mapping[str, Tensor]) -> dict[str, Computed]:
    return {name: Computed(own.dtype, own.device) for name, own in gradients.items()}


def _dtype_of(gradient: Computed, uses: Sequence[Use]) -> torch.dtype:
    """The coarsest dtype of a gradient and the rows that rebuild it."""
    every = [gradient.dtype, *(use.rows.output_grad.dtype for use in uses)]
    return max(every, key=tolerance)


def _numpy(values: Tensor) -> Array:
    found: Array = values.detach().cpu().double().numpy()
    return found
