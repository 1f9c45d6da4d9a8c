"""``dualhook demo``: train the paper's network on the shipped images, and show what two predictions attend to."""

from __future__ import annotations

import json
import shutil
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from dualhook.data import FashionMnist, load_fashion_mnist_subset
from dualhook.errors import DualHookError, StoreError
from dualhook.memory import DualMemory
from dualhook.recorder import Recorder, instrument
from dualhook.table import Table

__all__ = ["TOLERANCE", "DemoSummary", "network", "run_demo"]

TOLERANCE = 1e-5  # largest relative error of a rebuilt weight that float32 rounding can explain
MARKER = "dualhook-demo.json"  # what makes a folder an earlier demo, which may be replaced
RATE, MOMENTUM = 0.02, 0.9


def network(width: int = 800) -> nn.Sequential:
    """The image classifier of Irie et al. 2022: 784-800-800-10 with ReLU; takes images [b, 784]."""
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(784, width), relu1=nn.ReLU(),
            fc2=nn.Linear(width, width), relu2=nn.ReLU(),
            fc3=nn.Linear(width, 10),
        )
    )  # fmt: skip


@dataclass(frozen=True)
class DemoSummary:
    """What came out; ``str()`` of it is the closing message."""

    out: Path
    accuracy: float
    steps: int
    patterns: int
    bytes: int
    max_error: float
    receipt: Table
    questions: tuple[str, ...]

    @property
    def adds_up(self) -> bool:
        """Whether the weights rebuilt from the memory are the trained ones (False for NaN too)."""
        return self.max_error < TOLERANCE

    def __str__(self) -> str:
        memory, queries, program = self.out / "memory", self.out / "queries.npy", _program()
        explained, cancellation = self.receipt["explained"], self.receipt["cancellation"]
        lines = [
            f"test accuracy      {self.accuracy:.1%}",
            f"recorded           {self.patterns:,} patterns in {self.steps:,} steps, {self.bytes / 1e9:.2f} GB on disk",
            f"identity error     {self.max_error:.1e}, "
            + (
                "the memory adds up to the weights"
                if self.adds_up
                else f"NOT below {TOLERANCE:.0e}: please report this"
            ),
            *(
                f"test image {number + 1}       {question}: explained at least {explained[own].min():.6f}, "
                f"cancellation {cancellation[own].min():.3g} to {cancellation[own].max():.3g}"
                for number, question in enumerate(self.questions)
                for own in [self.receipt["query"] == number]
            ),
            "",
            f"picture            {self.out / 'attention.png'}",
            f"report             {self.out / 'report.html'}",
            f"memory             {memory}",
            "",
            "Try next:",
            f"  {program} info {memory}",
            f"  {program} verify {memory}",
            f"  {program} attend {memory} --model dualhook.demo:network --inputs {queries} --top 3 --sum-by class",
        ]
        return "\n".join(lines)


def run_demo(
    out: Path, *, epochs: int = 15, batch_size: int = 128, seed: int = 0, train_images: int | None = None
) -> DemoSummary:
    """Train, record, verify, ask, draw; ``out`` then holds memory, picture, report and the two images asked about.

    Args:
        out: a new or empty folder, or one of an earlier demo, which is replaced.
        epochs: passes over the training images.
        batch_size: images per step.
        seed: of the weights and of the order of the images.
        train_images: take only the first ones, for a shorter run.

    Raises:
        StoreError: ``out`` holds something else.
        DualHookError: matplotlib is missing, or a number below 1.
    """
    for name, number in (("epochs", epochs), ("batch_size", batch_size), ("train_images", train_images)):
        if number is not None and number < 1:
            raise DualHookError(f"{name}={number}: expected at least 1")
    _require_matplotlib()  # before the work, not after it
    _claim(out, epochs=epochs, batch_size=batch_size, seed=seed, train_images=train_images)
    data = load_fashion_mnist_subset()
    dataset = TensorDataset(data.train_images[:train_images], data.train_labels[:train_images])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
    # without the rest of an epoch: each image of a batch of 8 would weigh 16 times as much as one of 128
    loader = DataLoader(
        dataset,
        min(batch_size, len(dataset)),
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )
    with instrument(model, out / "memory", overwrite=True, verbose=False) as recorder:
        size = int(recorder.estimate(data.train_images[:1])["bytes"].sum()) * len(dataset) * epochs
        print(f"Training 784-800-800-10 on {len(dataset):,} images of clothes, {epochs} epochs of SGD with momentum")
        print(f"Recording every pattern to {out / 'memory'} (about {size / 1e9:.2g} GB)\n", flush=True)
        _train(model, loader, recorder, epochs)
    return _ask(out, recorder.close(), model, data)


def _train(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], recorder: Recorder, epochs: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    total = epochs * len(loader) * (loader.batch_size or 1)
    with tqdm(total=total, desc="training", unit=" images", unit_scale=True, disable=None) as bar:
        for _ in range(epochs):
            for images, labels in recorder.track(loader):
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                bar.update(len(images))
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def _ask(out: Path, memory: DualMemory, model: nn.Module, data: FashionMnist) -> DemoSummary:
    """Everything after training: the proof, the question about two test images, the picture."""
    from dualhook.report.images import LabelledImages, draw_attended_images

    memory.add_column("label", data.train_labels)
    memory.add_column("class", [data.classes[label] for label in data.train_labels.tolist()])
    max_error = memory.verify().max_error
    with torch.no_grad():
        predicted = model(data.test_images).argmax(1)
    correct = predicted == data.test_labels
    chosen = [int(rows[0]) for rows in (correct.nonzero(), (~correct).nonzero()) if len(rows)]
    images, labels = data.test_images[chosen], data.test_labels[chosen]
    np.save(out / "queries.npy", images.numpy())
    attention = memory.attend(model, images)
    figure = draw_attended_images(
        attention,
        LabelledImages(images, labels, data.classes),
        predicted[chosen].tolist(),
        LabelledImages(data.train_images, data.train_labels, data.classes),
    )
    figure.savefig(out / "attention.png")
    memory.report(model, images, out / "report.html", images=data.train_images, labels=labels, classes=data.classes)
    questions = tuple(
        f"{data.classes[truth]}, predicted {data.classes[given]}"
        for truth, given in zip(labels.tolist(), predicted[chosen].tolist(), strict=True)
    )
    patterns = sum(memory.patterns(layer) for layer in memory.layers)
    size = sum(path.stat().st_size for path in memory.path.rglob("*") if path.is_file())
    return DemoSummary(
        out, float(correct.float().mean()), memory.steps, patterns, size, max_error, attention.receipt, questions
    )


def _program() -> str:
    """How to call the command line again: as it was called, where the shell does not find it by its name."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "dualhook" and shutil.which("dualhook") is None else "dualhook"


def _require_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise DualHookError(f'the demo draws a picture and {error}: pip install "dualhook[demo]"') from error


def _claim(out: Path, **settings: int | None) -> None:
    """Make ``out`` a demo's folder, if it is nobody else's."""
    marker = out / MARKER
    if out.exists() and not marker.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out} holds something else than an earlier demo: choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps(settings) + "\n", encoding="utf-8")
