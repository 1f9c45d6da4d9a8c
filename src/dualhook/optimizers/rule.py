"""The rule protocol: how an optimiser turns gradients into weights, and how exactly a rule says so.

A rule explains optimiser steps after the fact, from the ledger and, where that is not enough, from the gradients that
the recorded rows rebuild and the optimiser's state where recording began. Two families:

- :class:`~dualhook.optimizers.scalar.ScalarRule`: a few numbers per step, from the ledger alone;
- :class:`ReplayRule`: the optimiser is run again over the rebuilt gradients. Each step is *linear* in weight, buffer
  and gradient once its preconditioner is held fixed, and the rule says which linear map that was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal

from torch import Tensor

__all__ = ["Entry", "Exactness", "LinearStep", "ReplayRule", "Rule", "Side"]

Side = Literal["elementwise", "left", "right"]


class Exactness(Enum):
    """How far the sum of a rule's parts reaches; the value is the phrase that tables show."""

    EXACT = "exact"
    ROUNDING = "exact up to the optimiser's own rounding"
    APPROXIMATE = "approximate"


class Rule(ABC):
    """What every rule says of itself."""

    name: str
    """Short name, such as ``"sgd"``."""
    kind: ClassVar[str]
    """Its family: ``"scalar"``, ``"elementwise"``, ``"matrix"`` or ``"fitted"``."""
    exactness: ClassVar[Exactness] = Exactness.EXACT
    cost: ClassVar[str]
    """What a question costs: ``"one pass"`` over the rows, or ``"a replay"``, about as long as the training."""

    def state_numbers(self, state: Mapping[str, object], hyper: Mapping[str, float]) -> dict[str, float]:
        """The numbers of a parameter's optimiser state that the next step depends on, noted before every step."""
        return {}

    def is_fresh(self, state: Mapping[str, object]) -> bool:
        """Whether a parameter's optimiser state is that before its first step."""
        return all(value is None for value in state.values())

    def hyper_numbers(self, group: Mapping[str, object]) -> dict[str, float]:
        """Settings of a parameter group that are no numbers themselves, as numbers for the ledger."""
        return {}

    def refuses(self, hyper: Mapping[str, float]) -> str:
        """Which setting of a group the rule does not know; empty if it knows all. A refused optimiser is fitted."""
        return ""


@dataclass(frozen=True)
class Entry:
    """The numbers of one ledger entry: one optimiser step on one parameter.

    ``hyper`` holds the group's settings (flags as 0 or 1, pairs as ``betas.0`` and ``betas.1``), ``state`` what
    :meth:`Rule.state_numbers` noted before the step. ``scale`` is the factor between the rebuilt gradient and the one
    the optimiser saw; ``fresh``: the optimiser held no state before.
    """

    hyper: Mapping[str, float]
    state: Mapping[str, float]
    scale: float = 1.0
    fresh: bool = False

    def __getitem__(self, name: str) -> float:
        """A hyper-parameter; 0 where the optimiser had none of that name."""
        value = self.hyper.get(name, 0.0)
        return 0.0 if value != value else value


@dataclass
class LinearStep:
    """One step of an optimiser, linear in weight ``W``, buffer ``B`` and gradient ``g`` with the rest held fixed::

        W' = shrink · W  -  factor ∘ (from_buffer · B + from_gradient · g)  -  plain_from_buffer · B  -  rest
        B' = keep · B  +  buffer_factor ∘ (take · g)

    ``∘`` is the elementwise product, or for a matrix rule the product with ``factor`` from the left ([o, o]) or from
    the right ([i, i]); a number multiplies everything. ``rest`` is what the optimiser's own rounding added to the
    linear map.
    """

    factor: Tensor | float
    from_buffer: float = 0.0
    from_gradient: float = 1.0
    keep: float = 0.0
    take: float = 0.0
    buffer_factor: Tensor | float = 1.0
    shrink: float = 1.0
    plain_from_buffer: float = 0.0
    rest: Tensor | None = None


class ReplayRule(Rule):
    """An optimiser that is run again over the rebuilt gradients, step by step.

    ``linearize`` is the optimiser's update written once more: it brings the state up to date and returns the linear
    map that turns the gradient into the new weight. Weight and buffer themselves are moved by the caller, by that map.

    - ``buffer``: name of the state tensor that is linear in the gradients (``"exp_avg"``), None if there is none
    - ``reads_weight``, ``reads_buffer``: ``linearize`` looks at the weight or at the buffer, so that they have to be
      carried along; coupled weight decay is not a reason, the caller knows of it by :meth:`decay`
    - ``preview_state``: the state tensors that the factor is made of, if it is made of nothing else; a few snapshots of
      them, and :meth:`step_from`, then do for a preview without a replay
    - ``separable``: output units are independent of each other, so that a block of them can be replayed alone
    """

    kind: ClassVar[str] = "elementwise"
    cost: ClassVar[str] = "a replay"
    buffer: ClassVar[str | None] = None
    reads_weight: ClassVar[bool] = False
    reads_buffer: ClassVar[bool] = False
    separable: ClassVar[bool] = True
    preview_state: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def start(self, weight: Tensor, entry: Entry) -> dict[str, Tensor]:
        """The state tensors, buffer included, that the optimiser sets up for a parameter at its first step."""

    @abstractmethod
    def linearize(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], entry: Entry) -> LinearStep:
        """Bring ``state`` from before the step to after it, the buffer excepted, and return the step's linear map.

        ``gradient`` is what the optimiser works with: scaled, negated under ``maximize``, coupled decay added. It must
        not be written to, and the tensors in the result must not be those of ``state``.
        """

    def step_from(self, state: Mapping[str, Tensor], entry: Entry) -> LinearStep:
        """The step's linear map from ``preview_state`` as it is after the step; of rules that have one.

        ``state`` must not be written to.
        """
        raise NotImplementedError(f"the factor of {self.name} is made of more than its state")

    def moves_only(self, entry: Entry) -> tuple[float, float] | None:
        """``keep`` and ``take`` of the buffer, if that is all of a step that later ones' factors depend on.

        A replay that is only on its way to a later step then need not work out the factor. Only for rules whose
        ``buffer_factor`` is 1.
        """
        return None

    def decay(self, entry: Entry) -> float:
        """Coupled weight decay: what multiplies the weight that is added to the gradient."""
        return entry["weight_decay"]

    def gradient_scale(self, entry: Entry) -> float:
        """The factor between the rebuilt gradient and the one the step works with."""
        return -entry.scale if entry["maximize"] else entry.scale

    def side(self, weight: Tensor) -> Side:
        """How ``factor`` acts on the gradient of a parameter of this shape."""
        return "elementwise"
