"""What is trained: the experiments, and the recorded training of one of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tasks import Task
from torch import Tensor, nn

import dualhook

WIDTH = 800
SPARE = 2 * 10**9  # bytes of the disk that a memory leaves free


@dataclass(frozen=True)
class Experiment:
    """Phases of steps, each on batches that are in equal parts of some of the tasks.

    ``queries`` test images of a task are asked about; ``groups`` of samples of each kind are left out in retrainings.
    """

    name: str
    title: str
    phases: tuple[tuple[tuple[int, ...], int], ...]
    rate: float = 3e-3
    optimizer: str = "SGD"
    batch: int = 128
    queries: int = 500
    groups: int = 2
    colours: bool = False

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(steps for _, steps in self.phases)

    @property
    def switch(self) -> int:
        """The last step of the first phase."""
        return self.phases[0][1]

    @property
    def is_continual(self) -> bool:
        """Whether tasks come one after the other."""
        return len(self.phases) > 1

    @property
    def tasks(self) -> tuple[int, ...]:
        """The tasks that it trains on."""
        return tuple(sorted({task for among, _ in self.phases for task in among}))

    def shorter(self, factor: int, queries: int) -> Experiment:
        """The same in so many times fewer steps; under SGD at up to 20 times the rate, so that it still learns."""
        phases = tuple((among, max(1, steps // factor)) for among, steps in self.phases)
        rate = self.rate * min(factor, 20) if self.optimizer == "SGD" else self.rate
        return replace(self, phases=phases, rate=rate, queries=min(queries, self.queries), groups=1)


EXPERIMENTS = (
    Experiment("single", "one task", (((0,), 5000),)),
    Experiment("multi", "two tasks mixed", (((0, 1), 5000),)),
    Experiment("continual", "two tasks, one after the other", (((0,), 3000), ((1,), 3000))),
    Experiment("continual-long", "two tasks, the second for longer", (((0,), 3000), ((1,), 7000))),
    Experiment("adam", "one task under Adam", (((0,), 5000),), rate=1e-3, optimizer="Adam", queries=50),
    Experiment("cifar10", "CIFAR-10", (((0,), 5000),), colours=True),
)


@dataclass(frozen=True)
class Trained:
    """A trained model with its memory; samples are rows of the tasks' images end to end, of classes ``class_of``."""

    model: nn.Module
    memory: dualhook.DualMemory
    images: Tensor
    classes: list[str]
    class_of: list[str]


def network(pixels: int, seed: int) -> nn.Sequential:
    """784-800-800-10 with ReLU, the layers named fc1 to fc3."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    for number, (inputs, outputs) in enumerate(((pixels, WIDTH), (WIDTH, WIDTH), (WIDTH, 10)), 1):
        model.add_module(f"fc{number}", nn.Linear(inputs, outputs))
        if number < 3:
            model.add_module(f"relu{number}", nn.ReLU())
    return model


def optimizer_of(experiment: Experiment, model: nn.Module) -> torch.optim.Optimizer:
    return getattr(torch.optim, experiment.optimizer)(model.parameters(), lr=experiment.rate)


def batches(experiment: Experiment, tasks: Sequence[Task], seed: int) -> Iterator[Tensor]:
    """The samples [b] of every step: each task in an order of chance, anew in every pass over it."""
    generator = torch.Generator().manual_seed(seed)
    firsts = torch.tensor([0, *[len(task.train_labels) for task in tasks]]).cumsum(0).tolist()

    def endless(task: int, size: int) -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(tasks[task].train_labels), generator=generator) + firsts[task]
            yield from order.split(size)[: len(order) // size]

    for among, steps in experiment.phases:
        each = [endless(task, experiment.batch // len(among)) for task in among]
        for _ in range(steps):
            yield torch.cat([next(own) for own in each])


def train(experiment: Experiment, tasks: Sequence[Task], seed: int, folder: Path) -> Trained:
    """Train and record; the memory is in ``folder``."""
    images = torch.cat([task.train_images for task in tasks])
    model = network(images.shape[1], seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(folder.parent).free - SPARE
    with dualhook.instrument(model, folder, overwrite=True, max_bytes=room, on_full="error", verbose=False) as recorder:
        fit(model, experiment, tasks, seed, before_step=lambda samples: recorder.batch(samples=samples))
        memory = recorder.close()
    class_of = [task.classes[label] for task in tasks for label in task.train_labels.tolist()]
    memory.add_column("class", class_of)
    memory.verbose = False
    return Trained(model.eval(), memory, images, [name for task in tasks for name in task.classes], class_of)


def retrain(experiment: Experiment, tasks: Sequence[Task], seed: int, left_out: Tensor) -> nn.Module:
    """The same training, unrecorded, with some samples' terms missing from every step's loss."""
    model = network(tasks[0].train_images.shape[1], seed)
    fit(model, experiment, tasks, seed, left_out=left_out)
    return model.eval()


def fit(
    model: nn.Module,
    experiment: Experiment,
    tasks: Sequence[Task],
    seed: int,
    *,
    left_out: Tensor | None = None,
    before_step: Callable[[Tensor], object] = lambda samples: None,
) -> None:
    """All steps, on the mean loss of a batch; of samples that are left out it is 0."""
    images = torch.cat([task.train_images for task in tasks])
    labels = torch.cat([task.train_labels for task in tasks])
    kept = torch.ones(len(labels), dtype=torch.bool)
    if left_out is not None:
        kept[left_out] = False
    optimizer = optimizer_of(experiment, model)
    for samples in batches(experiment, tasks, seed):
        before_step(samples)
        mine = samples[kept[samples]]
        optimizer.zero_grad()
        (F.cross_entropy(model(images[mine]), labels[mine], reduction="sum") / len(samples)).backward()
        optimizer.step()
