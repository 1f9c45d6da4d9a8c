"""Ranks, and intervals by bootstrap."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["area_under_roc", "bootstrap", "pearson", "ranks", "spearman"]

RESAMPLES = 200
LEVEL = 0.95


def ranks(values: np.ndarray) -> np.ndarray:
    """The ranks along the first axis of [n, ...], equals sharing the mean of theirs."""
    columns = values.reshape(len(values), -1)
    ranked = np.empty(columns.shape)
    for number, column in enumerate(columns.T):
        ordered = np.sort(column)
        ranked[:, number] = (np.searchsorted(ordered, column) + np.searchsorted(ordered, column, "right") + 1) / 2
    return ranked.reshape(values.shape)


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlations along the first axis of [n, ...]; 0 where one side is constant."""
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    correlations: np.ndarray = np.divide((a * b).sum(0), norm, out=np.zeros(norm.shape), where=norm > 0)
    return correlations


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlations along the first axis of [n, ...]."""
    return pearson(ranks(a), ranks(b))


def area_under_roc(scores: np.ndarray, positive: np.ndarray) -> float:
    """How often the positive of a pair has the larger score than the negative; equals count half, nan if no pair."""
    count = int(positive.sum())
    pairs = count * (len(scores) - count)
    return float((ranks(scores)[positive].sum() - count * (count + 1) / 2) / pairs) if pairs else float("nan")


def bootstrap(statistic: Callable[[np.ndarray], float], count: int, *, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of a statistic of ``count`` things, resampled with replacement 200 times.

    ``statistic`` takes which of them [count] are looked at.
    """
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(count, size=count)) for _ in range(RESAMPLES)]
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
