"""Kinds of linear maps: how a parameter is a matrix, and what the rows of its patterns are.

Every kind is ``y = W x`` with a matrix ``W`` [o, i] once its parameter is laid out right and its input is taken apart.
A matrix may consist of ``slots``, blocks of columns of equal width of which a pattern's key fills one: the token of an
embedding, the expert of a mixture, the group of a grouped convolution. Such a key is kept as the block [i / slots] and
the number of its slot.

Letters: ``o`` output, ``i`` input, ``s`` slot, ``c`` column of a slot, ``n`` pattern, ``p`` place on a feature map.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dualhook.gathering import columns_at, in_runs
from dualhook.records import LayerSpec, Rows

__all__ = ["LinearMap", "gradient", "map_of", "spread"]

RUN = 4  # columns side by side, where some are chosen: of images a few may be dead, but not all of the runs


class LinearMap:
    """How one layer's parameters are matrices, and its stored rows patterns; a weight [o, i], rows as they are.

    Kinds: ``linear`` [o, i], ``bias`` [o] with the key 1, ``transposed`` [i, o], ``embedding`` [slots, o], ``experts``
    [slots, o, c] or ``transposed_experts`` [slots, c, o], ``bilinear`` [o, i1, i2]; :class:`Convolution` has two more.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        self.slots = spec.slots
        self.columns = spec.in_features // spec.slots

    @property
    def is_transposed(self) -> bool:
        """Whether the parameter's own rows are inputs, and its columns outputs."""
        return self.spec.kind in ("transposed", "embedding")

    @property
    def stores_maps(self) -> bool:
        """Whether a stored row is a whole map, which makes several patterns."""
        return False

    @property
    def row_width(self) -> int | None:
        """How many numbers a stored row holds in key and output gradient; None: it depends on the size of a map."""
        return (sum(self._widths) if self.spec.kind == "bilinear" else self.columns) + self.spec.out_features

    @property
    def keeps_shape(self) -> bool:
        """Whether the matrix is the parameter as it is."""
        return self.spec.kind == "linear"

    def matrix(self, name: str, values: Tensor) -> Tensor:
        """A tensor of the shape of the parameter ``name`` as a matrix [o, i]; a bias as [o], or [o, slots]."""
        if name != self.spec.weight:
            return values if self.slots == 1 else values.reshape(self.slots, -1).T
        if self.keeps_shape:
            return values
        blocks = self._blocks(values)
        return blocks[0] if self.slots == 1 else blocks.permute(1, 0, 2).reshape(blocks.shape[1], -1)

    def numbers(self, outputs: Tensor, inputs: Tensor, shape: Sequence[int]) -> Tensor:
        """Which numbers of a weight of ``shape`` are at ``outputs`` [k] and ``inputs`` [m] of the first slot [k, m]."""
        if self.spec.kind in ("transposed", "embedding", "transposed_experts"):
            return inputs * shape[-1] + outputs[:, None]
        return outputs[:, None] * (shape[-1] if self.spec.kind == "experts" else math.prod(shape[1:])) + inputs

    def natural(self, name: str, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of :meth:`matrix`: laid out as the parameter, which has a ``shape``."""
        if name != self.spec.weight:
            return matrix if self.slots == 1 else matrix.T.reshape(tuple(shape))
        blocks = matrix.reshape(matrix.shape[0], self.slots, -1).permute(1, 0, 2)
        return self._parameter(blocks, shape)

    def patterns(self, rows: Rows, most: int) -> Iterator[Rows]:
        """The patterns of stored rows, in blocks of about ``most``."""
        for start in range(0, len(rows), most):
            part = rows.part(start, min(len(rows), start + most))
            yield replace(part, key=_outer(part.key, self._widths)) if self.spec.kind == "bilinear" else part

    def counts(self, rows: Rows) -> Tensor | None:
        """How many patterns each stored row makes [n]; None: one each."""
        return None

    def some(self, rows: Rows, slot: int, outputs: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Output gradients [n, outputs] and key columns [n, inputs] of the patterns that fill a slot."""
        if rows.slot is not None:
            rows = rows.where(rows.slot == slot)
        elif self.slots > 1:
            inputs = slot * self.columns + inputs
        key = _outer(rows.key, self._widths) if self.spec.kind == "bilinear" else rows.key
        return rows.grads(outputs), columns_at(key, inputs)

    def grid_inputs(self, count: int, generator: torch.Generator) -> Tensor:
        """Some columns of a slot, ascending."""
        return in_runs(self.columns, count, RUN, generator)

    def seen_from(self, asked: LayerSpec, rows: Rows) -> Rows:
        """Patterns of this use of a parameter as another use sees them, keys whole.

        Where one use multiplies by the transpose of the other's matrix, keys and output gradients change places.
        """
        key, output_grad = self._whole(rows), rows.output_grad
        if self.is_transposed != map_of(asked).is_transposed:
            key, output_grad = output_grad, key
        own = float(self.spec.bias == asked.bias)
        constant = torch.full((len(rows),), own, dtype=output_grad.dtype)
        return replace(rows, key=key, output_grad=output_grad, slot=None, constant=constant)

    def _whole(self, rows: Rows) -> Tensor:
        """Keys [n, i] over all slots."""
        if rows.slot is None:
            return rows.key
        return spread(rows.key, rows.slot.long(), torch.arange(self.slots))

    @property
    def _widths(self) -> tuple[int, int]:
        first, second = self.spec.options["widths"]
        return int(first), int(second)

    def _blocks(self, values: Tensor) -> Tensor:
        """A tensor of the weight's shape as [s, o, c]."""
        kind = self.spec.kind
        if kind == "transposed":
            return values.T[None]
        if kind == "embedding":
            return values[:, :, None]
        if kind == "experts":
            return values
        if kind == "transposed_experts":
            return values.transpose(1, 2)
        return values.reshape(1, values.shape[0], -1)

    def _parameter(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:
        if self.spec.kind == "transposed":
            return blocks[0].T
        if self.spec.kind == "transposed_experts":
            return blocks.transpose(1, 2)
        return blocks.reshape(tuple(shape))


class Convolution(LinearMap):
    """``conv`` and ``conv_transpose`` of 1 to 3 dimensions: a pattern is a place on the output map, and a group.

    Stored rows are whole maps, input and output gradient flattened, with their extents: unfolded they take as many
    times the bytes as the kernel has entries. A transposed convolution is one over the input with zeros between.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        options = spec.options
        self.kernel, self.stride, self.dilation, self.padding = (
            tuple(int(size) for size in options[name]) for name in ("kernel", "stride", "dilation", "padding")
        )
        self.mode = str(options["padding_mode"])
        self.dimensions = len(self.kernel)
        self.channels = int(options["channels"])
        self.is_transpose = spec.kind == "conv_transpose"

    @property
    def stores_maps(self) -> bool:
        return True

    @property
    def row_width(self) -> int | None:
        return None

    def numbers(self, outputs: Tensor, inputs: Tensor, shape: Sequence[int]) -> Tensor:
        every = torch.arange(math.prod(shape)).view(tuple(shape))
        return self.matrix(self.spec.weight, every)[outputs][:, inputs]

    def patterns(self, rows: Rows, most: int) -> Iterator[Rows]:
        first = rows.first
        for part, x, grad, places in self._maps(rows, most):
            count, each = len(part), math.prod(places) * self.slots
            yield Rows(
                self.unfold(x, places).reshape(count * each, -1),
                grad.permute(0, 3, 1, 2).reshape(count * each, -1),
                part.step.repeat_interleave(each),
                part.sample.repeat_interleave(each),
                part.position.repeat_interleave(each)
                + torch.arange(each // self.slots).repeat_interleave(self.slots).repeat(count),
                {name: values.repeat_interleave(each) for name, values in part.columns.items()},
                first,
                slot=torch.arange(self.slots).repeat(count * each // self.slots) if self.slots > 1 else None,
            )
            first += count * each

    def counts(self, rows: Rows) -> Tensor | None:
        assert rows.extent is not None
        return rows.extent[:, self.dimensions :].prod(1) * self.slots

    def some(self, rows: Rows, slot: int, outputs: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        k = math.prod(self.kernel)
        channels = torch.unique(inputs // k)
        place = torch.searchsorted(channels, inputs // k) * k + inputs % k
        first = slot * self.channels // self.slots
        grads, keys = [rows.output_grad.new_zeros(0, len(outputs))], [rows.key.new_zeros(0, len(inputs))]
        for _, x, grad, places in self._maps(rows):
            seen = self.unfold(x.index_select(1, first + channels), places, slots=1).flatten(0, 2)
            keys.append(seen.index_select(1, place))
            grads.append(grad[:, slot].index_select(1, outputs).permute(0, 2, 1).flatten(0, 1))
        return torch.cat(grads), torch.cat(keys)

    def grid_inputs(self, count: int, generator: torch.Generator) -> Tensor:
        k = math.prod(self.kernel)  # few channels, of which many entries: maps are taken apart by channel
        channels = torch.randperm(self.columns // k, generator=generator)[: max(1, count // k)].sort().values
        return (channels[:, None] * k + torch.arange(k)).reshape(-1)[:count]

    def _maps(self, rows: Rows, most: int = sys.maxsize) -> Iterator[tuple[Rows, Tensor, Tensor, list[int]]]:
        """Stored rows of one extent, of up to about ``most`` patterns, as maps.

        Input maps [n, channels, …], output gradients [n, s, o, p] and the sizes of the output map.
        """
        assert rows.extent is not None
        d, begin = self.dimensions, 0
        for extent, count in zip(*torch.unique_consecutive(rows.extent, dim=0, return_counts=True), strict=True):
            size, places = extent[:d].tolist(), extent[d:].tolist()
            inputs, outputs = self.channels * math.prod(size), self.spec.out_features * self.slots * math.prod(places)
            step, end = max(1, most // (math.prod(places) * self.slots)), begin + int(count)
            for start in range(begin, end, step):
                part = rows.part(start, min(end, start + step))
                x = part.key[:, :inputs].reshape(len(part), self.channels, *size)
                grad = part.grads()[:, :outputs].reshape(len(part), self.slots, self.spec.out_features, -1)
                yield part, x, grad, places
            begin = end

    def unfold(self, x: Tensor, places: Sequence[int], slots: int | None = None) -> Tensor:
        """Input maps [n, channels, …] as what the kernel sees at every one of the output's places [n, p, s, c]."""
        d, stride = self.dimensions, self.stride
        if self.is_transpose:
            x, stride = self._with_zeros_between(x, places), (1,) * d
        elif any(self.padding):
            pads = [p for k in reversed(range(d)) for p in self.padding[2 * k : 2 * k + 2]]
            x = F.pad(x, pads, mode="constant" if self.mode == "zeros" else self.mode)
        for k in range(d):
            x = x.unfold(2 + k, self.dilation[k] * (self.kernel[k] - 1) + 1, stride[k])[..., :: self.dilation[k]]
        x = x.reshape(x.shape[0], slots or self.slots, -1, math.prod(places), math.prod(self.kernel))
        return x.permute(0, 3, 1, 2, 4).flatten(3)

    def _with_zeros_between(self, x: Tensor, places: Sequence[int]) -> Tensor:
        """The input as an ordinary convolution with the mirrored kernel sees it; output padding adds to its end."""
        d = self.dimensions
        wide = x.new_zeros(*x.shape[:2], *((x.shape[2 + k] - 1) * self.stride[k] + 1 for k in range(d)))
        spaced: list[Any] = [slice(None), slice(None), *(slice(None, None, self.stride[k]) for k in range(d))]
        wide[tuple(spaced)] = x
        pads: list[int] = []
        for k in reversed(range(d)):
            reach = self.dilation[k] * (self.kernel[k] - 1)
            low = reach - self.padding[2 * k]
            pads += [low, places[k] + reach - low - wide.shape[2 + k]]
        return F.pad(wide, pads)

    def _blocks(self, values: Tensor) -> Tensor:
        """A weight [o · s, c, …], or transposed [channels, o, …], as [s, o, c · k]."""
        if not self.is_transpose:
            return values.reshape(self.slots, self.spec.out_features, -1)
        values = values.flip(tuple(range(2, values.ndim)))
        blocks = values.reshape(self.slots, -1, self.spec.out_features, math.prod(self.kernel))
        return blocks.transpose(1, 2).flatten(2)

    def _parameter(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:
        if not self.is_transpose:
            return blocks.reshape(tuple(shape))
        split = blocks.reshape(self.slots, self.spec.out_features, -1, math.prod(self.kernel)).transpose(1, 2)
        return split.reshape(tuple(shape)).flip(tuple(range(2, len(shape))))


def spread(key: Tensor, slot: Tensor, chosen: Tensor) -> Tensor:
    """Keys [n, c] of which only ``chosen`` slots (ascending) count, as [n, chosen · c]."""
    place = torch.searchsorted(chosen, slot.clamp(min=0)).clamp(max=len(chosen) - 1)
    wide = key.new_zeros(len(key), len(chosen), key.shape[1])
    there = (chosen[place] == slot).nonzero().squeeze(1)
    wide[there, place[there]] = key[there]
    return wide.flatten(1)


def gradient(values: Tensor, key: Tensor, slot: Tensor | None, columns: int) -> Tensor:
    """``valuesᵀ key`` [o, columns] for values [n, o] and keys in their slots."""
    if slot is None:
        return values.T @ key
    width = key.shape[1]
    found = values.new_zeros(columns // width, values.shape[1], width)
    if width == 1:
        found.squeeze(2).index_add_(0, slot.long(), values * key)
    else:
        for one in torch.unique(slot).tolist():
            own = (slot == one).nonzero().squeeze(1)
            found[one] = values[own].T @ key[own]
    return found.permute(1, 0, 2).reshape(values.shape[1], columns)


def _outer(key: Tensor, widths: tuple[int, int]) -> Tensor:
    """Keys [n, i1 + i2] of a bilinear map as products [n, i1 · i2]."""
    first, second = key[:, : widths[0]], key[:, widths[0] :]
    return (first[:, :, None] * second[:, None, :]).flatten(1)


@lru_cache(maxsize=4096)
def map_of(spec: LayerSpec) -> LinearMap:
    """The map of a layer."""
    return Convolution(spec) if spec.kind in ("conv", "conv_transpose") else LinearMap(spec)
