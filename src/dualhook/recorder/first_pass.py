"""The first forward pass is looked at: layers with uses that no tap has seen are not recorded, in no process."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch.optim import Optimizer

from dualhook.capture import Audit, Selection, Verdict
from dualhook.recorder.ranks import Ranks
from dualhook.recorder.steps import StepBook
from dualhook.store import Layout, Manifest

__all__ = ["FirstPass"]


class FirstPass:
    """Narrows a selection to what is seen; ``is_over`` where the first part of a resumed memory has done so."""

    def __init__(
        self, selection: Selection, book: StepBook, layout: Layout, ranks: Ranks, *, is_over: bool = False
    ) -> None:
        self.selection = selection
        """What is recorded."""
        self._book = book
        self._layout = layout
        self._ranks = ranks
        self._is_over = is_over
        self._verdict: Verdict | None = None  # of this process, until the first step brings those of all together

    def begin(self, sizes: frozenset[int]) -> None:
        """A forward pass of the model begins, on inputs of these sizes."""
        self._book.input_sizes = sizes
        if self._is_over:
            return
        if torch.is_grad_enabled() and self._book.recording and not self._book.pending.seen:
            self._book.audit = Audit()

    def end(self, outputs: Any) -> None:
        """It is over."""
        audit, self._book.audit = self._book.audit, None
        if audit is None:
            return
        self._verdict = audit.verdict(outputs, self._book.layers.parameters())
        if not self._ranks.several:
            self._narrow(self._verdict)

    def agree(self, optimizer: Optimizer) -> None:
        """With the first step at last: what one process sees of a model another one may not, all record the same.

        Of a model whose forward pass could not be looked at, such as a compiled one, the calls tell.
        """
        if not self._is_over and any(self._book.members(optimizer)):
            own = self._book.layers.verdict() if self._verdict is None else self._verdict
            verdict = reduce(Verdict.joined, self._ranks.gather(own))
            if verdict.seen:  # else the step works with gradients that came another way
                self._narrow(verdict)

    def _narrow(self, verdict: Verdict) -> None:
        self._is_over = True
        audited = self.selection.audited(verdict)
        if audited == self.selection:
            return
        self.selection = audited
        self._book.narrow(audited)
        if not self._ranks.rank:
            replace(Manifest.read(self._layout), layers=self.selection.specs).write(self._layout)
