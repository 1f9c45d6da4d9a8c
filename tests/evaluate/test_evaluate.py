"""The judge judged: linear regression, where every retraining has a closed form, and planted answers."""

from __future__ import annotations

import numpy as np
import pytest

from dualhook.errors import DualHookError
from dualhook.evaluate import (
    Retrainings,
    datamodelling_score,
    datamodelling_table,
    group_table,
    mislabel_table,
    noise_table,
    random_subsets,
    removal_table,
    retrain,
)
from dualhook.evaluate.statistics import area_under_roc, bootstrap, ranks, spearman

SAMPLES = np.arange(100, 140)
generator = np.random.default_rng(1)
X, Y, QUERIES = generator.normal(size=(40, 3)), generator.normal(size=40), generator.normal(size=(7, 3))


def ridge(samples, seed, perturbation=0.0):
    """Ridge regression's predictions; a seed adds noise, a perturbation is amplified by 10,000."""
    x, y = X[samples - 100], Y[samples - 100]
    weights = np.linalg.solve(x.T @ x + 5 * np.eye(3), x.T @ y)
    return QUERIES @ weights + 0.01 * np.random.default_rng(seed).normal(size=7) + 1e4 * perturbation


def leave_one_out():
    """What every sample adds to every prediction [query, sample], by the formula of Sherman and Morrison."""
    inverse = np.linalg.inv(X.T @ X + 5 * np.eye(3))
    residual = Y - X @ inverse @ X.T @ Y
    leverage = np.einsum("ni,ij,nj->n", X, inverse, X)
    return (QUERIES @ inverse @ X.T) * residual / (1 - leverage)


def additive(scores):
    """Training whose outcome is the sum of what its samples add."""
    return lambda samples, seed: scores[:, samples - 100].sum(1)


def test_single_removals_are_the_closed_form():
    runs = retrain(ridge, SAMPLES, subsets=~np.eye(40, dtype=bool))
    (whole,) = retrain(ridge, SAMPLES, subsets=np.ones((1, 40), dtype=bool)).outcomes[0]
    np.testing.assert_allclose((whole - runs.outcomes[0]).T, leave_one_out(), atol=1e-12)


def test_a_score_that_is_the_outcome_gets_one_and_its_negative_minus_one():
    scores = generator.normal(size=(7, 40))
    runs = retrain(additive(scores), SAMPLES, subsets=20)
    np.testing.assert_allclose(datamodelling_score(scores, runs.kept, runs.outcomes[0]), 1)
    np.testing.assert_allclose(datamodelling_score(-scores, runs.kept, runs.outcomes[0]), -1)


def test_leave_one_out_ranks_half_subsets_of_a_regression_and_chance_does_not():
    runs = retrain(ridge, SAMPLES, subsets=200, seeds=(0, 1))
    good = datamodelling_table(leave_one_out(), runs)
    chance = datamodelling_table(generator.normal(size=(7, 40)), runs)
    assert good["against"].tolist() == ["seed 0", "seed 1", "mean of seeds"]
    assert (good["score"] > 0.8).all()
    assert (np.abs(chance["score"]) < 0.2).all()
    for name in ("queries", "subsets"):
        assert (good[f"{name}_low"] <= good["score"]).all()
        assert (good["score"] <= good[f"{name}_high"]).all()
    np.testing.assert_allclose(good["ceiling"][:2], 1)  # a seed shifts all subsets alike


def test_removal_curve_of_an_additive_training_is_the_sum_of_the_highest():
    scores = generator.normal(size=(7, 40))
    table = removal_table(additive(scores), scores, SAMPLES, shares=(0.05, 0.1))
    expected = [np.sort(scores, axis=1)[:, -count:].sum(1).mean() for count in (2, 4)]
    np.testing.assert_allclose(table["drop"], expected)
    assert (np.abs(table["random"]) < table["drop"] / 2).all()
    assert np.isnan(table["seeds"]).all()


def test_groups_of_an_additive_training_are_predicted_to_the_size():
    scores = generator.normal(size=(7, 40))
    table = group_table(additive(scores), 3 * scores, SAMPLES, share=0.1, groups=10, seeds=(0, 1))
    np.testing.assert_allclose(table["correlation"], 1)
    np.testing.assert_allclose(table["sign"], 1)
    np.testing.assert_allclose(table["size"], 3)
    np.testing.assert_allclose(table["noise"], 1)


def test_planted_flips_are_found():
    flipped = np.arange(60) % 10 == 0
    table = mislabel_table({"right": flipped, "wrong": ~flipped, "none": np.zeros(60)}, flipped)
    assert table["auc"].tolist() == [1, 0, 0.5]
    noisy = mislabel_table({"noisy": flipped + generator.normal(size=60)}, flipped)
    assert noisy["low"][0] < noisy["auc"][0] < noisy["high"][0]


def test_chaos_is_named_where_rounding_moves_as_much_as_a_sample():
    def chaotic(samples, seed, perturbation=0.0):
        return ridge(samples, seed) + 1e6 * perturbation

    assert "chaotic" in noise_table(chaotic, SAMPLES).footer
    calm = noise_table(ridge, SAMPLES)
    assert "chaotic" not in calm.footer
    assert calm.to_pandas()["moved"].iloc[2] == pytest.approx(1e-3)
    blind = noise_table(lambda samples, seed: ridge(samples, seed), SAMPLES)
    assert "not measured" in blind.footer
    assert len(blind) == 2


def test_what_is_in_the_folder_is_not_trained_again(tmp_path):
    calls = []

    def train(samples, seed):
        calls.append(seed)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return ridge(samples, seed)

    with pytest.raises(KeyboardInterrupt):
        retrain(train, SAMPLES, subsets=5, seeds=(0, 1), folder=tmp_path)
    resumed = retrain(train, SAMPLES, subsets=5, seeds=(0, 1), folder=tmp_path)
    assert len(calls) == 8 + 3
    np.testing.assert_array_equal(resumed.outcomes, retrain(ridge, SAMPLES, subsets=5, seeds=(0, 1)).outcomes)
    retrain(train, SAMPLES, subsets=5, seeds=(2,), folder=tmp_path)
    assert len(calls) == 11 + 5


def test_ranks_share_their_mean_and_correlations_are_pandas_own():
    pandas = pytest.importorskip("pandas")
    values = generator.integers(0, 5, size=(30, 4)).astype(float)
    np.testing.assert_array_equal(ranks(values), pandas.DataFrame(values).rank())
    others = generator.normal(size=(30, 4))
    ranked = pandas.DataFrame(values).rank().corrwith(pandas.DataFrame(others).rank())
    np.testing.assert_allclose(spearman(values, others), ranked)
    assert spearman(np.ones((5, 1)), values[:5, :1]).tolist() == [0]


def test_area_under_roc_counts_pairs():
    scores, positive = generator.integers(0, 6, size=40), generator.random(40) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    assert area_under_roc(scores, positive) == pytest.approx(np.mean(pairs))


def test_bootstrap_of_a_mean_is_two_standard_errors_on_either_side():
    values = generator.normal(size=400)
    ends = [bootstrap(lambda chosen: values[chosen].mean(), 400, seed=seed) for seed in range(20)]
    width = np.mean([high - low for low, high in ends])
    assert width == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.08)
    assert all(low < values.mean() < high for low, high in ends)


def test_random_subsets_have_one_size_and_differ():
    kept = random_subsets(40, 30, 0.25)
    assert (kept.sum(1) == 10).all()
    assert len(np.unique(kept, axis=0)) == 30


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: retrain(ridge, SAMPLES, subsets=np.ones((2, 39), bool)), r"expected bool \[subset, 40\]"),
        (lambda: retrain(ridge, SAMPLES, subsets=np.zeros((2, 40), bool)), "subset 0 keeps no sample"),
        (lambda: retrain(ridge, [1, 1, 2]), "each once"),
        (lambda: retrain(ridge, SAMPLES, fraction=0.0), "some and not all"),
        (lambda: retrain(lambda s, seed: [np.nan], SAMPLES), "on 20 samples under seed 0 diverged"),
        (lambda: retrain(lambda s, seed: 1.0, SAMPLES), r"as \[query\]"),
        (lambda: retrain(lambda s, seed: np.ones(1 + s[0] % 2), SAMPLES), "the same queries"),
        (lambda: datamodelling_score(np.ones((7, 39)), np.ones((9, 40)), np.ones((9, 7))), r"expected \[query, 40\]"),
        (lambda: datamodelling_score(np.ones((7, 40)), np.ones((9, 40)), np.ones((9, 6))), r"expected \[9, 7\]"),
        (lambda: datamodelling_score(np.ones((7, 40)), np.ones((4, 40)), np.ones((4, 7))), "too few"),
        (lambda: datamodelling_score(np.ones((7, 40)), np.ones((9, 40)), np.full((9, 7), np.nan)), "diverged"),
        (lambda: datamodelling_score(np.full((7, 40), np.inf), np.ones((9, 40)), np.ones((9, 7))), "finite"),
        (lambda: datamodelling_table(np.ones((6, 40)), RUNS), r"expected \[9, 6\]"),
        (lambda: removal_table(ridge, np.ones((6, 40)), SAMPLES), "measures 7 queries, the scores have 6"),
        (lambda: removal_table(ridge, np.ones((7, 40)), SAMPLES, shares=[0.001]), "is 0"),
        (lambda: group_table(ridge, np.ones((7, 40)), SAMPLES, groups=3), "3 groups are too few"),
        (lambda: mislabel_table({"a": np.ones(5)}, np.ones(5)), "5 of 5"),
        (lambda: mislabel_table({"a": np.ones(4)}, np.arange(5) > 3), r"expected \[query, 5\]"),
        (lambda: noise_table(ridge, SAMPLES, seeds=(1, 1)), "two different"),
    ],
)
def test_what_does_not_fit_is_refused(ask, message):
    with pytest.raises(DualHookError, match=message):
        ask()


RUNS = Retrainings(SAMPLES, np.ones((9, 40), dtype=bool), (0,), np.ones((1, 9, 7)))
