"""The self-check: a step that is not what its rule says is told while training runs."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.recorder.selfcheck import EVERY


def train(model, optimizer, steps, path):
    recorder = dualhook.instrument(model, path, verbose=False)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 6)), torch.randint(0, 3, (8,))).backward()
        optimizer.step()
    return recorder.close()


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.SGD, {"lr": 0.0}),
        (torch.optim.ASGD, {"lr": 0.1, "lambd": 0.1}),
        (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"lr": 1e-8}),
        (torch.optim.Adam, {"lr": torch.tensor(0.01)}),
    ],
)
def test_a_right_rule_is_not_accused(tmp_path, make, settings):
    model = nn.Linear(6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, make(model.parameters(), **settings), 2 * EVERY + 1, tmp_path / "run")


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_a_hook_that_changes_weights_after_the_step_is_told(tmp_path, make):
    model = nn.Linear(6, 3)
    optimizer = make(model.parameters(), lr=0.01)

    def clamp(optimizer, args, kwargs):
        with torch.no_grad():
            model.weight.clamp_(-0.1, 0.1)

    optimizer.register_step_post_hook(clamp)
    with pytest.warns(dualhook.InexactWarning, match=r"step 1: the rule of torch\.optim\.\S+ is off by .* of what"):
        memory = train(model, optimizer, 5, tmp_path / "run")
    assert memory.info()["inexact_steps"][0] >= 1
    assert not memory.verify()["exact"].any()


def test_a_rule_that_is_wrong_from_some_step_on_is_told_there(tmp_path):
    class Late(torch.optim.Adam):
        """Adam's step as far as anyone can tell from the class, with another rate than the group says, later on."""

    model = nn.Linear(6, 3)
    optimizer = Late(model.parameters(), lr=0.01)
    taken = 0

    def shrink(optimizer, args, kwargs):
        nonlocal taken
        taken += 1
        if taken > 10:
            with torch.no_grad():
                model.bias.mul_(0.9)

    optimizer.register_step_post_hook(shrink)
    with pytest.warns(dualhook.InexactWarning, match=rf"step {EVERY}: the rule of torch\.optim\.adam\.Adam is off by"):
        train(model, optimizer, EVERY + 1, tmp_path / "run")
