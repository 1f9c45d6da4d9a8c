"""Wherever the model is, and whatever default device the user has set: our own tensors are made in host memory.

The oracle is the same run on the processor without one. A default device is torch's ``meta``, whose tensors hold no
numbers: one of ours that was made there would be missed at once.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext, suppress
from functools import partial

import numpy as np
import pytest
import torch
from elsewhere import elsewhere
from torch import nn
from torch.nn import functional as F

import dualhook

META = torch.device("meta")
STEPS, BATCH, LENGTH, WIDTH, CLASSES = 3, 4, 6, 5, 3


@contextmanager
def set_globally():
    torch.set_default_device(META)
    try:
        yield
    finally:
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
    """A training and all questions to its memory, on a device, with or without a default one."""

    def __init__(self, path, default, optimizer, device=None) -> None:
        torch.manual_seed(0)
        with nullcontext() if device is None else device:
            self.model = Net()
        tokens = torch.randint(0, 9, (STEPS, BATCH, LENGTH)).to(device)
        labels = torch.randint(0, CLASSES, (STEPS, BATCH)).to(device)
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


OPTIMIZERS = [partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.optim.AdamW]


def steps_are_counted_there() -> bool:
    """Whether torch's Adam keeps the number of its steps on the default device."""
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = torch.optim.AdamW([parameter])
    with META, suppress(RuntimeError):
        optimizer.step()
    return optimizer.state[parameter]["step"].device == META


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("globally", [False, True])
def test_answers_are_those_without_a_default_device(tmp_path, optimizer, globally):
    if optimizer is torch.optim.AdamW and steps_are_counted_there():
        pytest.skip("this torch's Adam, before 2.12, cannot count its steps where there are no numbers")
    plain = Used(tmp_path / "plain", nullcontext(), optimizer)
    other = Used(tmp_path / "other", set_globally() if globally else META, optimizer)
    assert set(other.model.made_on + other.asked_on) == {META}
    assert all(map(torch.equal, plain.model.state_dict().values(), other.model.state_dict().values()))
    for one, two in zip(plain.tables, other.tables, strict=True):
        assert len(one)
        assert all(str(one[name].tolist()) == str(two[name].tolist()) for name in one.columns)
    assert all(torch.equal(plain.without[name], other.without[name]) for name in plain.without)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_answers_about_a_model_elsewhere_are_those_of_one_here(tmp_path, optimizer):
    plain = Used(tmp_path / "plain", nullcontext(), optimizer)
    with elsewhere() as device:
        other = Used(tmp_path / "other", nullcontext(), optimizer, device)
    for one, two in zip(plain.tables, other.tables, strict=True):
        assert len(one) == len(two)
        for name in one.columns:
            if one[name].dtype.kind == "f":  # torch computes a recurrent layer in another way there
                np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=1e-5)
            else:
                assert one[name].tolist() == two[name].tolist()
    for name, values in plain.without.items():
        torch.testing.assert_close(values, other.without[name])
