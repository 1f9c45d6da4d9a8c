"""One optimiser step while it happens."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.optim import Optimizer

from dualhook.capture import Measurement
from dualhook.recorder.selfcheck import Prediction
from dualhook.recorder.watched import Watched, gradient_of
from dualhook.records import Mark

__all__ = ["Step"]


@dataclass
class Step:
    """One optimiser step, between torch's hook before it and the one after it."""

    optimizer: Optimizer
    name: str  # what the ledger calls the optimiser
    has_closure: bool
    stepped: list[tuple[Watched, int, Mark]]  # parameter, its group, what is known beforehand
    hyper: list[dict[str, float]]
    state: dict[str, dict[str, float]]
    loss_scale: float  # what the step itself divides the gradients by
    fitting: dict[str, Tensor] = field(default_factory=dict)  # copies of parameters whose change is to be fitted
    measured: dict[str, Measurement] = field(default_factory=dict)
    predicted: dict[str, Prediction] = field(default_factory=dict)

    def gradient_of(self, watched: Watched) -> Tensor | None:
        """The gradient that the step works with."""
        gradient = gradient_of(watched)
        return gradient if gradient is None or self.loss_scale == 1.0 else gradient / self.loss_scale
