"""Whatever default device the user has set, our own tensors are made in host memory, and the model's are not.

The oracle is the same run without one. The device is torch's ``meta``, whose tensors hold no numbers: one of ours that
was made there would be missed at once.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualhook

META = torch.device("meta")
STEPS, BATCH, LENGTH, WIDTH, CLASSES = 3, 4, 6, 5, 3


@contextmanager
def set_globally():
    torch.set_default_device(META)
    yield
    torch.set_default_device(None)


class Net(nn.Module):
    """Linear, convolutional, recurrent and embedding layers; notes where its own tensors are made."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, WIDTH)
        self.recurrent = nn.LSTM(WIDTH, 7, batch_first=True)
        self.convolution = nn.Conv1d(7, 8, 3)
        self.head = nn.Linear(8, CLASSES)
        self.made_on: list[torch.device] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.made_on.append(torch.empty(0).device)
        x = self.recurrent(F.embedding(tokens, self.embed.weight))[0].mT
        self.made_on.append(torch.empty(0).device)
        return self.head(self.convolution(x).relu().mean(2))


class Used:
    """A training and all questions to its memory, with or without a default device."""

    def __init__(self, path, default, optimizer) -> None:
        torch.manual_seed(0)
        self.model = Net()
        tokens = torch.randint(0, 9, (STEPS, BATCH, LENGTH))
        labels = torch.randint(0, CLASSES, (STEPS, BATCH))
        trained_by = optimizer(self.model.parameters())
        self.asked_on: list[torch.device] = []
        with default:
            recorder = dualhook.instrument(self.model, path, layers="all", verbose=False)
            with recorder:
                recorder.estimate(tokens[0])
                for step in range(STEPS):
                    recorder.batch(samples=range(BATCH), source=step)
                    trained_by.zero_grad()
                    F.cross_entropy(self.model(tokens[step]), labels[step]).backward()
                    trained_by.step()
                recorder.flush()
            self.memory = dualhook.load(path)
            self.memory.add_column("label", list(range(BATCH)))
            attention = self.memory.attend(self.model, tokens[0], target=self.asked)
            influence = self.memory.influence(self.model, tokens[0], target=labels[0].tolist())
            self.tables = [
                self.memory.verify(self.model),
                attention.top(3),
                attention.sum_by("label"),
                attention.receipt,
                influence.top(3),
                self.memory.suspects(3),
            ]
            self.without = self.memory.without(1)

    def asked(self, logits):
        self.asked_on.append(torch.empty(0).device)
        return logits[:, 1]


@pytest.mark.parametrize("optimizer", [lambda own: torch.optim.SGD(own, lr=0.1, momentum=0.9), torch.optim.AdamW])
@pytest.mark.parametrize("globally", [False, True])
def test_answers_are_those_without_a_default_device(tmp_path, optimizer, globally):
    plain = Used(tmp_path / "plain", nullcontext(), optimizer)
    other = Used(tmp_path / "other", set_globally() if globally else META, optimizer)
    assert set(other.model.made_on + other.asked_on) == {META}
    assert all(map(torch.equal, plain.model.state_dict().values(), other.model.state_dict().values()))
    for one, two in zip(plain.tables, other.tables, strict=True):
        assert len(one)
        assert all(str(one[name].tolist()) == str(two[name].tolist()) for name in one.columns)
    assert all(torch.equal(plain.without[name], other.without[name]) for name in plain.without)
