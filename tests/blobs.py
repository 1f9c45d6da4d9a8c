"""A small classification run for those who judge attributions: clouds of points, a network, its memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import dualhook

CLASSES, SAMPLES, QUERIES = 3, 48, 9
EPOCHS, BATCH = 20, 8


@dataclass(frozen=True)
class Blobs:
    """Points and labels to train on, of which the ``wrong`` ones [sample] carry another class's, and queries."""

    dataset: TensorDataset
    wrong: torch.Tensor
    queries: torch.Tensor
    labels: torch.Tensor


def blobs(seed: int = 0) -> Blobs:
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(CLASSES, 5, generator=generator)
    labels = torch.arange(SAMPLES + QUERIES) % CLASSES
    points = centres[labels] + torch.randn(len(labels), 5, generator=generator)
    wrong = torch.zeros(SAMPLES, dtype=torch.bool)
    wrong[torch.randperm(SAMPLES, generator=generator)[:5]] = True
    given = (labels[:SAMPLES] + wrong.long()) % CLASSES
    return Blobs(TensorDataset(points[:SAMPLES], given), wrong, points[SAMPLES:], labels[SAMPLES:])


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def trained(data: Blobs, path=None, kept=None, optimizer=torch.optim.SGD):
    """The network and, where there is a ``path``, its memory; samples that are not ``kept`` [sample] do not count."""
    model = network()
    optimizer = optimizer(model.parameters(), lr=0.1)
    recorder = None if path is None else dualhook.instrument(model, path, verbose=False)
    torch.manual_seed(4)
    counted = torch.ones(SAMPLES) if kept is None else torch.as_tensor(kept).float()
    loader = DataLoader(TensorDataset(*data.dataset.tensors, counted), BATCH, shuffle=True)
    for _ in range(EPOCHS):
        for x, y, own in loader if recorder is None else recorder.track(loader):
            optimizer.zero_grad()
            ((F.cross_entropy(model(x), y, reduction="none") * own).sum() / BATCH).backward()
            optimizer.step()
    return model.eval(), None if recorder is None else recorder.close()
