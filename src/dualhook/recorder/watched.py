"""A recorded parameter between two steps: has anything but an optimiser written to it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dualhook.capture import Place, local
from dualhook.optimizers import Rule, fit_synchronization
from dualhook.recorder.staging import Bring, at_once, in_one_go, is_elsewhere
from dualhook.records import LayerSpec, Mark

__all__ = ["Left", "Watched", "fingerprints", "gradient_of", "state_of"]

FINGERPRINT = 256  # entries of a parameter that are compared between its steps


@dataclass
class Watched:
    """One recorded parameter, and what it was like after its last step; of a sharded one what this process holds."""

    name: str
    spec: LayerSpec
    place: Place
    stepped: bool = False
    """Whether an optimiser has stepped on it."""
    known: Tensor | None = None
    """Some of its numbers as the last step in the ledger, or a synchronisation after it, has left them."""
    state: tuple[tuple[str, int, int], ...] | None = ()  # None: that of a checkpoint, not seen yet
    anchors: dict[int, Tensor] = field(default_factory=dict)
    """What may be Lookahead's slow weights: its entries after some earlier steps."""
    synchronized: bool = False  # at least once
    _looked_at: tuple[int, Tensor] | None = None  # of so many entries these

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter as an optimiser has it now; None if it has been taken away or is computed from others."""
        return self.place.trained

    def begin(self, step: int, entries: Tensor | None) -> None:
        """Note what it is after ``step``, before its first one."""
        self.anchors = {} if entries is None else {step: entries}

    def go_on(self, step: int) -> None:
        """Continue after a step that has been recorded, with what a checkpoint has put in its place."""
        (self.known,) = fingerprints([self], at_once)
        self.stepped, self.state = self.known is not None, None
        self.begin(step, self.known)

    def remember(self, optimizer: Optimizer, entries: Tensor | None) -> Left:
        """Note what a step has left."""
        is_first, self.stepped = not self.stepped, entries is not None
        self.remember_state(optimizer)
        return Left(self, entries, is_first)

    def remember_state(self, optimizer: Optimizer) -> None:
        """Note what the optimiser holds for it."""
        self.state = self._state(optimizer)

    def synchronization(self, now: Tensor | None) -> tuple[float, int] | None:
        """If what has made it what it is ``now`` is Lookahead: alpha, and the step of the slow weights."""
        before, parameter = self.known, self.parameter
        if before is None or now is None or parameter is None or now.shape != before.shape:
            return None
        eps = torch.finfo(parameter.dtype).eps
        for step, slow in self.anchors.items():
            alpha = fit_synchronization(before.double(), now.double(), slow.double(), eps)
            if alpha is not None:
                return alpha, step
        return None

    def synchronize(self, step: int, now: Tensor) -> None:
        """Go on from what a synchronisation after ``step`` has left."""
        self.known, self.anchors = now, {step: now}

    def accept(self, step: int, now: Tensor | None) -> None:
        """Go on from what something else has made of it after ``step``: it may have set the slow weights as well."""
        if now is not None:
            self.anchors = {**dict(list(self.anchors.items())[:2]), step: now}

    def state_changed_since(self, optimizer: Optimizer) -> bool:
        """Whether the optimiser's state is another one than its last step has left."""
        return self.stepped and self.state is not None and self._state(optimizer) != self.state

    def mark_before(self, optimizer: Optimizer, rule: Rule) -> Mark:
        """What is known of the optimiser's state before a step."""
        if rule.is_fresh(state_of(optimizer, self.parameter)):
            return Mark.FRESH
        return Mark.CHANGED if self.state_changed_since(optimizer) else Mark(0)

    def _state(self, optimizer: Optimizer) -> tuple[tuple[str, int, int], ...]:
        """Which tensors the optimiser holds for the parameter, and how often they have been written to."""
        state = state_of(optimizer, self.parameter)
        return tuple((name, id(v), v._version) for name, v in state.items() if isinstance(v, Tensor))

    def some(self) -> Tensor | None:
        """Some entries of what of the parameter is in this process [k], where they are; perhaps a view."""
        parameter = self.parameter
        if parameter is None:
            return None
        held, known = local(parameter.detach()), self._looked_at
        every = max(1, held.numel() // FINGERPRINT)
        if is_elsewhere(held) and held.is_contiguous():
            return held.view(-1)[::every]
        if known is None or known[0] != held.numel() or known[1].device != held.device:
            index = torch.arange(0, held.numel(), every, device=held.device)
            self._looked_at = known = held.numel(), index
        return torch.take(held, known[1])


def fingerprints(seen: Sequence[Watched], bring: Bring) -> list[Tensor | None]:
    """Copies of some entries of every parameter [k], in host memory or on their way there; of a device in one go."""
    some = [watched.some() for watched in seen]
    there = iter(in_one_go([own for own in some if own is not None], bring))
    return [None if own is None else next(there) for own in some]


@dataclass(frozen=True)
class Left:
    """What a step, perhaps its first one, has left of a parameter."""

    watched: Watched
    entries: Tensor | None
    is_first: bool

    def recorded(self, step: int) -> None:
        """The step is in the ledger, as number ``step``."""
        watched, watched.known = self.watched, self.entries
        if self.entries is not None and (self.is_first or step in watched.anchors):
            watched.anchors[step] = self.entries


def state_of(optimizer: Optimizer, parameter: nn.Parameter | None) -> Mapping[str, Any]:
    """What an optimiser keeps for a parameter; nothing before its first step."""
    found: Mapping[str, Any] | None = None if parameter is None else optimizer.state.get(parameter)
    return found or {}


def gradient_of(watched: Watched) -> Tensor | None:
    """The gradient that a step would use."""
    gradient = None if watched.parameter is None else watched.parameter.grad
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
