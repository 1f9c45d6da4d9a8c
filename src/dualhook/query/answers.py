"""Answers that are kept: what a replay found for some queries, whole or as far as it came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Answer", "Answers", "Started", "oldest_first"]

PART = "part/"
STATE = "state/"


class Answers(Protocol):
    """Where answers lie beside a memory: named tensors under a key."""

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """What was put there, or None."""
        ...

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors, whole or not at all."""
        ...

    def drop(self, key: str) -> None:
        """Forget a key, if it is there."""
        ...


@dataclass(frozen=True)
class Answer:
    """What a replay found: contributions [q, n], oldest pattern first, and the layer's output by parts [q, p, o]."""

    contribution: Tensor
    parts: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        named = {PART + name: part.contiguous() for name, part in self.parts.items()}
        return {"contribution": self.contribution.contiguous(), **named}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor] | None, *, queries: int, patterns: int) -> Answer | None:
        """From named tensors; None if they are no answer for so many queries and patterns."""
        found = None if tensors is None else tensors.get("contribution")
        if tensors is None or found is None or found.shape[0] != queries or found.shape[1] > patterns:
            return None
        return cls(found, {n.removeprefix(PART): part for n, part in tensors.items() if n.startswith(PART)})

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(values.nbytes for values in self.tensors().values())


@dataclass(frozen=True)
class Started:
    """A replay as far as it came: through all steps after ``step``, with their contributions and its state."""

    step: int
    scores: Tensor | None
    state: Mapping[str, Tensor] | None

    @classmethod
    def none(cls) -> Started:
        """Not begun."""
        return cls(0, None, None)

    @property
    def upto(self) -> int | None:
        """The step to go back from; None: the horizon."""
        return None if self.state is None else self.step

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        assert self.scores is not None
        assert self.state is not None
        named = {STATE + name: held for name, held in self.state.items()}
        return {"step": torch.tensor(self.step), "contribution": self.scores, **named}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor] | None) -> Started:
        """From named tensors."""
        if tensors is None:
            return cls.none()
        state = {name.removeprefix(STATE): held for name, held in tensors.items() if name.startswith(STATE)}
        return cls(int(tensors["step"]), tensors["contribution"], state)


def oldest_first(scores: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Contributions [q, n] from those of blocks of rows, each with the pattern number of its first row."""
    return torch.cat([found for _, found in sorted(scores, key=lambda block: block[0])], 1)
