"""Training again on parts of the data: what every score of influence is judged by."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dualhook.errors import DualHookError

__all__ = ["Retrainings", "Train", "check_scores", "random_subsets", "retrain"]

Train = Callable[..., Any]
"""``train(samples, seed)`` trains on these dataset rows (int64, ascending) and returns what is measured: [query]."""


@dataclass(frozen=True)
class Retrainings:
    """What training on parts of the data came to.

    ``kept`` [subset, sample] (bool) says on which of the dataset rows ``samples`` [sample] each part trained,
    ``outcomes`` [seed, subset, query] (float64) what was measured then.
    """

    samples: np.ndarray
    kept: np.ndarray
    seeds: tuple[int, ...]
    outcomes: np.ndarray


def random_subsets(samples: int, subsets: int, fraction: float, *, seed: int = 0) -> np.ndarray:
    """Random parts [subset, sample] (bool), each of the same share of the samples.

    Raises:
        DualHookError: a part would be empty or everything.
    """
    size = round(fraction * samples)
    if not 0 < size < samples:
        raise DualHookError(f"fraction={fraction} of {samples} samples is {size}: expected some and not all of them")
    generator = np.random.default_rng(seed)
    kept = np.zeros((subsets, samples), dtype=bool)
    for row in kept:
        row[generator.choice(samples, size, replace=False)] = True
    return kept


def retrain(
    train: Train,
    samples: np.ndarray,
    *,
    subsets: int | np.ndarray = 50,
    fraction: float = 0.5,
    seeds: Sequence[int] = (0,),
    perturbation: float = 0.0,
    folder: str | os.PathLike[str] | None = None,
) -> Retrainings:
    """Train on parts of the dataset rows ``samples`` [sample], each part once per seed.

    ``subsets`` is how many random parts of the share ``fraction``, or the parts themselves [subset, sample] (bool).
    With a ``folder``, which belongs to one ``train``, every outcome is a file there, and what is there is not trained
    again. A ``perturbation`` is handed on as ``train(samples, seed, perturbation=...)``.

    Raises:
        DualHookError: parts of another shape, or outcomes that are no finite row of numbers of one length.
    """
    samples = np.asarray(samples, dtype=np.int64)
    if samples.ndim != 1 or len(np.unique(samples)) != len(samples):
        raise DualHookError(f"samples: expected dataset rows [sample], each once, got shape {samples.shape}")
    kept = random_subsets(len(samples), subsets, fraction) if isinstance(subsets, int) else np.asarray(subsets)
    if kept.dtype != bool or kept.ndim != 2 or kept.shape[1] != len(samples):
        raise DualHookError(f"subsets: expected bool [subset, {len(samples)}], got {kept.dtype} {list(kept.shape)}")
    if not kept.any(1).all():
        raise DualHookError(f"subset {int(kept.any(1).argmin())} keeps no sample: there is nothing to train on")
    outcomes = [
        [_outcome(train, samples[row], seed, perturbation, None if folder is None else Path(folder)) for row in kept]
        for seed in seeds
    ]
    lengths = {len(row) for rows in outcomes for row in rows}
    if len(lengths) != 1:
        raise DualHookError(f"train must measure the same queries every time, and returned {sorted(lengths)} of them")
    return Retrainings(samples, kept, tuple(seeds), np.array(outcomes))


def perturbable(train: Train) -> bool:
    """Whether ``train`` takes ``perturbation=``."""
    parameters = inspect.signature(train).parameters
    return "perturbation" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def check_scores(scores: Any, samples: int) -> np.ndarray:
    """Scores as float64 [query, sample].

    Raises:
        DualHookError: another shape, or a score that is no finite number.
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != samples:
        raise DualHookError(f"scores: expected [query, {samples}], got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise DualHookError("scores: expected finite numbers, got NaN or infinity")
    return array


def _outcome(train: Train, samples: np.ndarray, seed: int, perturbation: float, folder: Path | None) -> np.ndarray:
    path = None if folder is None else folder / f"{_name(samples)}-{seed}-{perturbation:g}.npy"
    if path is not None and path.exists():
        return np.asarray(np.load(path, allow_pickle=False))
    extra = {"perturbation": perturbation} if perturbation else {}
    outcome = np.asarray(train(samples, seed, **extra), dtype=np.float64)
    if outcome.ndim != 1:
        raise DualHookError(f"train must return what it measured as [query], got shape {list(outcome.shape)}")
    if not np.isfinite(outcome).all():
        raise DualHookError(
            f"the training on {len(samples)} samples under seed {seed} diverged: it measured NaN or infinity"
        )
    if path is not None:
        with _replacing(path) as file:
            np.save(file, outcome)
    return outcome


def _name(samples: np.ndarray) -> str:
    return hashlib.sha256(samples.tobytes()).hexdigest()[:24]


@contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    with unfinished.open("wb") as file:
        yield file
    unfinished.replace(path)
