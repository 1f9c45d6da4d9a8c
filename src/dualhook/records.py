"""What passes between the rooms: frozen records of tensors and numbers.

Letters in shapes: ``n`` pattern, ``i`` input, ``o`` output, ``t`` step, ``e`` ledger entry, ``b`` sample of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntFlag
from typing import Any, Protocol

import torch
from torch import Tensor

from dualhook.gathering import columns_at
from dualhook.packing import Packed, changed

__all__ = [
    "AVERAGE",
    "COORDINATES",
    "FIELDS",
    "INEXACT",
    "MOMENTUM",
    "NO_SAMPLE",
    "OPTIONAL",
    "SLOW",
    "VALUE",
    "Batch",
    "Coefficients",
    "FactorVectors",
    "History",
    "LayerSpec",
    "LedgerEntry",
    "Mark",
    "OriginPart",
    "Piece",
    "RowSource",
    "Rows",
    "absent",
    "places_among",
]

COORDINATES = ("step", "sample", "position")
"""What every row carries beside key and output gradient, int64 [n] each."""

FIELDS = ("key", "output_grad", *COORDINATES)
"""The tensors of a block of rows that are always there."""

OPTIONAL = ("slot", "constant", "extent")
"""The tensors of a block of rows that only some kinds of layers have."""

NO_SAMPLE = -1
"""Sample number of a row whose dataset row is not known."""

VALUE = "value"
"""Name of the parameter itself among its origin tensors; the others carry the optimiser's names for its state."""

MOMENTUM = "momentum_buffer"
"""SGD's buffer, by torch's name for it."""

AVERAGE = "ax"
"""ASGD's running mean of the weights, by torch's name for it."""

SLOW = "slow"
"""The weights that Lookahead goes back to, where they are older than the origin."""


class Mark(IntFlag):
    """What is worth knowing about one ledger entry."""

    FRESH = 1  # the optimiser held no state for this parameter before the step
    UNEXPLAINED = 2  # the rows do not rebuild the gradient
    NONFINITE = 4  # rows or gradient hold NaN or infinity
    CHANGED = 8  # parameter or optimiser state was changed between two steps by something else
    MISSING = 16  # the step fell into a pause: its rows were not recorded
    MISPREDICTED = 32  # the optimiser did something else than its rule says, by the self-check


INEXACT = Mark.UNEXPLAINED | Mark.CHANGED | Mark.MISSING | Mark.MISPREDICTED
"""The marks of a step after which the identity no longer holds."""


@dataclass(frozen=True)
class LayerSpec:
    """One linear map of the model: ``y = W x + b`` with a matrix [o, i], named as in the model.

    ``kind`` says how the parameter is that matrix (:mod:`dualhook.maps`), with ``options`` of the kind. The columns of
    a matrix of several ``slots`` come in as many blocks, of which a key fills one. Layers with the same ``weight`` are
    uses of one parameter: each has the patterns of all.
    """

    name: str
    in_features: int
    out_features: int
    weight: str
    bias: str | None
    kind: str = "linear"
    slots: int = 1
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the layer's parameters, the weight first."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Batch:
    """Which dataset rows the training loop is working on: ``samples`` [b] and further columns [b].

    ``positions`` [b] are the places in the dataset rows where the samples begin; None: the first.
    """

    samples: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    positions: Tensor | None = None
    coordinates: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """Those of an output's rows that have been worked out already, by its shape."""


@dataclass(frozen=True)
class Rows:
    """A block of patterns of one layer, in the order they were recorded.

    ``key`` [n, i], ``output_grad`` [n, o] (raw, as autograd gave it), ``step``, ``sample`` and ``position`` [n].
    ``first`` is the pattern number of the block's first row. In a layer of several slots keys are [n, i / slots] and
    ``slot`` [n] says which they fill; None: keys are whole. ``constant`` [n] is the key's component for the bias;
    None: 1. Stored rows that are whole maps carry their ``extent`` [n, 2 · dimensions], input and output. Rows of one
    step on their way to the disk may be ``packed``: their ``output_grad`` is [n, 0], :meth:`grads` makes it.
    ``fixed_keys``: there, whether no trained weight has had a part in the keys.
    """

    key: Tensor
    output_grad: Tensor
    step: Tensor
    sample: Tensor
    position: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    first: int = 0
    slot: Tensor | None = None
    constant: Tensor | None = None
    extent: Tensor | None = None
    packed: Packed | None = None
    fixed_keys: bool = False

    def __len__(self) -> int:
        return int(self.key.shape[0])

    def grads(self, outputs: Tensor | None = None) -> Tensor:
        """The output gradients [n, o], or those of some ``outputs`` of the layer."""
        if self.packed is not None:
            return self.packed.dense(self.key, outputs)
        return self.output_grad if outputs is None else columns_at(self.output_grad, outputs)

    def unpacked(self) -> Rows:
        """The same with all output gradients there."""
        return self if self.packed is None else replace(self, output_grad=self.grads(), packed=None)

    def part(self, start: int, stop: int) -> Rows:
        """Rows ``start`` to ``stop``, without a copy."""
        cut = self.each(lambda values: values[start:stop])
        return replace(cut, first=self.first + start)

    def where(self, mask: Tensor) -> Rows:
        """The rows that a bool mask [n] chooses; they keep no pattern numbers."""
        return self.each(lambda values: values[mask])

    def at(self, index: Tensor) -> Rows:
        """The rows of an index [m]; they keep no pattern numbers."""
        return self.each(lambda values: values.index_select(0, index))

    def joined(self, *others: Rows) -> Rows:
        """These rows and those that follow them; a column that some lack is absent there. Alone, without a copy."""
        if not others:
            return self.unpacked()
        parts, columns = [part.unpacked() for part in (self, *others)], {}
        for name in dict.fromkeys(name for part in parts for name in part.columns):
            like = next(part.columns[name] for part in parts if name in part.columns)
            own = [part.columns.get(name, like.new_full((len(part),), absent(like))) for part in parts]
            columns[name] = torch.cat(own)
        there = [*FIELDS, *(name for name in OPTIONAL if getattr(self, name) is not None)]
        joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in there}
        return Rows(columns=columns, first=self.first, **joined)

    def on(self, device: torch.device) -> Rows:
        """The same on a device."""
        return self if device == self.key.device else self.each(lambda values: values.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        there = [*FIELDS, *(name for name in OPTIONAL if getattr(self, name) is not None)]
        parts: dict[str, Any] = {name: change(getattr(self, name)) for name in there}
        columns = {name: change(values) for name, values in self.columns.items()}
        packed = None if self.packed is None else changed(self.packed, change)
        return Rows(**parts, columns=columns, first=self.first, packed=packed, fixed_keys=self.fixed_keys)


def absent(like: Tensor) -> float:
    """What stands for "no value" in a column: NaN, or -1 among whole numbers."""
    return math.nan if like.is_floating_point() else -1


def places_among(ascending: Tensor, values: Tensor) -> Tensor:
    """Where values stand among ascending ones, or how many there are of these."""
    place = torch.searchsorted(ascending, values.contiguous()).clamp(max=len(ascending) - 1)
    return torch.where(ascending[place] == values, place, len(ascending))


@dataclass(frozen=True)
class LedgerEntry:
    """What one optimiser step did to one parameter.

    ``scale`` is the factor between the gradient the rows rebuild and the one the optimiser saw (clipping, loss
    scaling); ``residual`` the share of that gradient which the rows leave open, on the probed entries.
    """

    step: int
    parameter: str
    optimizer: str
    hyper: Mapping[str, float]
    state: Mapping[str, float]
    scale: float
    residual: float
    mark: Mark
    vectors: FactorVectors | None = None
    """Of a fitted step on a matrix: what multiplies its rows, beside the numbers in ``state``."""


@dataclass(frozen=True)
class FactorVectors:
    """A rank-1 factor ``row columnᵀ`` of a gradient [o, i]: ``row`` [o] and ``column`` [i], or one of each per step."""

    row: Tensor
    column: Tensor

    def to_cpu(self) -> FactorVectors:
        """The same, off any accelerator."""
        return self.each(Tensor.cpu)

    def each(self, change: Callable[[Tensor], Tensor]) -> FactorVectors:
        """The same with both changed."""
        return FactorVectors(change(self.row), change(self.column))


@dataclass(frozen=True)
class OriginPart:
    """A parameter where its recording began: after ``step``, its value and its optimiser's state."""

    step: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class History:
    """The ledger of one parameter, oldest entry first; every field is [e], numbers in float64."""

    parameter: str
    step: Tensor
    optimizer: tuple[str, ...]
    hyper: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    scale: Tensor
    residual: Tensor
    mark: Tensor

    def __len__(self) -> int:
        return int(self.step.numel())

    def column(self, name: str) -> Tensor:
        """A hyper-parameter over the entries [e]; zero where the optimiser had none of that name."""
        values = self.hyper.get(name)
        return torch.zeros(len(self), dtype=torch.float64) if values is None else values.nan_to_num(nan=0.0)

    def marked(self, mark: Mark) -> Tensor:
        """Which entries carry any of the marks, bool [e]."""
        return (self.mark & int(mark)) != 0

    def where(self, chosen: Tensor) -> History:
        """The entries that a bool mask [e] chooses."""
        return History(
            self.parameter,
            self.step[chosen],
            tuple(name for name, keep in zip(self.optimizer, chosen.tolist(), strict=True) if keep),
            {name: values[chosen] for name, values in self.hyper.items()},
            {name: values[chosen] for name, values in self.state.items()},
            self.scale[chosen],
            self.residual[chosen],
            self.mark[chosen],
        )


@dataclass(frozen=True)
class Coefficients:
    """What a parameter is made of: ``sum_k origin[k] · O_k  -  sum_e pattern[e] · G_e``.

    ``G_e`` is the gradient the rows of entry ``e`` rebuild (``output_gradᵀ key``), ``O_k`` the origin's tensors.
    ``reach`` [e] is the factor with which the parameter right after each entry stands in the result.
    """

    pattern: Tensor
    origin: Mapping[str, float]
    reach: Tensor


class Piece(Protocol):
    """Some consecutive patterns of a layer, which can be read anywhere: small, and pickled to get there."""

    @property
    def first(self) -> int:
        """The number of the first pattern."""
        ...

    @property
    def count(self) -> int:
        """How many patterns there are."""
        ...

    @property
    def first_step(self) -> int:
        """The oldest step they may be of."""
        ...

    @property
    def last_step(self) -> int:
        """The newest step they may be of."""
        ...

    def blocks(self, block_rows: int) -> Iterator[Rows]:
        """The patterns, oldest first, at most ``block_rows`` at a time."""
        ...


class RowSource(Protocol):
    """Where a question gets its patterns from."""

    def pieces(self, layer: str, *, last_step: int, first_step: int = 0) -> Iterator[Piece]:
        """The layer's patterns of ``first_step`` to ``last_step`` in pieces, oldest first; none is empty."""
        ...

    def worked_on(self, patterns: int) -> None:
        """Hear that so many more patterns have been through."""
        ...

    def blocks(self, layer: str, *, last_step: int, block_rows: int, first_step: int = 0) -> Iterator[Rows]:
        """The layer's patterns of ``first_step`` to ``last_step``, oldest first, at most ``block_rows`` at a time."""
        ...

    def count(self, layer: str) -> int:
        """How many patterns the layer has."""
        ...
