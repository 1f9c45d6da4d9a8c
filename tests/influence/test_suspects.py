"""Which samples training has found hardest, from the rows of the last layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.errors import DualHookError


def trained(path, loss, samples, x, y, *, steps=12, classes=3):
    """A linear model trained on batches of four, and every batch's samples and outputs before each step."""
    torch.manual_seed(0)
    model = nn.Linear(x.shape[1], classes).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    recorder, seen = dualhook.instrument(model, path, verbose=False), []
    for step in range(steps):
        batch = torch.arange(len(x)).roll(-4 * step)[:4]
        if samples is not None:
            recorder.batch(samples=samples[batch])
        optimizer.zero_grad()
        out = model(x[batch])
        seen.append((batch, out.detach()))
        loss(out, y[batch]).backward()
        optimizer.step()
    return recorder.close(), seen


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_in_the_rows(tmp_path, reduction):
    x, y, samples = torch.randn(10, 5).double(), torch.randint(0, 3, (10,)), torch.arange(10) * 3
    memory, seen = trained(tmp_path / "m", lambda out, t: F.cross_entropy(out, t, reduction=reduction), samples, x, y)
    table = memory.suspects()
    assert sorted(table["sample"]) == samples.tolist()
    assert (np.diff(table["loss"]) <= 0).all()
    for row in table:
        own = [
            float(F.cross_entropy(out[batch == row["sample"] // 3], y[batch[batch == row["sample"] // 3]]))
            for batch, out in seen
            if (batch == row["sample"] // 3).any()
        ]
        assert row["loss"] == pytest.approx(sum(own) / len(own), rel=1e-9)
        assert row["last_loss"] == pytest.approx(own[-1], rel=1e-9)
        assert row["rows"] == len(own)


def test_flipped_labels_come_first(tmp_path):
    torch.manual_seed(1)
    y = torch.randint(0, 3, (40,))
    x = (F.one_hot(y, 3).double() * 3) @ torch.randn(3, 6).double() + torch.randn(40, 6).double() * 0.3
    flipped = torch.tensor([3, 17, 29])
    y[flipped] = (y[flipped] + 1) % 3
    memory, _ = trained(tmp_path / "m", F.cross_entropy, torch.arange(40), x, y, steps=60)
    assert set(memory.suspects(3)["sample"].tolist()) == set(flipped.tolist())


def test_of_other_losses_the_gradients_are_told(tmp_path):
    x, y = torch.randn(8, 5).double(), torch.randn(8, 2).double()
    memory, seen = trained(tmp_path / "m", F.mse_loss, torch.arange(8), x, y, classes=2)
    table = memory.suspects(2)
    assert table.columns == ["rank", "sample", "gradient", "last_gradient", "rows"]
    for row in table:  # of the mean over batch and outputs: 2 (y - target) / (n o), times n
        own = [
            float((out[batch == row["sample"]] - y[row["sample"]]).norm())
            for batch, out in seen
            if (batch == row["sample"]).any()
        ]
        assert row["gradient"] == pytest.approx(sum(own) / len(own), rel=1e-9)


def test_bad_questions(tmp_path):
    x, y = torch.randn(8, 5).double(), torch.randint(0, 3, (8,))
    memory, _ = trained(tmp_path / "m", F.cross_entropy, None, x, y, steps=1)
    with pytest.raises(DualHookError, match="recorder.track"):
        memory.suspects()
    with pytest.raises(DualHookError, match="k=0: expected at least 1"):
        memory.suspects(0)
