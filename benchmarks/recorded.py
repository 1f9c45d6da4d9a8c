"""Memories to ask: real recordings of chosen sizes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.data import FashionMnist, load_fashion_mnist_subset

__all__ = ["all_of_fashion_mnist", "record"]


def all_of_fashion_mnist(folder: Path) -> FashionMnist:
    """The 60,000 training and 10,000 test images, from where torchvision keeps them."""
    from torchvision.datasets import FashionMNIST

    train, test = (FashionMNIST(folder, train=split) for split in (True, False))
    images = ((own.data.reshape(len(own.data), -1).float() / 255) for own in (train, test))
    return FashionMnist(next(images), train.targets, next(images), test.targets)


def record(
    model: nn.Module,
    path: Path,
    patterns: int,
    *,
    layers: list[str],
    batch: int,
    flush: bool = False,
    sparse: bool = False,
    dtype: torch.dtype | None = None,
    data: FashionMnist | None = None,
) -> dualhook.DualMemory:
    """Train ``model`` on Fashion-MNIST images by SGD until its ``layers`` have so many patterns; column label.

    ``flush``: every batch makes a segment; ``sparse``: rows leave out their zeros; ``data``: default the subset.
    """
    data = data or load_fashion_mnist_subset()
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    with dualhook.instrument(model, path, layers=layers, sparse=sparse, dtype=dtype, verbose=False) as recorder:
        for start in range(0, patterns, batch):
            chosen = torch.randint(0, len(data.train_labels), (min(batch, patterns - start),))
            with recorder.batch(samples=chosen):
                optimizer.zero_grad()
                F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen]).backward()
                optimizer.step()
            if flush:
                recorder.flush()
    memory = recorder.close()
    memory.add_column("label", data.train_labels)
    return memory
