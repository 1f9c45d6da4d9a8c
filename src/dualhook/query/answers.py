"""What a replay has found for some queries, kept for the next question about them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dualhook.query.streaming import LayerQuery, Scores

__all__ = ["Answer", "Answers", "Gathered", "key_of"]

PART = "part/"


class Answers(Protocol):
    """Where answers lie beside a memory: named tensors under a key."""

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """What was put there, or None."""
        ...

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors, whole or not at all."""
        ...


@dataclass(frozen=True)
class Answer:
    """Contributions [q, n] of a layer's patterns from number ``first`` on, and its output by parts [q, p, o]."""

    contribution: Tensor
    first: int
    parts: Mapping[str, Tensor]

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        named = {PART + name: part.contiguous() for name, part in self.parts.items()}
        return {"contribution": self.contribution.contiguous(), "first": torch.tensor(self.first), **named}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Answer:
        """What :meth:`to_tensors` gave."""
        parts = {name.removeprefix(PART): part for name, part in tensors.items() if name.startswith(PART)}
        return cls(tensors["contribution"], int(tensors["first"]), parts)


class Gathered:
    """Collects the contributions of a pass, whatever order it goes in."""

    def __init__(self, asked: LayerQuery) -> None:
        self._none = asked.query.new_zeros(len(asked), 0)
        self._found: list[tuple[int, Tensor]] = []

    def add(self, scores: Scores) -> None:
        self._found.append((scores.rows.first, scores.contribution))

    def answer(self, parts: Mapping[str, Tensor]) -> Answer:
        """All of them, oldest pattern first."""
        ordered = sorted(self._found, key=lambda found: found[0])
        together = torch.cat([self._none, *(contribution for _, contribution in ordered)], 1)
        return Answer(together, ordered[0][0] if ordered else 0, parts)


def key_of(asked: LayerQuery, source: str) -> str:
    """A name for an answer: what is asked of which layer, made of what, from which rows (``source`` names them)."""
    found = hashlib.sha256(f"{source}|{asked.name}|{asked.made_of.horizon}|{asked.made_of.preview}".encode())
    for values in (asked.query, asked.direction):
        found.update(f"{values.dtype}{list(values.shape)}".encode())
        found.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    for share in asked.made_of.replays:
        found.update(share.readout.numpy().tobytes())
    return found.hexdigest()[:40]
