"""A recorded parameter between two steps: has anything but an optimiser written to it?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dualhook.records import LayerSpec

__all__ = ["Watched", "gradient_of", "state_of"]

FINGERPRINT = 256  # entries of a parameter that are compared between its steps


@dataclass
class Watched:
    """One recorded parameter, and what it was like after its last step."""

    name: str
    spec: LayerSpec
    module: nn.Module
    attribute: str  # of the module; looked up every time, since loading weights may put another parameter there
    entries: Tensor | None = None  # None: not stepped yet
    state: tuple[tuple[str, int, int], ...] = ()

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter as the module has it now; None if it has been taken away or is computed from others."""
        found = getattr(self.module, self.attribute)
        return found if isinstance(found, nn.Parameter) else None

    @property
    def stepped(self) -> bool:
        """Whether an optimiser has stepped on it."""
        return self.entries is not None

    def remember(self, optimizer: Optimizer) -> None:
        """Note what the step has left."""
        self.entries = self._fingerprint()
        self.state = self._state(optimizer)

    def changed_since(self) -> bool:
        """Whether something else has written to the parameter after its last step.

        By value: an evaluation may swap averaged weights in and out again, and ``.data`` leaves no other trace.
        """
        now = self._fingerprint()
        return self.entries is not None and (
            now is None or not torch.equal(self.entries.nan_to_num(), now.nan_to_num())
        )

    def state_changed_since(self, optimizer: Optimizer) -> bool:
        """Whether the optimiser's state is another one than its last step has left."""
        return self.stepped and self._state(optimizer) != self.state

    def _state(self, optimizer: Optimizer) -> tuple[tuple[str, int, int], ...]:
        """Which tensors the optimiser holds for the parameter, and how often they have been written to."""
        state = state_of(optimizer, self.parameter)
        return tuple((name, id(v), v._version) for name, v in state.items() if isinstance(v, Tensor))

    def _fingerprint(self) -> Tensor | None:
        parameter = self.parameter
        if parameter is None:
            return None
        count = parameter.numel()
        index = torch.arange(0, count, max(1, count // FINGERPRINT), device=parameter.device)
        return torch.take(parameter.detach(), index).double()


def state_of(optimizer: Optimizer, parameter: nn.Parameter | None) -> Mapping[str, Any]:
    """What an optimiser keeps for a parameter; nothing before its first step."""
    found: Mapping[str, Any] | None = None if parameter is None else optimizer.state.get(parameter)
    return found or {}


def gradient_of(watched: Watched) -> Tensor | None:
    """The gradient that a step would use."""
    return None if watched.parameter is None else watched.parameter.grad
