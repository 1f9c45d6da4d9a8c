"""Columns for a memory from a torchvision data set (needs ``dualhook[torchvision]``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torchvision.datasets import VisionDataset

from dualhook import DualHookError, DualMemory

__all__ = ["add_columns"]


def add_columns(memory: DualMemory, dataset: VisionDataset) -> None:
    """Add the column ``label`` (class numbers) and, where the data set names its classes, ``class`` to a memory.

    The rows must be the ones the training loader drew from: the data set itself, not a subset of it.

    Raises:
        DualHookError: the data set has no targets, or fewer than the memory has samples.
    """
    targets: Sequence[Any] | None = getattr(dataset, "targets", None)
    if targets is None:
        targets = getattr(dataset, "labels", None)
    if targets is None:
        raise DualHookError(
            f"{type(dataset).__name__} has neither targets nor labels: pass the labels to memory.add_column"
        )
    labels = [int(target) for target in targets]
    memory.add_column("label", labels)
    classes: Sequence[str] | None = getattr(dataset, "classes", None)
    if classes is not None:
        memory.add_column("class", [classes[label] for label in labels])
