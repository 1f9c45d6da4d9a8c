"""Timing in turns: ways of doing the same run block by block beside each other, and are compared as ratios.

A machine that changes its speed then changes it for all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

__all__ = ["in_turns", "spread"]


def in_turns(ways: Mapping[str, Callable[[], float]], rounds: int, *, warm: bool = True) -> dict[str, list[float]]:
    """The seconds that each way returns for its block, round by round; with ``warm`` after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1 if warm else 0, rounds):
        for name, block in ways.items():
            spent = block()
            if number >= 0:
                seconds[name].append(spent)
    return seconds


def spread(seconds: Sequence[float], base: Sequence[float]) -> str:
    """The ratio of two ways: its median over the rounds, the lowest and the highest."""
    ratios = sorted(a / b for a, b in zip(seconds, base, strict=True))
    return f"{statistics.median(ratios):.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})"
