"""Small data that ships with the package.

Images are a subset of Fashion-MNIST (Zalando Research 2017, MIT licence), texts some books of the King James Version
(public domain); the ``LICENSE-*`` files beside them say more.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from torch import Tensor

__all__ = ["CLASSES", "FashionMnist", "KingJames", "load_fashion_mnist_subset", "load_king_james_subset"]

CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class FashionMnist:
    """Clothes as 28 × 28 grey images, one row each, from 0 (background) to 1.

    ``train_images`` [n, 784] and ``test_images`` are float32, ``train_labels`` [n] and ``test_labels`` int64 numbers
    into ``classes``.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...] = CLASSES


@dataclass(frozen=True)
class KingJames:
    """Bible verses, each with its reference ("Genesis 1:1"), in the order of the book."""

    references: tuple[str, ...]
    verses: tuple[str, ...]


def load_fashion_mnist_subset() -> FashionMnist:
    """The first 500 training and 100 test images of every class, in the order of the original files."""
    with resources.files(__name__).joinpath("fashion_mnist_subset.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        return FashionMnist(
            _pixels(arrays["train_images"]),
            _labels(arrays["train_labels"]),
            _pixels(arrays["test_images"]),
            _labels(arrays["test_labels"]),
        )


def load_king_james_subset() -> KingJames:
    """The 3,637 verses of Genesis, Ruth, Ecclesiastes, Jonah, Matthew and Mark."""
    compressed = resources.files(__name__).joinpath("king_james_subset.txt.gz").read_bytes()
    lines = [line.split("\t") for line in gzip.decompress(compressed).decode("ascii").splitlines()]
    references, verses = zip(*lines, strict=True)
    return KingJames(references, verses)


def _pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).reshape(len(images), -1).float() / 255


def _labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels).long()
