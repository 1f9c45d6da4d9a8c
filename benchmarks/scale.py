"""How time and memory go with the number of patterns N: opening, asking, resident memory, and the fitted slopes.

A linear classifier of pooled Fashion-MNIST images (49 to 10) is trained and recorded until it has N patterns, for
several N, in at most 1,000 steps. A process of its own then opens each memory and asks. ``then`` questions know the
receipt already. Memory is what the process holds more than before it opened the memory: at its peak, the mapped pages
of the segments under way included, and its own (anonymous) pages after the questions. A slope is the exponent b of time
or memory ~ N^b, by least squares of the logarithms: 1 is linear, 0 is flat.

    python benchmarks/scale.py [--patterns 10000 100000 1000000] [--queries 32] [--rounds 3] [--threads 1]
    python benchmarks/scale.py --patterns 10000000 --segments 10000 --rounds 1

10,000,000 patterns take about 2.7 GB on disk. ``--segments`` writes as many files, of images that are pooled to four
numbers; beside each memory it then shows the same one compacted, and beside opening a bare loop that reads the headers
of all files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from recorded import record
from torch import nn

import dualhook
from dualhook.data import load_fashion_mnist_subset

BATCH, STEPS = 1000, 1000  # patterns of a step at least, steps at most
COLUMNS = (
    "headers",
    "open",
    "the first top(10)",
    "then top(10)",
    "then sum_by('label')",
    "peak MB",
    "own MB",
    "opened MB",
)


def network(side: int) -> nn.Sequential:
    """Images [b, 784] pooled to side × side, and one linear layer."""
    return nn.Sequential(nn.Unflatten(1, (1, 28, 28)), nn.AvgPool2d(28 // side), nn.Flatten(), nn.Linear(side**2, 10))


def headers(path: Path) -> None:
    """What opening cannot do without: the headers of all segments, parsed."""
    for folder in path.glob("segments*"):
        for name in os.listdir(folder):
            with open(folder / name, "rb") as file:
                json.loads(file.read(int.from_bytes(file.read(8), "little")))


def resident(name: str) -> float:
    """A figure of this process's memory in MB, by its name in Linux's /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(f"{name}:"))


def timed(do: Callable[[], object]) -> float:
    started = time.perf_counter()
    do()
    return time.perf_counter() - started


def asked(path: Path, side: int, queries: int, rounds: int) -> dict[str, float]:
    """The figures of one memory, in this process."""
    model, images = network(side), load_fashion_mnist_subset().test_images[:queries]
    model.load_state_dict(torch.load(path.with_suffix(".pt")))
    model(images)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    peak, own = resident("VmHWM"), resident("RssAnon")
    taken: dict[str, list[float]] = {name: [] for name in COLUMNS[:5]}
    memory = dualhook.load(path)
    opened = resident("RssAnon") - own
    for _ in range(rounds):
        taken["headers"].append(timed(lambda: headers(path)))
        taken["open"].append(timed(lambda: dualhook.load(path)))
        memory = dualhook.load(path)
        attention = memory.attend(model, images)
        taken["the first top(10)"].append(timed(lambda a=attention: a.top(10)))  # type: ignore[misc]
        taken["then top(10)"].append(timed(lambda a=attention: a.top(10)))  # type: ignore[misc]
        taken["then sum_by('label')"].append(timed(lambda a=attention: a.sum_by("label")))  # type: ignore[misc]
    found = {name: statistics.median(own) for name, own in taken.items()}
    return found | {"peak MB": resident("VmHWM") - peak, "own MB": resident("RssAnon") - own, "opened MB": opened}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--segments", type=int, help="files to write; default as many as recording makes")
    parser.add_argument("--side", type=int, default=7, help=argparse.SUPPRESS)
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.ask:
        print(json.dumps(asked(arguments.ask, arguments.side, arguments.queries, arguments.rounds)))
        return
    side = 2 if arguments.segments else arguments.side
    folder = Path(tempfile.mkdtemp(prefix="dualhook-scale-"))
    print(f"{side**2} to 10, {arguments.queries} queries, threads {arguments.threads}; milliseconds, and MB of memory")
    print(f"{'N':>12}" + "".join(f"{name:>22}" for name in COLUMNS))
    rows = []
    try:
        for patterns in arguments.patterns:
            path, model = folder / str(patterns), network(side)
            per_step = max(BATCH, patterns // STEPS)
            batch = per_step if arguments.segments is None else patterns // arguments.segments
            record(model, path, patterns, layers=["3"], batch=batch, flush=arguments.segments is not None)
            torch.save(model.state_dict(), path.with_suffix(".pt"))
            command = [sys.executable, __file__, "--ask", str(path), "--side", str(side)]
            for name in ("queries", "rounds", "threads"):
                command += [f"--{name}", str(getattr(arguments, name))]
            for is_compacted in [False, True][: 1 if arguments.segments is None else 2]:
                if is_compacted:
                    taken = timed(lambda p=path: dualhook.compact(p))  # type: ignore[misc]
                    print(f"compacted in {taken:.1f} s:")
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(done.stdout)
                figures = [found[name] * (1 if name.endswith("MB") else 1e3) for name in COLUMNS]
                print(f"{patterns:>12,}" + "".join(f"{value:>22.1f}" for value in figures), flush=True)
                rows += [] if is_compacted else [figures]
            shutil.rmtree(path)
    finally:
        shutil.rmtree(folder)
    if len(rows) > 1:
        logarithms = np.log(np.maximum(rows, 1e-3))
        slopes = np.polyfit(np.log(arguments.patterns), logarithms, 1)[0]
        last = (logarithms[-1] - logarithms[-2]) / np.log(arguments.patterns[-1] / arguments.patterns[-2])
        for title, values in (("slope", slopes), ("of the last two", last)):
            print(f"{title:>15}" + "".join(f"{value:>22.2f}" for value in values)[3:])


if __name__ == "__main__":
    main()
