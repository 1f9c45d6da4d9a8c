"""One optimiser step that is under way, and what is left of it when it is over."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from dualhook.capture import LayerProbe, Measurement, Seen, fit_scales
from dualhook.optimizers import StepFit
from dualhook.recorder.changes import Look
from dualhook.recorder.notices import Notices
from dualhook.recorder.selfcheck import Prediction
from dualhook.recorder.watched import Watched, gradient_of
from dualhook.records import LedgerEntry, Mark

__all__ = ["Glance", "Step", "TakenStep"]


@dataclass(frozen=True)
class Glance:
    """What has been seen of a layer's gradients, that its rows are still to be compared with."""

    probe: LayerProbe
    seen: Seen


@dataclass
class Step:
    """One optimiser step, between torch's hook before it and the one after it."""

    optimizer: Optimizer
    name: str  # what the ledger calls the optimiser
    has_closure: bool
    stepped: list[tuple[Watched, int, Mark]]  # parameter, its group, what is known beforehand
    hyper: list[dict[str, float]]
    state: dict[str, Callable[[], dict[str, float]]]  # its numbers, once everything has come to the host
    look: Look  # at the parameters beforehand
    broken: set[str]  # those whose last step did not end
    loss_scale: float  # what the step itself divides the gradients by
    fitting: dict[str, Tensor] = field(default_factory=dict)  # copies of parameters whose change is to be fitted
    measured: dict[str, Measurement] = field(default_factory=dict)
    glances: list[Glance] = field(default_factory=list)  # at those layers that are not measured yet
    predicted: dict[str, Prediction] = field(default_factory=dict)

    def gradient_of(self, watched: Watched) -> Tensor | None:
        """The gradient that the step works with."""
        gradient = gradient_of(watched)
        return gradient if gradient is None or self.loss_scale == 1.0 else gradient / self.loss_scale

    def measures(self, parameter: str) -> bool:
        """Whether there was a gradient: of a parameter that a closure left without one torch skips the step."""
        return parameter in self.measured or any(parameter in glance.seen.computed for glance in self.glances)

    def taken(self, number: int, fits: Mapping[str, StepFit], changed: Container[str], *, recording: bool) -> TakenStep:
        """What is to be known of the step once everything has come to the host, as the ``number``-th.

        ``fits`` where it has no rule; ``changed`` are the parameters that something else had changed before.
        """
        drafts = []
        for watched, group, mark in self.stepped:
            name = watched.name
            if self.measures(name):
                fit, predicted, numbers = fits.get(name), self.predicted.get(name), self.state[name]()
                off_by = None if predicted is None else predicted.off_by(self.hyper[group], numbers)
                state = numbers | (fit.numbers if fit else {})
                mark |= Mark.CHANGED if name in changed else Mark(0)
                drafts.append(Draft(name, self.hyper[group], state, mark, fit, off_by))
        return TakenStep(number, self.name, self.loss_scale, recording, drafts, self.measured, self.glances)


@dataclass(frozen=True)
class Draft:
    """A ledger entry but for what the rows say of it."""

    parameter: str
    hyper: dict[str, float]
    state: dict[str, float]
    mark: Mark
    fit: StepFit | None
    off_by: float | None  # by which share of what the step did its rule is wrong


@dataclass(frozen=True)
class TakenStep:
    """A step that is over; ``recording``: whether its rows were captured."""

    number: int
    optimizer: str
    loss_scale: float
    recording: bool
    drafts: list[Draft]
    measured: dict[str, Measurement]
    glances: list[Glance]

    @property
    def is_worth_telling(self) -> bool:
        """Whether there is something to warn of already."""
        known = any(draft.mark & ~Mark.FRESH or draft.off_by is not None for draft in self.drafts)
        with np.errstate(all="ignore"):
            return known or not all(math.isfinite(one.crossed) for one in self.measured.values())

    def entries(self, notices: Notices) -> Iterator[LedgerEntry]:
        """The ledger entries, once everything is measured."""
        fits = dict(zip(self.measured, fit_scales(list(self.measured.values())), strict=True))
        for draft in self.drafts:
            fit, mark = fits[draft.parameter], draft.mark
            if not fit.finite:
                mark |= Mark.NONFINITE
                notices.nonfinite(self.number, draft.parameter)
            if not fit.explained:
                mark |= Mark.UNEXPLAINED if self.recording else Mark.MISSING
            if draft.off_by is not None:
                mark |= Mark.MISPREDICTED
                notices.mispredicted(self.number, draft.parameter, self.optimizer, draft.off_by)
            notices.of_mark(self.number, draft.parameter, mark, fit.residual)
            yield LedgerEntry(
                self.number,
                draft.parameter,
                self.optimizer,
                draft.hyper,
                draft.state,
                fit.scale / self.loss_scale,
                fit.residual,
                mark,
                None if draft.fit is None or draft.fit.vectors is None else draft.fit.vectors.to_cpu(),
            )
