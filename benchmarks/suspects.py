"""Which column of ``memory.suspects()`` finds flipped labels, and how large are contributions against real removals?

A tenth of the training labels of every setting is flipped, a network trained and recorded under each seed, and every
column judged by the area under its ROC curve. Then groups of samples are left out of the unflipped training, and what
the exact contributions and the decayed influence would have said of it is set beside what it came to: the size of the
one over the other, and how often their signs agree.

    python benchmarks/suspects.py [mlp-sgd mlp-adamw] [--seeds 3] [--groups 20]

Retrainings are kept in --folder. A setting took 24 minutes on one core of a busy machine.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from influence_methods import METHODS, Run
from influence_settings import SETTINGS, Data, Setting
from torch import nn

import dualhook
from dualhook.evaluate import group_table, mislabel_table
from dualhook.table import Table

FLIPPED = 0.1  # of the labels
SHARES = (0.01, 0.05, 0.1)  # of the samples, left out as a group
COLUMNS = ("loss", "last_loss", "self_influence", "disagreement")


def flipped(setting: Setting, seed: int) -> tuple[Setting, np.ndarray]:
    """The setting with a tenth of its labels moved to another class, and which ones [sample]."""
    data, generator = setting.data(), np.random.default_rng(seed)
    count, classes = len(data.targets), int(data.targets.max()) + 1
    wrong = np.zeros(count, dtype=bool)
    wrong[generator.choice(count, round(FLIPPED * count), replace=False)] = True
    moved = torch.from_numpy(generator.integers(1, classes, count) * wrong)
    changed = Data(data.inputs, (data.targets + moved) % classes, data.queries, data.query_targets)
    return replace(setting, data=lambda: changed), wrong


def recorded(setting: Setting, seed: int) -> dualhook.DualMemory:
    """The memory of one training."""
    recorders: list[dualhook.Recorder] = []

    def step(model: nn.Module, number: int, samples: np.ndarray) -> Any:
        return recorders[0].batch(samples=torch.from_numpy(samples))

    setting.trained(seed, start=lambda model: recorders.append(dualhook.instrument(model, verbose=False)), step=step)
    return recorders[0].close()


def found(name: str, seeds: int) -> Table:
    """One row a seed and column: how well it finds the flipped labels."""
    rows = []
    for seed in range(seeds):
        setting, wrong = flipped(SETTINGS[name], seed)
        table = recorded(setting, seed).suspects(len(wrong))
        areas = mislabel_table({column: table[column] for column in COLUMNS}, wrong[table["sample"]])
        rows += [{"seed": seed, **row} for row in areas]
    return Table(
        {column: [row[column] for row in rows] for column in rows[0]},
        title=f"{name}: finding flipped labels ({FLIPPED:.0%} of {len(wrong):,})",
        footer=areas.footer,
    )


def removed(name: str, seeds: int, groups: int, folder: Path) -> Table:
    """One row a method, share and seed: what it says of random groups against what leaving them out came to."""
    setting, rows = SETTINGS[name], []
    for seed in range(seeds):
        run = Run(setting, seed)
        for method in ("contribution", "decayed"):
            scores = METHODS[method](run)
            for share in SHARES:
                one = group_table(
                    setting.train, scores, setting.samples, share=share, groups=groups, seeds=(seed,), folder=folder
                )
                rows += [{"method": method, "share": share, **row} for row in one]
    rows.sort(key=lambda row: (row["method"], row["share"]))
    return Table(
        {column: [row[column] for row in rows] for column in rows[0] if column != "noise"},
        title=f"{name}: influence of {groups} random groups against leaving them out",
        footer=f"{one.footer}; sign: share that is right; size: predicted over real",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=["mlp-sgd", "mlp-adamw"], help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--groups", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("runs/influence"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.settings:
        print(found(name, arguments.seeds), flush=True)
        print(removed(name, arguments.seeds, arguments.groups, arguments.folder / name / "retrainings"), flush=True)


if __name__ == "__main__":
    main()
