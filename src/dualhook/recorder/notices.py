"""What the recorder tells during training, each kind of thing once."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from dualhook.errors import InexactWarning, StoreError
from dualhook.recorder.costs import human
from dualhook.records import Mark

__all__ = ["Notices", "tell_of_costs", "tell_of_failure", "tell_of_latest", "used_up"]

FROM_HERE = "from this step on its memory is inexact, verify() shows by how much"


class Notices:
    """Warnings, one of each cause; of several processes one speaks."""

    def __init__(self, *, silent: bool = False) -> None:
        self._given: set[str] = set()
        self._silent = silent

    def once(self, cause: str, message: str, category: type[Warning] = InexactWarning) -> None:
        """Warn, unless something of the same cause has been told."""
        if cause not in self._given and not self._silent:
            self._given.add(cause)
            warnings.warn(message, category, stacklevel=2)

    def fitted(self, optimizer: str) -> None:
        """An optimiser without a rule has been met."""
        self.once(
            f"rule {optimizer}",
            f"no exact rule is known for {optimizer}: what each of its steps does to the weights is fitted, which is "
            "approximate; every answer's receipt and verify() say how much that explains "
            "(dualhook.optimizers.register adds a rule)",
        )

    def nonfinite(self, step: int, parameter: str) -> None:
        """NaN has come in."""
        self.once(
            "nonfinite",
            f"step {step}: NaN or infinity in the gradient of {parameter!r}; recorded as it is",
            UserWarning,
        )

    def mispredicted(self, step: int, parameter: str, optimizer: str, off_by: float) -> None:
        """A step was not what its rule says."""
        self.once(
            "mispredicted",
            f"step {step}: the rule of {optimizer} is off by {100 * off_by:.2g} % of what the step did to "
            f"{parameter!r} (weights changed in a hook after the step, an option the rule does not know?); {FROM_HERE}",
        )

    def of_mark(self, step: int, parameter: str, mark: Mark, residual: float) -> None:
        """What the marks of a ledger entry mean for the user."""
        if mark & Mark.UNEXPLAINED:
            self.once(
                "unexplained",
                f"step {step}: the recorded rows leave {100 * residual:.2g} % of the gradient of {parameter!r} open (a "
                "penalty on the weights in the loss, clip_grad_value_, a double backward, a use outside its module, "
                f"other processes that instrument(group=) does not know of?); {FROM_HERE}",
            )
        if mark & Mark.CHANGED:
            self.once(
                "changed",
                f"step {step}: {parameter!r} or its optimiser state was changed since its last step by something else "
                f"than a finished optimiser step (load_state_dict? an exception in step()?); {FROM_HERE}",
            )
        if mark & Mark.MISSING:
            self.once(
                "missing",
                f"step {step}: an optimiser stepped on {parameter!r} while recording was paused; {FROM_HERE}",
            )


def tell_of_costs(layers: int, step_bytes: int, budget: int, on_full: str, *, may_be_less: bool) -> None:
    """Say in one line what recording costs, on standard error; rows ``may_be_less`` once they are written."""
    then = {"fold": "the oldest patterns fold into the origin", "stop": "recording stops", "error": "it raises"}
    size, after = (f"up to {human(step_bytes)}", "at least") if may_be_less else (human(step_bytes), "about")
    print(
        f"dualhook: recording {layers} layers, {size} a step; the budget of {human(budget)} is reached "
        f"after {after} {budget // step_bytes:,} steps, then {then[on_full]} (max_bytes=, layers=, dtype= and sparse= "
        "change that)",
        file=sys.stderr,
    )


def used_up(path: Path, budget: int, *, may_fold: bool) -> str:
    """What a memory that has used its budget says."""
    fold = ", or let on_full='fold' keep the newest patterns" if may_fold else ""
    return f"the memory at {path} has used its budget of {human(budget)}: raise max_bytes=, choose fewer layers={fold}"


def tell_of_failure(error: Exception, step: int, on_disk: int, path: Path, *, several: bool) -> None:
    """Warn that recording has ended after a step; what is no fault of the disk is told with its place.

    Of ``several`` processes each knows only what it has ``on_disk`` itself; the memory has what all of them have.
    """
    cause = str(error)
    if not isinstance(error, (OSError, StoreError)):
        place = traceback.extract_tb(error.__traceback__)[-1:]
        where = "".join(f" ({Path(one.filename).name}, line {one.lineno})" for one in place)
        cause = f"an error of dualhook's own, {type(error).__name__}: {error}{where}"
    own = ", as far as this process goes" if several else ""
    warnings.warn(
        f"recording stopped after step {step}: {cause}. The memory at {path} is whole up to step {on_disk}{own}, from "
        f"step {on_disk + 1} on it is missing; training goes on (on_error='raise' would have stopped it)",
        UserWarning,
        stacklevel=4,
    )


def tell_of_latest(step: int, changed: Sequence[str], gone: Sequence[str], *, is_empty: bool) -> None:
    """Warn of what keeps the weights as they are now from being those after the last recorded ``step``."""
    told = []
    if changed:
        more = f" and {len(changed) - 1} more were" if len(changed) > 1 else " was"
        told.append(
            f"{changed[0]!r}{more} changed after the last recorded step {step} (load_state_dict?): the memory "
            "describes the weights as that step left them; close the recorder before loading others, or give verify() "
            "a model"
        )
    if is_empty:
        told.append(
            "rows were recorded, but no torch.optim.Optimizer was seen to step on a recorded parameter: the memory is "
            "empty (weights updated by hand, or an optimiser that is not torch's?)"
        )
    told += [
        f"layer {layer!r} is no longer part of the model: what replaced it since instrument() is not recorded; change "
        "the model first, then instrument it"
        for layer in gone
    ]
    for text in told:
        warnings.warn(text, UserWarning, stacklevel=4)
