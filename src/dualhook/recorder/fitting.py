"""Steps of optimisers without a rule: what they have seen, and what they have done to the weights."""

from __future__ import annotations

import weakref

from torch.optim import Optimizer

from dualhook.capture import whole
from dualhook.optimizers import StepFit, Tracker
from dualhook.recorder.step import Step

__all__ = ["Fitting"]


class Fitting:
    """Keeps track of the gradients that such optimisers have been given."""

    def __init__(self) -> None:
        self._trackers: weakref.WeakKeyDictionary[Optimizer, dict[str, Tracker]] = weakref.WeakKeyDictionary()

    def see(self, step: Step) -> None:
        """Look at the gradients of a step that is to be fitted; a foreach step may write to them."""
        if not step.fitting:
            return
        trackers = self._trackers.setdefault(step.optimizer, {})
        for watched, group, _ in step.stepped:
            gradient, before, hyper = step.gradient_of(watched), step.fitting.get(watched.name), step.hyper[group]
            if before is not None and gradient is not None:
                trackers.setdefault(watched.name, Tracker(hyper)).see(whole(gradient), before, hyper)

    def of(self, step: Step) -> dict[str, StepFit]:
        """What the step has done to its parameters, by name; of a rule that is known nothing has to be found."""
        found = {}
        for watched, _, _ in step.stepped:
            before, parameter = step.fitting.get(watched.name), watched.parameter
            if before is not None and parameter is not None and step.measures(watched.name):
                found[watched.name] = self._trackers[step.optimizer][watched.name].fit(before, whole(parameter))
        return found
