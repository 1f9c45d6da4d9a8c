"""What retraining says about scores of influence: rankings of subsets, removals, groups, flipped labels, noise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from dualhook.errors import DualHookError
from dualhook.evaluate.retraining import Retrainings, Train, check_scores, perturbable, random_subsets, retrain
from dualhook.evaluate.statistics import area_under_roc, bootstrap, pearson, spearman
from dualhook.table import Table

__all__ = [
    "datamodelling_score",
    "datamodelling_table",
    "group_table",
    "mislabel_table",
    "noise_table",
    "removal_table",
]

FEWEST = 5  # subsets or groups that a rank correlation is worth printing of
PERTURBATION = 1e-7  # of the initial weights: float32's rounding
CHAOTIC = 0.5  # of what one sample moves: a perturbation that moves as much drowns it
CHAOS = "training is chaotic here: what is claimed of a single sample means nothing"
_INTERVAL = "interval: 95 %, by bootstrap over queries"


def datamodelling_score(scores: Any, kept: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """The linear datamodelling score of every query [query]: Spearman of predicted and measured outcomes over subsets.

    A prediction is the sum of the ``scores`` [query, sample] of the samples a subset keeps (``kept`` [subset, sample]);
    ``outcomes`` [subset, query] is what was measured (Park et al. 2023, TRAK, section 2).

    Raises:
        DualHookError: shapes that do not fit, fewer than 5 subsets, or numbers that are not finite.
    """
    kept, outcomes = np.asarray(kept, dtype=bool), np.asarray(outcomes, dtype=np.float64)
    scores = check_scores(scores, kept.shape[-1])
    if outcomes.shape != (len(kept), len(scores)):
        raise DualHookError(f"outcomes: expected [{len(kept)}, {len(scores)}], got {list(outcomes.shape)}")
    if not np.isfinite(outcomes).all():
        raise DualHookError("outcomes: expected finite numbers; NaN or infinity is a training that diverged")
    _enough(len(kept), "subsets")
    return spearman(kept @ scores.T, outcomes)


def datamodelling_table(scores: Any, runs: Retrainings) -> Table:
    """The linear datamodelling score against the retrainings of every seed, and against their mean.

    Columns: against; score (the mean over queries); the ends of its interval over queries and over subsets; ceiling,
    what the other seeds' mean outcome scores in the place of a prediction (nan if there is none).
    """
    scores = check_scores(scores, len(runs.samples))
    truths = {f"seed {seed}": outcomes for seed, outcomes in zip(runs.seeds, runs.outcomes, strict=True)}
    if len(truths) > 1:
        truths["mean of seeds"] = runs.outcomes.mean(0)
    rows = []
    for number, (name, truth) in enumerate(truths.items()):
        each = datamodelling_score(scores, runs.kept, truth)
        over_subsets = bootstrap(partial(_agreement, runs.kept @ scores.T, truth), len(truth))
        others = np.delete(runs.outcomes, number, axis=0) if number < len(runs.seeds) else runs.outcomes[:0]
        ceiling = float(spearman(others.mean(0), truth).mean()) if len(others) else float("nan")
        rows.append((name, float(each.mean()), *_over(each), *over_subsets, ceiling))
    names = ["against", "score", "queries_low", "queries_high", "subsets_low", "subsets_high", "ceiling"]
    return _table(
        names,
        rows,
        f"linear datamodelling score over {len(runs.kept)} subsets, mean of {len(scores)} queries",
        "intervals: 95 %, by bootstrap over queries and over subsets; ceiling: the other seeds' mean as the prediction",
    )


def removal_table(
    train: Train,
    scores: Any,
    samples: np.ndarray,
    *,
    shares: Sequence[float] = (0.01, 0.05),
    seeds: Sequence[int] = (0,),
    folder: str | None = None,
) -> Table:
    """The drop of every query's measured quantity once its highest samples have been left out, by retraining.

    One training a query, share and seed; beside it the drop after a random removal of as many. Columns: seed, share,
    removed, drop (the mean over queries) with the ends of its interval over queries, random, and seeds: the size of
    what another seed changes (nan for one seed).
    """
    scores = check_scores(scores, len(samples))
    order, rows = np.argsort(-scores, axis=1, kind="stable"), []
    queries = np.arange(len(scores))
    whole = _whole(train, samples, seeds, folder, len(scores))
    between = _between(whole)
    for share in shares:
        count = _count(share, len(samples))
        kept = np.ones(scores.shape, dtype=bool)
        np.put_along_axis(kept, order[:, :count], False, axis=1)
        fitted = retrain(train, samples, subsets=kept, seeds=seeds, folder=folder).outcomes
        random = ~random_subsets(len(samples), 1, count / len(samples))
        chance = retrain(train, samples, subsets=random, seeds=seeds, folder=folder).outcomes
        for seed, full, without, by_chance in zip(seeds, whole, fitted, chance, strict=True):
            drops = full - without[queries, queries]
            rows.append(
                (seed, share, count, float(drops.mean()), *_over(drops), float((full - by_chance[0]).mean()), between)
            )
    names = ["seed", "share", "removed", "drop", "low", "high", "random", "seeds"]
    return _table(names, rows, f"drop after leaving out each of {len(scores)} queries' highest samples", _INTERVAL)


def group_table(
    train: Train,
    scores: Any,
    samples: np.ndarray,
    *,
    share: float = 0.05,
    groups: int = 20,
    seeds: Sequence[int] = (0,),
    folder: str | None = None,
) -> Table:
    """Predicted and real effect of leaving random groups out: columns seed, correlation, low, high, sign, size, noise.

    Correlation is Pearson's over the groups, the mean of the queries, with the ends of its interval over queries; sign
    the share of effects whose sign is predicted; size the predicted effects' mean size over the real ones'; noise the
    correlation of the real effects with another seed's (nan for one seed).
    """
    _enough(groups, "groups")
    scores = check_scores(scores, len(samples))
    kept = ~random_subsets(len(samples), groups, _count(share, len(samples)) / len(samples))
    whole = _whole(train, samples, seeds, folder, len(scores))
    real = whole[:, None] - retrain(train, samples, subsets=kept, seeds=seeds, folder=folder).outcomes
    predicted, rows = ~kept @ scores.T, []
    for number, (seed, effects) in enumerate(zip(seeds, real, strict=True)):
        each = pearson(predicted, effects)
        others = np.delete(real, number, axis=0)
        rows.append(
            (
                seed,
                float(each.mean()),
                *_over(each),
                float((np.sign(predicted) == np.sign(effects)).mean()),
                float(np.abs(predicted).mean() / np.abs(effects).mean()),
                float(pearson(others.mean(0), effects).mean()) if len(others) else float("nan"),
            )
        )
    names = ["seed", "correlation", "low", "high", "sign", "size", "noise"]
    return _table(names, rows, f"leaving out {groups} random groups of {share:.3g} of the samples", _INTERVAL)


def mislabel_table(suspicions: dict[str, Any], flipped: np.ndarray) -> Table:
    """How well scores find samples whose label was flipped: columns score, auc, low, high.

    ``suspicions`` are scores [sample] by name, larger for the more suspicious; ``flipped`` [sample] (bool).

    Raises:
        DualHookError: shapes that do not fit, scores that are not finite, or no flipped or no other sample.
    """
    flipped, rows = np.asarray(flipped, dtype=bool), []
    if flipped.ndim != 1 or flipped.all() or not flipped.any():
        raise DualHookError(
            f"flipped: {int(flipped.sum())} of {flipped.size} samples; expected some and not all of them"
        )
    for name, suspicion in suspicions.items():
        scores = check_scores(np.asarray(suspicion)[None], len(flipped))[0]
        ends = bootstrap(partial(_area, scores, flipped), len(flipped))
        rows.append((name, area_under_roc(scores, flipped), *ends))
    title = f"finding {int(flipped.sum())} flipped labels among {len(flipped)} samples: area under the ROC curve"
    return _table(["score", "auc", "low", "high"], rows, title, "interval: 95 %, by bootstrap over samples")


def noise_table(
    train: Train,
    samples: np.ndarray,
    *,
    seeds: tuple[int, int] = (0, 1),
    singles: int = 3,
    folder: str | None = None,
) -> Table:
    """What the measured quantity is moved by things that no score predicts, beside the removal of single samples.

    Columns: change, moved (the mean size over the queries), low, high (its interval over them), of_one_sample (its
    ratio to what one random sample moves). The initial weights are perturbed where ``train`` takes ``perturbation=``;
    where that moves as much as half of what one sample does, the footer says that claims about one sample mean nothing.

    Raises:
        DualHookError: no two seeds, or a training that diverged.
    """
    if len(set(seeds)) != 2:
        raise DualHookError(f"seeds={seeds}: expected two different ones")
    whole = np.ones((1, len(samples)), dtype=bool)
    base, other = retrain(train, samples, subsets=whole, seeds=seeds, folder=folder).outcomes[:, 0]
    fraction = 1 - 1 / len(samples)
    single = random_subsets(len(samples), singles, fraction)
    without = retrain(train, samples, subsets=single, seeds=seeds[:1], folder=folder).outcomes[0]
    moved = {
        f"one sample left out (mean of {singles})": np.abs(without - base).mean(0),
        "another seed": np.abs(other - base),
    }
    footer = f"{_INTERVAL}; train takes no perturbation=, so how chaotic it is was not measured"
    if perturbable(train):
        shaken = retrain(
            train, samples, subsets=whole, seeds=seeds[:1], perturbation=PERTURBATION, folder=folder
        ).outcomes[0, 0]
        moved[f"initial weights perturbed by {PERTURBATION:g}"] = np.abs(shaken - base)
        footer = _INTERVAL
    one, *_ = (float(sizes.mean()) for sizes in moved.values())
    rows = [
        (name, float(sizes.mean()), *_over(sizes), float(sizes.mean()) / one if one else float("nan"))
        for name, sizes in moved.items()
    ]
    if perturbable(train) and rows[-1][1] >= CHAOTIC * one:
        footer += f"; {CHAOS}"
    return _table(["change", "moved", "low", "high", "of_one_sample"], rows, "what moves the measured quantity", footer)


def _agreement(predicted: np.ndarray, outcomes: np.ndarray, chosen: np.ndarray) -> float:
    """The mean rank correlation over the chosen subsets of [subset, query]."""
    return float(spearman(predicted[chosen], outcomes[chosen]).mean())


def _area(scores: np.ndarray, flipped: np.ndarray, chosen: np.ndarray) -> float:
    return area_under_roc(scores[chosen], flipped[chosen])


def _over(values: np.ndarray) -> tuple[float, float]:
    """The interval of a mean over queries."""
    return bootstrap(lambda chosen: float(values[chosen].mean()), len(values))


def _whole(train: Train, samples: np.ndarray, seeds: Sequence[int], folder: str | None, queries: int) -> np.ndarray:
    """What training on everything came to [seed, query]."""
    kept = np.ones((1, len(samples)), dtype=bool)
    outcomes = retrain(train, samples, subsets=kept, seeds=seeds, folder=folder).outcomes[:, 0]
    if outcomes.shape[1] != queries:
        raise DualHookError(f"train measures {outcomes.shape[1]} queries, the scores have {queries}")
    return outcomes


def _between(whole: np.ndarray) -> float:
    """How far the outcomes [seed, query] of two seeds lie apart, in the mean."""
    pairs = [np.abs(a - b).mean() for number, a in enumerate(whole) for b in whole[:number]]
    return float(np.mean(pairs)) if pairs else float("nan")


def _count(share: float, samples: int) -> int:
    count = round(share * samples)
    if not 0 < count < samples:
        raise DualHookError(f"share={share} of {samples} samples is {count}: expected some and not all of them")
    return count


def _enough(count: int, what: str) -> None:
    if count < FEWEST:
        raise DualHookError(f"{count} {what} are too few for a correlation: expected at least {FEWEST}")


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]], title: str, footer: str) -> Table:
    return Table(dict(zip(names, zip(*rows, strict=True), strict=True)), title=title, footer=footer)
