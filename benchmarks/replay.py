"""What questions cost under optimisers that are replayed: seconds, and how many bare trainings they take.

The network of the paper (784-800-800-10, batch 128) on 5,000 Fashion-MNIST images, trained bare and recorded in turns.
A machine changes its speed: every question is compared with bare steps that are run just before and after it, by the
clock and by processor time (all threads together; on a busy machine the steadier of the two, with --threads 1).

    python benchmarks/replay.py [--optimizer Adam] [--steps 390] [--threads N] [--queries 1 32] [--out DIR]
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dualhook
from dualhook.data import load_fashion_mnist_subset
from dualhook.demo import network

BLOCK = 10  # steps of one model before the other's turn
PROBE = 30  # bare steps around a question

OPTIMIZERS: dict[str, Callable[[nn.Module], list[torch.optim.Optimizer]]] = {
    "SGD": lambda model: [torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)],
    "Adam": lambda model: [torch.optim.Adam(model.parameters())],
    "AdamW": lambda model: [torch.optim.AdamW(model.parameters(), weight_decay=0.1)],
    "RMSprop": lambda model: [torch.optim.RMSprop(model.parameters(), lr=3e-4, momentum=0.9)],
    "Muon": lambda model: [
        torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2),
        torch.optim.AdamW([p for p in model.parameters() if p.ndim == 1]),
    ],
}


def clocks() -> np.ndarray:
    """Seconds by the clock and of processor time."""
    return np.array([time.perf_counter(), time.process_time()])


class Training:
    """A model in training; :meth:`run` takes some steps and returns what they cost."""

    def __init__(self, optimizer: str) -> None:
        torch.manual_seed(0)
        self.model = network()
        self.optimizers = OPTIMIZERS[optimizer](self.model)

    def run(self, batches: list[tuple[Tensor, Tensor]]) -> np.ndarray:
        started = clocks()
        for images, labels in batches:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            F.cross_entropy(self.model(images), labels).backward()
            for optimizer in self.optimizers:
                optimizer.step()
        return clocks() - started


class Bench:
    """Both trainings, and the table of what was measured."""

    def __init__(self, folder: Path, optimizer: str, steps: int) -> None:
        self.data = load_fashion_mnist_subset()
        self.steps = steps
        self.bare, self.probe = Training(optimizer), Training(optimizer)
        recorded = Training(optimizer)
        self.recorder = dualhook.instrument(recorded.model, folder / "memory", verbose=False)
        self.model = recorded.model
        self._batches = self._forever()
        spent = {"bare": np.zeros(2), "recorded": np.zeros(2)}
        self.probe.run(self._next(PROBE))  # warm
        for start in range(0, steps, BLOCK):
            batches = self._next(min(BLOCK, steps - start))
            spent["bare"] += self.bare.run(batches)
            spent["recorded"] += recorded.run(batches)
        started = clocks()
        self.memory = self.recorder.close()
        spent["recorded"] += clocks() - started
        self.memory.add_column("label", self.data.train_labels)
        self._row("training, bare", spent["bare"], spent["bare"])
        self._row("training, recorded", spent["recorded"], spent["bare"])

    def ask(self, what: str, question: Callable[[], Any]) -> Any:
        """Time a question between two runs of bare steps."""
        batches = self._next(PROBE)
        before = self.probe.run(batches)
        started = clocks()
        answer = question()
        spent = clocks() - started
        self._row(what, spent, (before + self.probe.run(batches)) / 2 * self.steps / PROBE)
        return answer

    def _row(self, what: str, spent: np.ndarray, bare: np.ndarray) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # mapped files count
        wall, processor = spent / bare
        print(f"{what:<44}{spent[0]:>9.2f} s{wall:>8.2f}{processor:>10.2f}{peak:>10,.0f} MB", flush=True)

    def _forever(self) -> Iterator[tuple[Tensor, Tensor]]:
        torch.manual_seed(1)
        dataset = TensorDataset(self.data.train_images, self.data.train_labels)
        while True:
            yield from DataLoader(dataset, 128, shuffle=True, drop_last=True)

    def _next(self, count: int) -> list[tuple[Tensor, Tensor]]:
        return [next(self._batches) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="Adam")
    parser.add_argument("--steps", type=int, default=390)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--out", type=Path, help="keep the memory here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="dualhook-replay-"))
    try:
        print(f"784-800-800-10, batch 128, {arguments.optimizer}, {arguments.steps} steps, {arguments.threads} threads")
        print(f"{'':<44}{'seconds':>11}{'ratio':>8}{'cpu ratio':>10}{'peak memory':>13}")
        bench = Bench(folder, arguments.optimizer, arguments.steps)
        report = bench.ask("verify()", bench.memory.verify)
        worst = 1.0
        for count in arguments.queries:
            images, queries = bench.data.test_images[:count], "query" if count == 1 else "queries"
            attention = bench.memory.attend(bench.model, images)
            bench.ask(f"top(10) and receipt, {count} {queries}", lambda a=attention: a.top(10))
            bench.ask("  then sum_by('label')", lambda a=attention: a.sum_by("label"))
            worst = min(worst, float(attention.receipt["explained"].min()))
            attention = dualhook.load(bench.memory.path).attend(bench.model, images, cache=True)
            bench.ask("  of a memory just opened, with cache=True", lambda a=attention: a.top(10))
            attention = dualhook.load(bench.memory.path).attend(bench.model, images, cache=True)
            bench.ask("  the same question again, with cache=True", lambda a=attention: a.top(10))
            if arguments.optimizer != "Muon":  # whose steps are made of more than its state
                attention = dualhook.load(bench.memory.path).attend(bench.model, images, method="preview")
                bench.ask("  method='preview'", lambda a=attention: a.top(10))
        print(f"largest error of verify() {report.max_error:.2g}, explained at least {worst:.7f}")
    finally:
        if arguments.out is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
