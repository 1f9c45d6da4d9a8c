"""Steps that are over, but for what their rows say.

A step needs its gradients looked at before it changes them: some entries of each. Its rows stay where they are until
they are written, so that those of several steps can be compared with what was seen in one go.
"""

from __future__ import annotations

from dualhook.capture import LayerProbe, Use
from dualhook.recorder.notices import Notices
from dualhook.recorder.ranks import Ranks
from dualhook.recorder.step import Glance, TakenStep
from dualhook.store import Writer

__all__ = ["Backlog"]

MOST = 16  # steps that are measured in one go
ROWS = 2**15  # of a layer that are measured at a time, about: what is gathered of them stays small


class Backlog:
    """Takes steps in order and puts them in the ledger, at the latest before their rows are handed on for writing."""

    def __init__(self, writer: Writer, ranks: Ranks, notices: Notices) -> None:
        self._writer = writer
        self._ranks = ranks
        self._notices = notices
        self._steps: list[TakenStep] = []
        writer.before_seal = self.work

    def take(self, step: TakenStep) -> None:
        """A step is over; its rows are committed, and all of it is in host memory."""
        self._steps.append(step)
        self._writer.builder.add(step.number, [])
        self._expect()
        if not step.glances or step.is_worth_telling or len(self._steps) >= MOST:
            self.work()

    def work(self) -> None:
        """Measure what is left to be, and put all steps in the ledger."""
        self._measure()
        while self._steps:
            entries = list(self._steps[0].entries(self._notices))
            self._writer.builder.add(self._steps[0].number, [] if self._ranks.rank else entries)
            del self._steps[0]
        self._expect()

    def give_up(self) -> int | None:
        """Forget the steps that are left; the number of the first one."""
        left, self._steps = self._steps, []
        self._expect()
        return left[0].number if left else None

    def _expect(self) -> None:
        self._writer.builder.expected = sum(len(step.drafts) for step in self._steps)

    def _measure(self) -> None:
        layers: dict[str, list[tuple[TakenStep, Glance]]] = {}
        for step in self._steps:
            for glance in step.glances:
                layers.setdefault(glance.probe.spec.name, []).append((step, glance))
        for layer, own in layers.items():
            if not (own[0][1].probe.is_plain and self._writer.builder.is_plain(layer)):
                for step, glance in own:
                    step.measured.update(glance.probe.apart(glance.seen, self._uses(glance.probe, step.number)))
                continue
            rows, bounds = self._writer.builder.of_steps(layer, [step.number for step, _ in own])
            at_once = max(1, ROWS * len(own) // max(1, len(rows)))
            for begin in range(0, len(own), at_once):
                part, within = own[begin : begin + at_once], bounds[begin : begin + at_once]
                first, last = within[0][0], within[-1][1]
                places = [(start - first, stop - first) for start, stop in within]
                found = part[0][1].probe.later([glance.seen for _, glance in part], rows.part(first, last), places)
                for (step, _), measured in zip(part, found, strict=True):
                    step.measured.update(measured)
        for step in self._steps:
            step.glances.clear()

    def _uses(self, probe: LayerProbe, step: int) -> list[Use]:
        """The rows of a step, of all uses of a weight."""
        rows = {spec: self._writer.builder.of_step(spec.name, step) for spec in probe.sharing}
        return [Use(probe.spec, spec, own) for spec, own in rows.items() if own is not None]
