"""What else than an optimiser's step has changed a parameter: Lookahead's synchronisations, and what nobody knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualhook.optimizers import LOOKAHEAD
from dualhook.recorder.ranks import Ranks
from dualhook.recorder.staging import Bring, at_once
from dualhook.recorder.watched import Watched
from dualhook.records import LedgerEntry, Mark
from dualhook.store import Writer

__all__ = ["Changes", "Look"]


@dataclass(frozen=True)
class Look:
    """Parameters between two steps: entries of what the last one has left of them, and of what they are now."""

    step: int
    """The step after which it is."""
    seen: list[tuple[Watched, Tensor | None, Tensor | None]]
    differs: list[bool | Tensor]
    """Whether the two are not the same; or where [k], in numbers that may still be on their way to the host."""


class Changes:
    """Looks at parameters, and later says what that has shown: of numbers elsewhere that would make training wait."""

    def __init__(self, ranks: Ranks, writer: Writer) -> None:
        self._ranks = ranks
        self._writer = writer

    def look(self, among: Sequence[Watched], step: int, bring: Bring) -> Look:
        """Look at some parameters after ``step``; ``bring`` copies to the host what nothing writes to any more."""
        seen = [(watched, watched.entries, watched.fingerprint()) for watched in among]
        if not self._ranks.sharded:
            return Look(step, seen, _differences(seen, bring))
        # each process has looked at its own part
        differs = [_is_true(one) for one in _differences(seen, at_once)]
        return Look(step, seen, list(self._ranks.any(differs)))

    def found(self, look: Look) -> tuple[set[str], list[LedgerEntry]]:
        """The parameters that something unknown has changed, and the synchronisations; everything before is known."""
        entries, changed = [], set()
        for (watched, _, now), differs in zip(look.seen, look.differs, strict=True):
            if not _is_true(differs):
                continue
            # of shards each process would find its own: what changes them is not told apart
            sharded, known = self._ranks.sharded, watched.known
            if not sharded and known is not None and now is not None and _are_equal(known, now):
                continue  # a synchronisation that an earlier look has shown
            found = None if sharded else watched.synchronization(now)
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


def _differences(seen: Sequence[tuple[Watched, Tensor | None, Tensor | None]], bring: Bring) -> list[bool | Tensor]:
    """Whether something else has written to each of the parameters after its last step, or where.

    By value: an evaluation may swap averaged weights in and out again, and ``.data`` leaves no other trace.
    """
    found: list[bool | Tensor] = [False] * len(seen)
    alike: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor, Tensor]]] = {}
    for number, (_, before, now) in enumerate(seen):
        if before is None or now is None:
            found[number] = before is not None
        elif before.dtype != now.dtype or before.device != now.device or before.shape != now.shape:
            found[number] = not _are_equal(before, now)
        elif now.device.type == "cpu":
            found[number] = not (torch.equal(before, now) or _are_equal(before, now))
        else:
            alike.setdefault((now.device, now.dtype), []).append((number, before, now))
    for three in alike.values():  # all of a device in one copy
        same = _alike(torch.cat([one for _, one, _ in three]), torch.cat([one for _, _, one in three]))
        differs, start = bring([~same])[0], 0
        for number, _, one in three:
            found[number] = differs[start : start + len(one)]
            start += len(one)
    return found


def _is_true(differs: bool | Tensor) -> bool:
    return bool(differs.any()) if isinstance(differs, Tensor) else differs


def _are_equal(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.device != other.device:
        one, other = one.cpu().double(), other.cpu().double()
    return one.shape == other.shape and bool(_alike(one, other).all())


def _alike(one: Tensor, other: Tensor) -> Tensor:
    """Where numbers are the same; NaN is NaN."""
    return (one == other) | (one.isnan() & other.isnan())
