"""What else than an optimiser's step has changed a parameter: Lookahead's synchronisations, and what nobody knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualhook.optimizers import LOOKAHEAD
from dualhook.recorder.ranks import Ranks
from dualhook.recorder.staging import Bring, at_once
from dualhook.recorder.watched import Watched, fingerprints
from dualhook.records import LedgerEntry, Mark
from dualhook.store import Writer

__all__ = ["Changes", "Look"]


@dataclass(frozen=True)
class Look:
    """Some numbers of parameters between two steps, in host memory or on their way there."""

    step: int
    """The step after which it is."""
    seen: list[tuple[Watched, Tensor | None]]
    differs: list[bool] | None = None
    """Whether they are not what is known in any process, where that has had to be found together."""


class Changes:
    """Looks at parameters, and later says what that has shown: to wait for their numbers would hold up training."""

    def __init__(self, ranks: Ranks, writer: Writer) -> None:
        self._ranks = ranks
        self._writer = writer

    def look(self, among: Sequence[Watched], step: int, bring: Bring) -> Look:
        """Look at some parameters after ``step``; of shards, once what the last step has left is here."""
        now = fingerprints(among, at_once if self._ranks.sharded else bring)
        seen = list(zip(among, now, strict=True))
        if not self._ranks.sharded:
            return Look(step, seen)
        return Look(step, seen, self._ranks.any([_differ(watched.known, found) for watched, found in seen]))

    def found(self, look: Look) -> tuple[set[str], list[LedgerEntry]]:
        """The parameters that something unknown has changed, and the synchronisations; steps before are in the ledger.

        By value: an evaluation may swap averaged weights in and out again, and ``.data`` leaves no other trace.
        """
        entries, changed = [], set()
        for number, (watched, now) in enumerate(look.seen):
            if look.differs is not None:  # of shards each process would find its own: what changes them is not told
                changed |= {watched.name} if look.differs[number] else set()
                continue
            if not _differ(watched.known, now):
                continue
            found = watched.synchronization(now)
            if found is None or now is None or not self._reaches(watched, found[1]):
                changed.add(watched.name)
                continue
            watched.synchronize(look.step, now)
            if found[0] < 1:  # else they were the slow weights already, give or take rounding
                watched.synchronized = True
                hyper = {"alpha": found[0], "slow_step": float(found[1])}
                entries.append(LedgerEntry(look.step, watched.name, LOOKAHEAD, hyper, {}, 1.0, 0.0, Mark(0)))
        return changed, entries

    def _reaches(self, watched: Watched, slow_step: int) -> bool:
        """Whether the weights after ``slow_step`` will still be known to a synchronisation.

        Folding keeps those of the last one by itself; of those before the first it has to hear, before it asks.
        """
        if not watched.synchronized:
            self._writer.slow_steps[watched.name] = slow_step
        return watched.synchronized or self._writer.folded <= slow_step


def _differ(known: Tensor | None, now: Tensor | None) -> bool:
    """Whether something else has written to a parameter after its last step; NaN is NaN."""
    if known is None or now is None:
        return known is not None
    if known.dtype != now.dtype:
        known, now = known.double(), now.double()
    if known.shape != now.shape:
        return True
    return not (torch.equal(known, now) or bool(((known == now) | (known.isnan() & now.isnan())).all()))
