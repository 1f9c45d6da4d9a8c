"""What a layer is made of at a horizon: coefficients by step, and shares that have to be replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from dualhook.maps import LinearMap
from dualhook.optimizers import Entry, Exactness, ReplayRule, Side
from dualhook.records import FactorVectors, LayerSpec, Piece, Rows

__all__ = ["REPLAY_BYTES", "Composition", "ReplayShare", "SealedRows", "StepTaken", "Synchronization", "Totals"]

REPLAY_BYTES = 2**30
"""Default budget for what a replay keeps in memory at a time."""


@dataclass(frozen=True)
class StepTaken:
    """One optimiser step on one parameter: the ledger's numbers, the rule, and the optimiser's class."""

    entry: Entry
    rule: ReplayRule
    optimizer: str


@dataclass(frozen=True)
class Synchronization:
    """Lookahead between two steps: ``W <- alpha W + (1 - alpha) W_tau``, with the weight after an earlier step tau."""

    alpha: float
    slow_step: int


@dataclass
class Totals:
    """What a parameter is made of, float64, each of its shape; the parts sum to its value at the horizon."""

    origin: Tensor
    patterns: Tensor
    weight_decay: Tensor
    rounding: Tensor

    @property
    def value(self) -> Tensor:
        """The sum of all parts."""
        return self.origin + self.patterns + self.weight_decay + self.rounding

    def each(self, change: Callable[[Tensor], Tensor]) -> Totals:
        """The same with every part changed."""
        return Totals(*(change(getattr(self, part.name)) for part in fields(self)))


@dataclass
class ReplayShare:
    """A parameter that has to be replayed: where its recording begins, and the steps taken on it.

    ``weight`` and ``tensors`` are value and optimiser state after step ``begins``; ``readout`` [t + 1] says with which
    factor the weight after each step counts (the horizon alone, or an average along the way), ``dtype`` what the model
    computes the parameter in.
    """

    parameter: str
    begins: int
    weight: Tensor
    tensors: Mapping[str, Tensor]
    taken: Mapping[int, Sequence[StepTaken | Synchronization]]
    readout: Tensor
    dtype: torch.dtype
    map: LinearMap | None = None
    """Of a layer whose parameters are no matrices as they are; None: of a plain linear layer."""
    shape: tuple[int, ...] = ()
    """Of the parameter; where the rule looks at more than single entries, ``weight`` is left in it."""
    snapshots: Mapping[int, Callable[[], Mapping[str, Tensor]]] = field(default_factory=dict)
    """By step, what loads the optimiser's state as it was then; for a preview."""
    totals: Totals | None = None
    """Known once a pass over all output units has come back to the origin."""

    @property
    def horizon(self) -> int:
        """The last step that is asked about."""
        return int(self.readout.numel()) - 1

    @property
    def steps(self) -> Iterator[StepTaken]:
        """The optimiser steps up to the horizon, oldest first."""
        return (own for _, taken in sorted(self.taken.items()) for own in taken if isinstance(own, StepTaken))

    @property
    def slow_steps(self) -> set[int]:
        """The steps whose weights a synchronisation goes back to."""
        return {own.slow_step for taken in self.taken.values() for own in taken if isinstance(own, Synchronization)}

    @cached_property
    def separable(self) -> bool:
        """Whether its output units can be replayed in blocks."""
        return all(step.rule.separable for step in self.steps)

    @property
    def is_natural(self) -> bool:
        """Whether weight and state are laid out as the parameter rather than as a matrix."""
        return self.map is not None and not self.separable and not self.map.keeps_shape

    def as_matrix(self, values: Tensor) -> Tensor:
        """A tensor that is laid out like ``weight``, as a matrix."""
        return self.map.matrix(self.parameter, values) if self.is_natural and self.map else values

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A matrix, laid out like ``weight``."""
        return self.map.natural(self.parameter, matrix, self.shape) if self.is_natural and self.map else matrix

    def natural(self, values: Tensor) -> Tensor:
        """A tensor that is laid out like ``weight``, as the parameter is."""
        if self.map is None or self.is_natural or values.shape != self.weight.shape:
            return values
        return self.map.natural(self.parameter, values, self.shape)

    def oriented(self, values: Tensor | float, side: Side) -> tuple[Tensor | float, Side]:
        """A factor on the parameter's gradient as one on the matrix's."""
        if not self.is_natural or not isinstance(values, Tensor) or self.map is None:
            return values, side
        if side == "elementwise":
            return self.map.matrix(self.parameter, values), side
        return (values.T, "right" if side == "left" else "left") if self.map.is_transposed else (values, side)

    @property
    def is_bias(self) -> bool:
        """Whether its key is the constant 1."""
        return self.weight.ndim == 1 if self.map is None else self.parameter != self.map.spec.weight

    @property
    def computed_in(self) -> torch.dtype:
        """The dtype of its replay."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def bytes_per_entry(self) -> int:
        """Of its replay."""
        return self.computed_in.itemsize

    def without_history(self) -> ReplayShare:
        """What says no more than that the parameter is replayed."""
        nothing = self.weight.new_zeros(0)
        return replace(self, weight=nothing, tensors={}, taken={}, readout=nothing, snapshots={}, totals=None, map=None)

    def kept_bytes(self, units: slice, *, totals: bool) -> int:
        """What one step of some output units leaves for the way back: factor, gradient, weight, rounding."""
        entries = self.weight[units].numel()
        if not totals:
            return entries * self.bytes_per_entry
        every = list(self.steps)
        decays = any(step.rule.decay(step.entry) for step in every)
        rounds = any(step.rule.exactness is Exactness.ROUNDING for step in every)
        return entries * self.bytes_per_entry * (2 + decays + rounds)


@dataclass(frozen=True)
class SealedRows:
    """``values`` [n, o] (``side`` left) or [n, i] (right) in place of a layer's output gradients or keys.

    They start with pattern number ``first``.
    """

    side: Side
    values: Tensor
    first: int

    def key(self, rows: Rows) -> Tensor:
        """The keys of a block."""
        return self._own(rows) if self.side == "right" else rows.key

    def output_grad(self, rows: Rows) -> Tensor:
        """The output gradients of a block."""
        return self._own(rows) if self.side == "left" else rows.output_grad

    def of(self, first: int, count: int) -> SealedRows:
        """Those of some consecutive patterns."""
        start = first - self.first
        return replace(self, values=self.values[start : start + count].clone(), first=first)

    def _own(self, rows: Rows) -> Tensor:
        start = rows.first - self.first
        return self.values[start : start + len(rows)]


@dataclass(frozen=True)
class Composition:
    """One layer at a horizon ``t``: ``W = origin_weight - sum_s weight[step_s] · output_grad_s key_sᵀ`` + replays.

    ``weight`` and ``bias`` hold the coefficient of every step's patterns, float64 [t + 1]. Origins are float64, [o, i]
    and [o], with whatever optimiser state there was where recording began. A layer without bias has None twice.
    A parameter in ``replays`` adds what its replay finds; its coefficients and origin here are zero.
    With ``factor`` ([t + 1, o] and [t + 1, i]) the weight's rows are multiplied by the vectors of their step first.
    """

    spec: LayerSpec
    weight: Tensor
    origin_weight: Tensor
    bias: Tensor | None = None
    origin_bias: Tensor | None = None
    replays: tuple[ReplayShare, ...] = ()
    replay_bytes: int = REPLAY_BYTES
    factor: FactorVectors | None = None
    sealed: SealedRows | None = None
    """What the weight's rows are replaced by."""
    rounding: Tensor | None = None
    """What the optimiser's own rounding has put into a weight with sealed rows, float64 [o, i]."""
    tick: Callable[[int], None] | None = None
    """Called while replays are under way, with the entries of a weight that have gone through a step."""
    preview: bool = False
    """Whether the replays are previewed from snapshots."""
    unknown: str = ""
    """Why nothing of this is known (all NaN): the optimiser's rule is not registered any more."""
    first_step: int = 0
    """The step that the first of the coefficients is of."""

    @property
    def horizon(self) -> int:
        """The step after which this is the layer."""
        return int(self.weight.numel()) - 1

    @property
    def only_replays(self) -> bool:
        """Whether every parameter of the layer is replayed: no coefficient by step says anything."""
        return len(self.replays) == len(self.spec.parameters)

    @property
    def only_coefficients(self) -> bool:
        """Whether a pattern is multiplied with nothing but its step's coefficients."""
        return not self.replays and self.factor is None and not self.unknown

    @property
    def is_plain(self) -> bool:
        """Whether that holds of the rows as they were recorded."""
        return self.only_coefficients and self.sealed is None

    def of(self, pieces: Sequence[Piece]) -> Composition:
        """What some consecutive pieces of the patterns are multiplied with; no origin, nothing to replay."""
        steps = slice(min(piece.first_step for piece in pieces), max(piece.last_step for piece in pieces) + 1)
        count, nothing = sum(piece.count for piece in pieces), self.origin_weight.new_zeros(0)
        return replace(
            self,
            weight=self.weight[steps].clone(),
            origin_weight=nothing,
            bias=None if self.bias is None else self.bias[steps].clone(),
            origin_bias=None if self.origin_bias is None else nothing,
            factor=None if self.factor is None else self.factor.each(lambda values: values[steps].clone()),
            sealed=None if self.sealed is None else self.sealed.of(pieces[0].first, count),
            replays=tuple(share.without_history() for share in self.replays),
            rounding=None,
            tick=None,
            first_step=steps.start,
        )

    def on(self, device: torch.device) -> Composition:
        """The same with what scores need on another device."""
        return replace(
            self,
            weight=self.weight.to(device),
            bias=None if self.bias is None else self.bias.to(device),
            factor=None if self.factor is None else self.factor.each(lambda values: values.to(device)),
            sealed=None if self.sealed is None else replace(self.sealed, values=self.sealed.values.to(device)),
        )

    def unsummed(self) -> Composition:
        """The same with no totals known: the next pass adds them up again."""
        return replace(self, replays=tuple(replace(share, totals=None) for share in self.replays))
