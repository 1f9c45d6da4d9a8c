"""The image experiments of the paper (Irie, Csordás, Schmidhuber 2022), and some beyond it.

    python examples/paper/images.py                          # small: minutes on two cores
    python examples/paper/images.py --full --seeds 3         # the paper's size: hours, up to 21 GB of disk at a time
    python examples/paper/images.py --data DIR               # torchvision's folder: Fashion-MNIST, MNIST, CIFAR-10
    python examples/paper/images.py --only single continual  # some of the experiments

A 784-800-800-10 network with ReLU learns one task, two mixed, and one after the other; what every test image then
attends to becomes tables (CSV and Markdown, mean ± deviation over seeds) and pictures in one folder. A seed that is
done is not run again. Memories lie in the same folder until their tables are written.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from beyond import KEYS as BEYOND_KEYS
from beyond import beyond
from figures import draw_run, predictive_power, save
from questions import looked_at, statistics
from runs import EXPERIMENTS, Experiment, train
from seeds import averaged, is_done, many, mark_done
from tables import read_csv, to_markdown, write_csv
from tasks import Task, clothes, colours, digits

TITLES = {
    "accuracy": "Test accuracy",
    "power": "Predictive power: how often the class (or output) with the largest total is the target, and the model's",
    "variance": "Normalised variance of the classes' totals of |key · query|",
    "shares": "Each task's share of the totals",
    "receipt": "Receipts",
    "rebuilt": "Relative error of the weights rebuilt from the memory",
    "forgetting": "Time travel: test accuracy at earlier steps, from the memory's own weights",
    "overwriting": "What overwrites the first task: contributions (fc3) to the winning logit less the true one, on its"
    " test images that were right at the switch and are wrong at the end",
    "bookkeeping": "The margin without some samples: values taken from the weights beside a real retraining",
}
KEYS = {
    "accuracy": ("task", "queries"),
    "power": ("task", "groups", "layer", "by", "predictions"),
    "variance": ("task", "layer", "predictions"),
    "shares": ("task", "layer", "patterns_of"),
    "receipt": ("task", "layer"),
    "rebuilt": ("layer",),
} | BEYOND_KEYS


def main() -> None:
    options = arguments()
    chosen = [experiment for experiment in EXPERIMENTS if not options.only or experiment.name in options.only]
    needed = max(len(experiment.tasks) for experiment in chosen)
    tasks = [load(options.data) for load in (clothes, digits)[:needed]]
    coloured = colours(options.data)
    for task in [*tasks, *([coloured] if coloured else [])]:
        print(f"{task.name}: {task.source}, {len(task.train_labels):,} to train on, {len(task.test_labels):,} to test")
    for experiment in chosen:
        if experiment.colours and coloured is None:
            print(f"{experiment.name}: left out, CIFAR-10 is not in {options.data}")
            continue
        if not options.full:
            experiment = experiment.shorter(options.shorter, options.queries)
        own = [coloured] if experiment.colours and coloured else [tasks[number] for number in experiment.tasks]
        for seed in range(options.seeds):
            run_seed(experiment, own, seed, options.out / experiment.name / f"seed-{seed}", keep=options.keep)
        summarise(experiment, options.out / experiment.name, options.seeds)
    write_tables(options.out)
    print(f"tables and pictures: {options.out}, the tables together in {options.out / 'TABLES.md'}")


def run_seed(experiment: Experiment, tasks: Sequence[Task], seed: int, folder: Path, *, keep: bool) -> None:
    """Train, ask, write, and of the first seed draw, unless this was done before.

    Raises:
        SystemExit: the folder is of a run with other settings.
    """
    settings = asdict(experiment) | {"sources": [task.source for task in tasks]}
    if is_done(folder, settings, f"{experiment.name}, seed {seed}"):
        return
    started = time.perf_counter()
    run = train(experiment, tasks, seed, folder / "memory")
    trained = time.perf_counter()
    gigabytes = run.memory.nbytes / 1e9
    tables = statistics(run, experiment, tasks) | beyond(run, experiment, tasks, seed)
    seen, images = looked_at(run, experiment, tasks)
    for name, rows in (tables | seen).items():
        write_csv(folder / f"{name}.csv", rows)
    if seed == 0:
        draw_run(folder, experiment, run, seen, images)
    del run
    if not keep:
        shutil.rmtree(folder / "memory")
    seconds = {"training": trained - started, "questions": time.perf_counter() - trained}
    mark_done(folder, settings, seconds=seconds, gigabytes=gigabytes)
    print(
        f"{experiment.name}, seed {seed}: {experiment.steps:,} steps, {gigabytes:.1f} GB, "
        f"{seconds['training']:.0f} s of training, {seconds['questions']:.0f} s of questions",
        flush=True,
    )


def summarise(experiment: Experiment, folder: Path, seeds: int) -> None:
    """Mean and deviation over the seeds, each table as CSV, all as Markdown; the predictive power as a picture."""
    text = f"## {experiment.name}: {experiment.title}\n\n" + (
        f"{experiment.steps:,} steps of {experiment.optimizer} at {experiment.rate:g}, batches of {experiment.batch}"
        + (f", the second task from step {experiment.switch + 1:,}" if experiment.is_continual else "")
        + f"; {many(seeds)}\n\n"
    )
    found, tables = averaged(folder, seeds, TITLES, KEYS)
    save(predictive_power(found["power"], experiment.title), folder / "power.png")
    (folder / "tables.md").write_text(text + tables, "utf-8")


def write_tables(out: Path) -> None:
    """The tables of all experiments that are there, in their order, and SGD beside Adam."""
    paths = [out / experiment.name / "tables.md" for experiment in EXPERIMENTS]
    text = "\n".join(path.read_text("utf-8") for path in paths if path.is_file())
    there = [name for name in ("single", "adam") if (out / name / "power.csv").is_file()]
    if len(there) == 2:
        text += "\n## SGD beside Adam\n\n"
        for table in ("accuracy", "power", "receipt"):
            rows = [{"experiment": name} | row for name in there for row in read_csv(out / name / f"{table}.csv")]
            text += to_markdown([row for row in rows if row.get("predictions", "all") == "all"], TITLES[table])
    (out / "TABLES.md").write_text(text, "utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [experiment.name for experiment in EXPERIMENTS]
    parser.add_argument("--full", action="store_true", help="the paper's number of steps, and 500 test images a task")
    parser.add_argument("--seeds", type=int, default=2, metavar="N")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="torchvision's folder (data)")
    parser.add_argument("--out", type=Path, default=Path("runs/paper-images"), metavar="DIR")
    parser.add_argument("--keep", action="store_true", help="keep the memories")
    parser.add_argument("--shorter", type=int, default=20, metavar="N", help="without --full: N times fewer steps (20)")
    parser.add_argument(
        "--queries", type=int, default=100, metavar="N", help="without --full: test images a task (100)"
    )
    options = parser.parse_args()
    for name in ("seeds", "shorter", "queries"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected at least 1")
    torch.manual_seed(0)
    return options


if __name__ == "__main__":
    main()
