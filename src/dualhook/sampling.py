"""Which indices a sampler hands out: for whoever tells a recorder the rows of a loader that it follows by itself."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["SamplerTape"]


class SamplerTape:
    """A sampler that notes what it hands out."""

    def __init__(self, sampler: Iterable[Any]) -> None:
        self.sampler = sampler
        self.drawn: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        inner = iter(self.sampler)  # at once: some samplers draw random numbers here
        self.drawn = deque()
        return map(self._note, inner, itertools.repeat(self.drawn))

    @staticmethod
    def _note(indices: Any, drawn: deque[Any]) -> Any:
        drawn.append(indices)
        return indices

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "sampler":  # a copy in the making
            raise AttributeError(name)
        return getattr(self.sampler, name)
