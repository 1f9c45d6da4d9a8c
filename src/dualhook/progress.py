"""Says how long a replay will take, and how far it is."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from dualhook.query import Composition
from dualhook.records import RowSource

__all__ = ["ReplayProgress"]

LONG = 10.0  # seconds from which on a replay is announced
PER_ENTRY, PER_QUERY = 6e-11, 3e-12  # seconds for a row and an entry of a weight, on one processor; a rough guide


class ReplayProgress:
    """One line on standard error before a long replay, and on a terminal a bar while it runs.

    ``verbose=False`` is silent.
    """

    def __init__(self) -> None:
        self.verbose = True
        self._bar: Any = None

    @contextmanager
    def over(self, source: RowSource, made_of: Sequence[Composition], queries: int = 0) -> Iterator[None]:
        """While layers are replayed, all in one."""
        replayed = [one for one in made_of if one.replays and not one.preview]
        if not replayed or self._bar is not None:
            yield
            return
        work = {one.spec.name: sum(share.weight.numel() for share in one.replays) for one in replayed}
        entries = sum(size * source.count(name) for name, size in work.items())
        seconds = entries * (PER_ENTRY + PER_QUERY * queries) / torch.get_num_threads()
        if self.verbose and seconds >= LONG:
            print(
                f"dualhook: replaying the optimiser over {len(work)} layers, about {_rounded(seconds)}; "
                "attend(method='preview') names most of the same patterns sooner",
                file=sys.stderr,
            )
        total = sum(work[one.spec.name] * one.horizon for one in replayed)
        with tqdm(
            total=total, desc="replay", unit=" entries", unit_scale=True, leave=False, disable=self._silent
        ) as bar:
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None

    def tick(self, entries: int) -> None:
        """So many entries of a weight have gone through a step."""
        if self._bar is not None:
            self._bar.update(entries)

    @property
    def _silent(self) -> bool | None:
        return None if self.verbose else True  # None: where standard error is no terminal


def _rounded(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
