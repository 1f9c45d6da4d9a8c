from __future__ import annotations

import pytest
import torch
from dualhook.integrations.torchvision import add_columns
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData, FashionMNIST, VisionDataset

import dualhook


class Shapes(VisionDataset):
    """Six images of two classes, as torchvision's data sets hold theirs."""

    classes = ("circle", "square")

    def __init__(self) -> None:
        super().__init__(root="")
        self.targets = torch.tensor([0, 1, 1, 0, 1, 0])

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        return torch.full((4,), float(index)), int(self.targets[index])


def test_labels_and_class_names():
    dataset, model = Shapes(), nn.Linear(4, 2)
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for x, y in recorder.track(DataLoader(dataset, batch_size=2, shuffle=True)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    memory = recorder.close()
    add_columns(memory, dataset)
    attention = memory.attend(model, torch.ones(1, 4))
    assert attention.sum_by("label")["label"].tolist() == [0, 1]
    assert attention.sum_by("class")["class"].tolist() == ["circle", "square"]
    totals = (attention.sum_by(name)["contribution"].tolist() for name in ("label", "class"))
    assert next(totals) == next(totals)
    assert FashionMNIST.classes[0] == "T-shirt/top"  # what the real ones have
    with pytest.raises(dualhook.DualHookError, match="FakeData has neither targets nor labels"):
        add_columns(memory, FakeData())
