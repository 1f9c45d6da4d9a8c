"""Snapshots of what optimisers scale gradients by, few and further and further apart: what a preview lives on."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from dualhook.capture import whole
from dualhook.optimizers import ReplayRule, rule_for
from dualhook.recorder.watched import Watched, state_of
from dualhook.store import Writer

__all__ = ["Snapshots"]

RATIO = 1.25  # between the steps of two snapshots: 38 of them in 5,000 steps


class Snapshots:
    """Keeps the state tensors that a rule's preview is made of, after steps in geometric progression."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._optimizers: dict[str, tuple[Watched, weakref.ref[Optimizer], tuple[str, ...]]] = {}
        self._next = 1
        self._last = 0

    def go_on(self, step: int) -> None:
        """Continue after a step."""
        self._last, self._next = step, max(step + 1, int(step * RATIO))

    def stepped(self, optimizer: Optimizer, name: str, stepped: Sequence[Watched]) -> None:
        """Note which optimiser has stepped on what; ``name`` is its class as the ledger has it."""
        rule = rule_for(name)
        wanted = rule.preview_state if isinstance(rule, ReplayRule) else ()
        for watched in stepped:
            self._optimizers[watched.name] = (watched, weakref.ref(optimizer), wanted)

    def after(self, step: int, *, final: bool = False) -> None:
        """A step is over: keep a snapshot if one is due, or if the step was the ``final`` one."""
        if step <= self._last or not (final or step >= self._next):
            return
        self.go_on(step)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, (watched, reference, wanted) in self._optimizers.items():
            optimizer = reference()
            held = state_of(optimizer, watched.parameter) if optimizer is not None else {}
            found = {part: held[part] for part in wanted if isinstance(held.get(part), Tensor)}
            if found:
                parts[name] = {part: whole(value) for part, value in found.items()}
        if parts:
            try:
                self._writer.write_snapshot(step, parts)
            except OSError as error:  # the rows are what counts: training and recording go on
                self._last = sys.maxsize
                warnings.warn(f"step {step}: no more snapshots for previews: {error}", UserWarning, stacklevel=2)
