"""What a tap has seen: one call of a linear map, and the rows that it becomes once its output gradient is there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualhook.maps import map_of
from dualhook.records import NO_SAMPLE, Batch, LayerSpec, Rows, absent

__all__ = [
    "Call",
    "Places",
    "as_rows",
    "call_input",
    "compiled_call",
    "compiled_input",
    "is_sequence_first",
    "module_call",
    "used_rows",
]

Coordinates = tuple[Tensor, Tensor, dict[str, Tensor]]

MANY = 64  # output gradients of a row that are looked at before all of them


@dataclass(frozen=True)
class Places:
    """Where rows come from that a layer's own shapes do not tell: ``index`` [n] into ``of`` places, batch first.

    With ``position`` [n], ``index`` counts samples of the batch.
    """

    index: Tensor
    of: int
    position: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """One call of a linear map: its input, as its kind has it, and what else tells what its rows are.

    ``key`` [..., c] with the ``slot`` [...] it fills; token ids [...] of an embedding; whole maps of a convolution.
    ``outputs`` are the first and last output that were computed, where it was not all. ``is_sequence_first``: the
    batch is the second dimension. ``of_places`` [n] tells which place a row is of, where there are more rows than
    places of the output: the bags of an embedding bag. ``may_be_flat``: rows may be a multiple of the batch.
    ``is_fixed``: no trained weight has had a part in the input; None: as long as it is on the graph, that tells.
    """

    key: Tensor
    slot: Tensor | None = None
    outputs: tuple[int, int] | None = None
    is_sequence_first: bool | None = None
    places: Places | None = None
    of_places: Tensor | None = None
    may_be_flat: bool = True
    is_fixed: bool | None = None

    def owned(self, *, copy: bool) -> Call:
        """The same off the graph; ``copy``: safe from changes in place."""
        key = self.key.detach().clone() if copy else self.key.detach()
        return replace(self, key=key, is_fixed=not self.key.requires_grad if self.is_fixed is None else self.is_fixed)


def call_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a call to a linear map, however it was passed."""
    x = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(x, Tensor)
    return x


def module_call(module: nn.Module, spec: LayerSpec, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """The call of a module that is one linear map."""
    if isinstance(module, nn.Bilinear):
        both = [*args, *kwargs.values()]
        return Call(torch.cat([both[0], both[1]], -1))
    if isinstance(module, nn.EmbeddingBag):
        return _bag_call(module, *args, **kwargs)
    x = call_input(args, kwargs)
    if isinstance(module, nn.Embedding):
        return embedding_call(x, module.weight.dtype, module.padding_idx, module.scale_grad_by_freq)
    return Call(x)


def compiled_input(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What compiled code keeps of a module's input; None if that would not do."""
    both = [*args, *kwargs.values()]
    if isinstance(module, nn.Bilinear):
        return torch.cat([both[0], both[1]], -1)
    if isinstance(module, nn.EmbeddingBag) and len(both) > 1:
        return None  # offsets or weights
    return call_input(args, kwargs)


def compiled_call(module: nn.Module, spec: LayerSpec, kept: Tensor) -> Call:
    """The call of a module of which compiled code has kept an input."""
    return Call(kept) if isinstance(module, nn.Bilinear) else module_call(module, spec, (kept,), {})


def embedding_call(ids: Tensor, dtype: torch.dtype, padding: int | None, scaled: bool) -> Call:
    """The lookup of ``ids`` [...]; a key is 1, or one over how often the token occurs, at padding 0."""
    key = torch.ones(ids.shape, device=ids.device, dtype=dtype)
    if scaled:
        _, place, counts = torch.unique(ids, return_inverse=True, return_counts=True)
        key = 1.0 / counts[place].to(dtype)
    if padding is not None:
        key = key * (ids != padding)
    return Call(key[..., None], ids)


def _bag_call(
    module: nn.EmbeddingBag, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
) -> Call:
    ids = input.reshape(-1)
    if input.dim() == 2:
        bag = torch.arange(len(input), device=ids.device).repeat_interleave(input.shape[1])
        bags = len(input)
    else:
        assert offsets is not None
        starts = offsets[:-1] if module.include_last_offset else offsets
        bags = len(starts)
        bag = torch.searchsorted(starts.contiguous(), torch.arange(len(ids), device=ids.device), right=True) - 1
    one = torch.ones(len(ids), device=ids.device, dtype=module.weight.dtype)
    key = one if per_sample_weights is None else per_sample_weights.detach().reshape(-1).clone()
    if module.padding_idx is not None:
        key, one = key * (ids != module.padding_idx), one * (ids != module.padding_idx)
    if module.mode == "mean":
        key = key / one.new_zeros(bags).index_add_(0, bag, one).clamp(min=1)[bag]
    return Call(key[:, None], ids, of_places=bag)


def as_rows(spec: LayerSpec, call: Call, output_grad: Tensor, batch: Batch | None) -> Rows:
    """The rows of one call with the gradient of its output [..., o], with their coordinates."""
    if map_of(spec).stores_maps:
        return _maps(spec, call, output_grad, batch)
    return _vectors(spec, call, output_grad, batch)


def _vectors(spec: LayerSpec, call: Call, output_grad: Tensor, batch: Batch | None) -> Rows:
    lead = output_grad.shape[:-1]
    count = math.prod(lead)
    d = output_grad.reshape(count, output_grad.shape[-1])
    if call.outputs is not None:
        d = F.pad(d, (call.outputs[0], spec.out_features - call.outputs[1]))
    if call.of_places is not None:
        d = d[call.of_places]
    # under autocast the map ran on the input cast to the output's dtype
    key = call.key.reshape(len(d), call.key.shape[-1]).to(d.dtype)
    slot = None if call.slot is None else call.slot.reshape(len(d)).int()
    return _rows(call, key, d, _coordinates(lead, batch, call, whole=spec.kind == "embedding"), slot=slot)


def _maps(spec: LayerSpec, call: Call, output_grad: Tensor, batch: Batch | None) -> Rows:
    """Whole maps as rows; of input without a batch dimension one."""
    d = len(spec.options["kernel"])
    x = call.key if call.key.dim() == d + 2 else call.key[None]
    y = output_grad if output_grad.dim() == d + 2 else output_grad[None]
    count = len(x)
    alone = replace(call, key=x, is_sequence_first=False)
    sample, _ = _places(y.shape[:1], batch, alone, whole=False)
    extent = torch.tensor([*x.shape[2:], *y.shape[2:]]).expand(count, -1)
    nothing = torch.zeros(count, dtype=torch.int64)
    coordinates = _numbered(sample, nothing, batch)
    return _rows(call, x.reshape(count, -1).to(y.dtype), y.reshape(count, -1), coordinates, extent=extent)


def _rows(
    call: Call,
    key: Tensor,
    output_grad: Tensor,
    coordinates: Coordinates,
    slot: Tensor | None = None,
    extent: Tensor | None = None,
) -> Rows:
    sample, position, columns = coordinates
    step = torch.zeros_like(sample)  # known when one uses the rows
    fixed_keys = bool(call.is_fixed)
    return Rows(key, output_grad, step, sample, position, columns, slot=slot, extent=extent, fixed_keys=fixed_keys)


def _coordinates(lead: Sequence[int], batch: Batch | None, call: Call, *, whole: bool) -> Coordinates:
    """The coordinates of the rows of an output with leading dimensions ``lead``; see :func:`_places`."""
    if call.of_places is not None:
        there = call.of_places.cpu()
        index, position = _places(lead, batch, call, whole=False)
        return _numbered(index[there], position[there], batch)
    if call.places is not None or batch is None:
        return _numbered(*_places(lead, batch, call, whole=whole), batch)
    shape = (tuple(lead), call.is_sequence_first, call.may_be_flat, whole)  # that most layers of a model have
    found: Coordinates | None = batch.coordinates.get(shape)
    if found is None:
        found = batch.coordinates[shape] = _numbered(*_places(lead, batch, call, whole=whole), batch)
    return found


def _numbered(index: Tensor, position: Tensor, batch: Batch | None) -> Coordinates:
    """The sample, position and columns of an ``index`` [n] into the batch, -1 where it is not known."""
    if batch is None:
        return index, position, {}
    sample, columns = torch.full_like(index, NO_SAMPLE), {}
    if bool((index >= 0).any()):
        known = index.clamp(min=0)
        sample = torch.where(index < 0, NO_SAMPLE, batch.samples[known])
        columns = {name: _column(values[known], index) for name, values in batch.columns.items()}
        if batch.positions is not None:
            position = position + torch.where(index < 0, 0, batch.positions[known])
    return sample, position, columns


def _column(values: Tensor, index: Tensor) -> Tensor:
    return values if bool((index >= 0).all()) else torch.where(index < 0, absent(values), values)


def is_sequence_first(lead: Sequence[int], size: int) -> bool | None:
    """Whether the batch of ``size`` is the second dimension of an output; None if the shape does not tell."""
    if len(lead) < 2 or (lead[0] == size) == (lead[1] == size):
        return None
    return bool(lead[1] == size)


def _places(lead: Sequence[int], batch: Batch | None, call: Call, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Index into the batch (-1: not known) and position of every row of an output with leading dimensions ``lead``.

    The batch is the dimension of its length, the first rather than the second. Where it is none, rows may have been
    flattened, or cut into windows, in the order of the batch; but not if ``whole``.
    """
    count = math.prod(lead)
    size = 0 if batch is None else batch.samples.numel()
    if call.places is not None:
        return _of_places(call.places, size, call.may_be_flat)
    if not size or (size > 1 and not lead):
        return _unknown(tuple(lead))
    number = torch.arange(count)
    if not lead:
        return number, number
    first = lead[0]
    rest = count // first if first else 0
    told = is_sequence_first(lead, size)
    second = told if told is not None else call.is_sequence_first
    if second and len(lead) > 1 and lead[1] == size:
        inner = count // (lead[0] * lead[1]) if count else 1
        return number // inner % size, number // (inner * size) * inner + number % inner
    if first == size:
        return number // max(rest, 1), number % max(rest, 1)
    if first % size == 0 and first and call.may_be_flat and not whole:  # flattened, or windows
        if second and len(lead) == 1:
            return number % size, number // size
        each = count // size
        return number // each, number % each
    return _unknown(tuple(lead))


@lru_cache(maxsize=16)
def _unknown(lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The same where no row's place in the batch is known."""
    count = math.prod(lead)
    rest = count // lead[0] if lead and lead[0] else count
    return torch.full((count,), NO_SAMPLE), torch.arange(count) % max(rest, 1)


def _of_places(places: Places, size: int, may_be_flat: bool) -> tuple[Tensor, Tensor]:
    index = places.index.cpu().long()
    if places.position is not None:
        return (index if places.of == size else torch.full_like(index, -1)), places.position
    if not size or places.of % size or not may_be_flat:
        return torch.full_like(index, -1), index
    each = places.of // size
    return index // each, index % each


def used_rows(output_grad: Tensor) -> Tensor | None:
    """Which rows [n, o] are not exactly zero, as an index on the CPU; None: all. The others add nothing to a weight."""
    output_grad = output_grad.detach().resolve_neg()
    shift = int(output_grad.dtype == torch.bfloat16)  # numpy has no such numbers: their bits but for the sign
    numbers = (output_grad.view(torch.int16) if shift else output_grad).numpy()

    def are_zero(seen: np.ndarray) -> np.ndarray:
        return cast(np.ndarray, ~(seen << shift if shift else seen).any(1))

    zero = np.flatnonzero(are_zero(numbers[:, :1]))
    for most in (MANY, numbers.shape[1]):
        if not len(zero):
            return None
        zero = zero[are_zero(numbers[zero, :most])]
    used = np.ones(len(numbers), dtype=bool)
    used[zero] = False
    return torch.from_numpy(np.flatnonzero(used)) if len(zero) else None
