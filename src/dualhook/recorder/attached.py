"""What hangs on a user's model, and on torch's optimisers, while a recorder is open."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from dualhook.capture import (
    Guard,
    Removable,
    RootHook,
    StepWatcher,
    forget_compiled_code,
    install,
    is_within,
    leave_all,
)
from dualhook.recorder.first_pass import FirstPass
from dualhook.recorder.steps import StepBook

__all__ = ["Attached"]


class Attached:
    """The hooks of one recorder; those that have been put on come off again if the others cannot be.

    ``before`` and ``after`` hear of every optimiser's step, guarded by ``in_step``.
    """

    def __init__(
        self,
        model: nn.Module,
        book: StepBook,
        first: FirstPass,
        before: Callable[[Optimizer, bool], None],
        after: Callable[[Optimizer], None],
        in_step: Guard,
    ) -> None:
        self._book = book
        self._handles: list[Removable] = []
        try:
            forget_compiled_code()
            self._handles += install(model, [(intake.tapped, intake) for intake in book.layers.intakes])
            self._handles += RootHook(first.begin, first.end, book.guard).attach(model)
            self._watcher = StepWatcher(before, after, in_step)
        except BaseException:
            self._take_off()
            raise

    def settle(self, optimizer: Optimizer) -> None:
        """An optimiser is about to step, which one of recorded parameters does outside of their forward pass."""
        if is_within(self._book.guard) and next(self._book.members(optimizer), None) is not None:
            leave_all(self._book.guard)

    def remove(self) -> None:
        """Leave the model and the optimisers as they would be without us."""
        leave_all(self._book.guard)
        self._take_off()
        for intake in self._book.layers.intakes:
            intake.detach()
        self._watcher.close()

    def _take_off(self) -> None:
        for handle in self._handles:
            handle.remove()
