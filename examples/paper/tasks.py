"""The data sets of the image experiments, each a task: torchvision's where a folder has them, else what is at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualhook.data import CLASSES, load_fashion_mnist_subset

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Task:
    """Images [n, pixel] from 0 to 1 with the numbers of their classes; ``source`` says where they are from."""

    name: str
    source: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]


def clothes(folder: Path) -> Task:
    """Fashion-MNIST, or the subset that ships with dualhook."""
    found = from_torchvision("FashionMNIST", folder, "clothes", CLASSES)
    if found is not None:
        return found
    data = load_fashion_mnist_subset()
    return Task(
        "clothes", "Fashion-MNIST, the shipped subset", data.train_images, data.train_labels,
        *in_order_of_chance(data.test_images, data.test_labels), CLASSES,
    )  # fmt: skip


def digits(folder: Path) -> Task:
    """MNIST, or scikit-learn's digits brought from 8 x 8 to 20 x 20 pixels in a frame of 28 x 28, as MNIST's are.

    Raises:
        SystemExit: neither is there.
    """
    found = from_torchvision("MNIST", folder, "digits", DIGITS)
    if found is not None:
        return found
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit(
            f"no MNIST in {folder} (--data DIR is torchvision's folder), and {error}: scikit-learn's digits would do, "
            'pip install "dualhook[paper]"'
        ) from error
    data = load_digits()
    small = torch.from_numpy(data.images).float()[:, None] / 16
    images = F.pad(F.interpolate(small, size=(20, 20), mode="bilinear"), (4, 4, 4, 4)).flatten(1)
    labels = torch.from_numpy(data.target).long()
    source = "scikit-learn's digits, 8 x 8 brought to 28 x 28"
    test = in_order_of_chance(images[1400:], labels[1400:])
    return Task("digits", source, images[:1400], labels[:1400], *test, DIGITS)


def colours(folder: Path) -> Task | None:
    """CIFAR-10, where torchvision finds it in the folder."""
    names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    return from_torchvision("CIFAR10", folder, "colours", names)


def from_torchvision(dataset: str, folder: Path, name: str, classes: tuple[str, ...]) -> Task | None:
    """A data set of torchvision; None without torchvision, or where the folder does not hold it."""
    try:
        from torchvision import datasets

        parts = [getattr(datasets, dataset)(folder, train=train, download=False) for train in (True, False)]
    except (ImportError, RuntimeError):
        return None
    train, test = [(pixels(part.data), torch.as_tensor(part.targets)) for part in parts]
    return Task(name, f"{dataset} of torchvision", *train, *in_order_of_chance(*test), classes)


def pixels(images: Any) -> Tensor:
    """Bytes [n, h, w] or [n, h, w, c] as numbers from 0 to 1 [n, pixel]."""
    return torch.as_tensor(images).flatten(1).float() / 255


def in_order_of_chance(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both in an order of chance, always the same one: any first ones are of all classes."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]
