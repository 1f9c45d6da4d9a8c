"""How far each way of explaining an optimiser goes: one network, every optimiser, exact against approximate.

A 784-256-256-10 network is trained on the Fashion-MNIST images of this package by every optimiser that has a rule, and
by some of other packages (where they are installed) that have none. Per layer, over the queries:

- explained: the mean share of the trained output that the patterns and named parts add up to
- cancellation: the median
- top 10: how many of the exact ten largest contributions a method names
- class: how often the class with the largest total contribution is the exact one
- seconds: the first question (top 10, with the receipt), training for comparison

``exact`` is the rule, ``preview`` a few snapshots of the optimiser's state in its place, ``fitted`` what is left if no
rule were known: the same run, recorded again under a name of its own.

    python benchmarks/optimisers.py [--steps 300] [--queries 32] [--only Adam Muon ...]
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.data import load_fashion_mnist_subset

BATCH = 50
RULED: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1},
    "SGD momentum": {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
    "ASGD": {"lr": 0.1},
    "Adam": {"lr": 1e-3},
    "Adam decay": {"lr": 1e-3, "weight_decay": 1e-3},
    "AdamW": {"lr": 1e-3, "weight_decay": 0.1},
    "Adam amsgrad": {"lr": 1e-3, "amsgrad": True},
    "NAdam": {"lr": 1e-3},
    "RAdam": {"lr": 1e-3},
    "Adamax": {"lr": 2e-3},
    "RMSprop": {"lr": 1e-3},
    "RMSprop momentum": {"lr": 3e-4, "momentum": 0.9, "centered": True},
    "Adagrad": {"lr": 1e-2},
    "Adadelta": {"lr": 1.0},
    "Adafactor": {"lr": 1e-2},
    "Rprop": {"lr": 1e-4},
    "Muon + AdamW": {"lr": 5e-3},
}
UNRULED: dict[str, tuple[str, dict[str, Any]]] = {
    "adabelief-pytorch": ("adabelief_pytorch.AdaBelief", {"lr": 1e-3, "print_change_log": False}),
    "prodigyopt": ("prodigyopt.Prodigy", {}),
    "torch-optimizer": ("torch_optimizer.Yogi", {"lr": 1e-2}),
    "pytorch-optimizer": ("pytorch_optimizer.Adan", {"lr": 1e-3}),
    "lion-pytorch": ("lion_pytorch.Lion", {"lr": 1e-4}),  # has a rule: it is here to be looked up by the same line
}


@dataclass
class Trained:
    """A recorded run."""

    model: nn.Module
    memory: dualhook.DualMemory
    seconds: float


@dataclass
class Answers:
    """What one method says, by layer."""

    explained: dict[str, float]
    cancellation: dict[str, float]
    top: dict[str, list[set[int]]]
    classes: dict[str, np.ndarray]
    seconds: float


def optimizers_of(
    name: str, settings: dict[str, Any], model: nn.Module, *, hidden: bool
) -> list[torch.optim.Optimizer]:
    """The optimisers of a run; hidden ones are classes of this script, of which no rule is known."""

    def made(make: type[torch.optim.Optimizer], parameters: Any, own: dict[str, Any]) -> torch.optim.Optimizer:
        return (type(f"Hidden{make.__name__}", (make,), {"step": _step}) if hidden else make)(parameters, **own)

    def _step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        return super(type(self), self).step(closure)

    if name == "Muon + AdamW":
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        return [made(torch.optim.Muon, matrices, settings), made(torch.optim.AdamW, vectors, {"lr": 1e-3})]
    return [made(getattr(torch.optim, name.split()[0]), model.parameters(), settings)]


def train(make: Callable[[nn.Module], list[torch.optim.Optimizer]], steps: int, folder: Path) -> Trained:
    """One recorded run, the same for every way of recording."""
    data = load_fashion_mnist_subset()
    torch.manual_seed(0)
    sizes = (784, 256, 256, 10)
    layers = [nn.Linear(i, o) for i, o in pairwise(sizes)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizers = make(model)
    order = torch.Generator().manual_seed(1)
    started = time.perf_counter()
    with dualhook.instrument(model, folder, verbose=False) as recorder:
        for _ in range(steps):
            chosen = torch.randint(0, len(data.train_labels), (BATCH,), generator=order)
            recorder.batch(chosen)

            def loss(chosen: torch.Tensor = chosen) -> torch.Tensor:
                model.zero_grad()
                found = F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen])
                found.backward(create_graph=False)
                return found

            loss()
            for optimizer in optimizers:
                optimizer.step()
    memory = recorder.close()
    memory.add_column("class", data.train_labels)
    return Trained(model, memory, time.perf_counter() - started)


def ask(run: Trained, queries: torch.Tensor, method: str = "exact") -> Answers:
    """Put the questions to one memory."""
    started = time.perf_counter()
    attention = run.memory.attend(run.model, queries, method=method)
    top = attention.top(10)
    seconds = time.perf_counter() - started
    receipt, totals = attention.receipt, attention.sum_by("class")
    count = len(queries)

    def of(layer: str) -> tuple[float, float, list[set[int]], np.ndarray]:
        own, sums, best = receipt.where(layer=layer), totals.where(layer=layer), top.where(layer=layer)
        lists = [set(best.where(query=q)["pattern"].tolist()) for q in range(count)]
        largest = sums["contribution"].reshape(count, -1).argmax(1)
        return float(own["explained"].mean()), statistics.median(own["cancellation"].tolist()), lists, largest

    found = {layer: of(layer) for layer in attention.layers}
    explained, cancellation, lists, classes = ({name: own[k] for name, own in found.items()} for k in range(4))
    return Answers(explained, cancellation, lists, classes, seconds)


def lines(name: str, method: str, training: float, answers: Answers, exact: Answers | None) -> Iterator[str]:
    """The rows of the table for one method."""
    for k, layer in enumerate(answers.explained):
        compared = "      –       –"
        if exact is not None:
            pairs = zip(answers.top[layer], exact.top[layer], strict=True)
            overlap = sum(len(one & other) for one, other in pairs) / (10 * len(exact.top[layer]))
            agreement = float((answers.classes[layer] == exact.classes[layer]).mean())
            compared = f"{overlap:7.2f} {agreement:7.2f}"
        times = f"{training:8.1f} {answers.seconds:8.2f}" if k == 0 else ""
        label = f"{name:<26} {method:<8}" if k == 0 else " " * 35
        explained, cancelled = answers.explained[layer], answers.cancellation[layer]
        yield f"{label} {layer:>5} {explained:10.6f} {cancelled:12.1f} {compared} {times}".rstrip()


def compare(name: str, settings: dict[str, Any], steps: int, queries: torch.Tensor, folder: Path) -> Iterator[str]:
    """An optimiser with a rule: exact, previewed, fitted."""
    run = train(lambda model: optimizers_of(name, settings, model, hidden=False), steps, folder / "exact")
    exact = ask(run, queries)
    yield from lines(name, "exact", run.seconds, exact, None)
    try:
        yield from lines("", "preview", run.seconds, ask(run, queries, "preview"), exact)
    except dualhook.DualHookError:
        yield f"{'':<26} preview      none: its factor is made of more than its state"
    hidden = train(lambda model: optimizers_of(name, settings, model, hidden=True), steps, folder / "fitted")
    same = all(torch.equal(a, b) for a, b in zip(run.model.parameters(), hidden.model.parameters(), strict=True))
    assert same, f"{name}: the two runs differ"
    yield from lines("", "fitted", hidden.seconds, ask(hidden, queries), exact)


def third_party(package: str, steps: int, queries: torch.Tensor, folder: Path) -> Iterator[str]:
    """An optimiser of another package."""
    path, settings = UNRULED[package]
    module, _, attribute = path.rpartition(".")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except ImportError:
        yield f"{attribute} ({package}): not installed"
        return
    run = train(lambda model: [make(model.parameters(), **settings)], steps, folder / "other")
    method = "exact" if run.memory.info()["exact"].all() else "fitted"
    yield from lines(f"{attribute} ({package})"[:26], method, run.seconds, ask(run, queries), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--only", nargs="+", help="names of the table's first column")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", dualhook.InexactWarning)
    queries = load_fashion_mnist_subset().test_images[: options.queries]
    chosen = options.only or [*RULED, *UNRULED]
    print(f"{'optimiser':<26} {'method':<8} layer  explained cancellation  top 10   class training  seconds")
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            found = (
                compare(name, RULED[name], options.steps, queries, Path(folder))
                if name in RULED
                else third_party(name, options.steps, queries, Path(folder))
            )
            for line in found:
                print(line, flush=True)


if __name__ == "__main__":
    main()
