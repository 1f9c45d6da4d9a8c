"""Which scores of influence does retraining bear out: dualhook's, those of published packages, or neighbours'?

Every setting is trained and recorded under several seeds, and every method scores all training samples for all queries.
Judge is training itself on random halves of the samples: the linear datamodelling score is the rank correlation, over
the halves, of the sum of a query's scores with what was measured of it, once when the run scored is trained again on
the halves (same order, the others left out of the loss) and once against the mean of the other seeds' trainings.

The packages want an environment of their own; without them their rows are left out:

    python3 -m venv .venv-influence && .venv-influence/bin/pip install . transformers dattri kronfluence
    .venv-influence/bin/python benchmarks/influence.py [mlp-sgd mlp-adamw] [--seeds 3] [--subsets 50] [--full]

Scores and retrainings are kept in --folder, so that a table can be printed again, or a run that was stopped go on.
``--full`` takes all settings and removals too. Minutes a setting on two cores; hours with ``--full``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from influence_methods import METHODS, OF_IMAGES, Run
from influence_settings import SETTINGS, Setting

from dualhook.evaluate import Retrainings, datamodelling_score, noise_table, removal_table, retrain
from dualhook.evaluate.statistics import bootstrap, spearman
from dualhook.table import Table

REMOVAL_QUERIES = 12
REMOVED = ("penultimate, sign by label", "TracIn (dattri)", "EK-FAC (kronfluence)", "contribution", "cosine", "decayed")


def scored(setting: Setting, seed: int, methods: list[str], folder: Path) -> dict[str, np.ndarray]:
    """The scores [query, sample] of every method that can be had, by name."""
    run, found = Run(setting, seed), {}
    has_labels = setting.data().targets.dim() == 1
    for name in (name for name in methods if has_labels or name not in OF_IMAGES):
        path = folder / f"scores-{seed}" / f"{name}.npy"
        if not path.exists():
            try:
                scores = METHODS[name](run)
            except ModuleNotFoundError as missing:
                print(f"left out: {name} needs {missing.name}")
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, np.asarray(scores, dtype=np.float32))
        found[name] = np.load(path).astype(np.float64)
    return found


def judged(scores: list[np.ndarray], runs: Retrainings) -> tuple[float, ...]:
    """The datamodelling score against the same run and against the others', each with its interval over subsets.

    And the lowest and highest seed's score against the others'.
    """
    others = [np.delete(runs.outcomes, number, axis=0).mean(0) for number in range(len(scores))]
    both: list[float] = []
    for truths in (runs.outcomes, others):
        each = [datamodelling_score(own, runs.kept, truth).mean() for own, truth in zip(scores, truths, strict=True)]
        predicted = [runs.kept @ own.T for own in scores]
        interval = bootstrap(
            lambda chosen, predicted=predicted, truths=truths: float(
                np.mean([spearman(p[chosen], t[chosen]) for p, t in zip(predicted, truths, strict=True)])
            ),
            len(runs.kept),
        )
        both += [float(np.mean(each)), *interval]
    return (*both, float(np.min(each)), float(np.max(each)))


def datamodelling(name: str, seeds: int, subsets: int, methods: list[str], folder: Path) -> Table:
    """One row a method: the mean of the seeds' datamodelling scores."""
    setting = SETTINGS[name]
    by_seed = [scored(setting, seed, methods, folder) for seed in range(seeds)]
    runs = retrain(setting.train, setting.samples, subsets=subsets, seeds=range(seeds), folder=folder / "retrainings")
    rows = [(method, *judged([found[method] for found in by_seed], runs)) for method in by_seed[0]]
    columns = ["method", "same run", "low", "high", "other seeds", "low ", "high ", "lowest seed", "highest seed"]
    ceiling = np.mean(
        [spearman(np.delete(runs.outcomes, own, 0).mean(0), runs.outcomes[own]).mean() for own in range(seeds)]
    )
    return Table(
        dict(zip(columns, zip(*rows, strict=True), strict=True)),
        title=f"{name}: linear datamodelling score, {subsets} subsets, {seeds} seeds, {runs.outcomes.shape[2]} queries",
        footer=f"low, high: 95 %, bootstrap over subsets; other seeds' outcomes score {ceiling:.3f} on the same run",
    )


def removals(name: str, methods: list[str], folder: Path) -> Table:
    """One row a method: what leaving out each query's highest 5 % costs the first queries in the mean, first seed."""
    setting, rows = SETTINGS[name], []
    order, word = (("drop", "low", "high"), "lost") if setting.of == "margin" else (("drop", "high", "low"), "gained")
    found = scored(setting, 0, methods, folder)

    def train(samples: np.ndarray, seed: int) -> np.ndarray:
        return setting.train(samples, seed)[:REMOVAL_QUERIES]

    for method, scores in found.items():
        signed = -scores if setting.of == "loss" else scores
        table = removal_table(
            train,
            signed[:REMOVAL_QUERIES],
            setting.samples,
            shares=(0.05,),
            folder=folder / f"removals-{REMOVAL_QUERIES}",
        )
        sign = 1.0 if word == "lost" else -1.0
        rows.append((method, *(sign * float(table[column][0]) for column in (*order, "random"))))
    return Table(
        dict(zip(["method", word, "low", "high", "random"], zip(*rows, strict=True), strict=True)),
        title=f"{name}: {setting.of} {word} with each query's highest 5 %, {REMOVAL_QUERIES} queries, seed 0",
        footer="low, high: 95 %, bootstrap over queries; random: after leaving out as many at random",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--full", action="store_true", help="all settings, and removals")
    parser.add_argument("--removals", action="store_true", help="retrain without each query's highest samples too")
    parser.add_argument("--folder", type=Path, default=Path("runs/influence"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.settings or (list(SETTINGS) if arguments.full else ["mlp-sgd", "mlp-adamw"]):
        folder = arguments.folder / name
        print(datamodelling(name, arguments.seeds, arguments.subsets, arguments.methods, folder), flush=True)
        setting = SETTINGS[name]
        print(noise_table(setting.train, setting.samples, folder=folder / "retrainings"), flush=True)
        if arguments.full or arguments.removals:
            print(removals(name, [method for method in REMOVED if method in arguments.methods], folder), flush=True)


if __name__ == "__main__":
    main()
