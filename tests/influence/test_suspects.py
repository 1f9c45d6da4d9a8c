"""Which samples training has found hardest, from the rows of the last layer."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualhook
import dualhook.evaluate
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
    assert table.columns == ["rank", "sample", "gradient", "last_gradient", "rows", "self_influence"]
    assert "no disagreement: it takes a softmax head" in table.footer
    for row in table:  # of the mean over batch and outputs: 2 (y - target) / (n o), times n
        own = [
            float((out[batch == row["sample"]] - y[row["sample"]]).norm())
            for batch, out in seen
            if (batch == row["sample"]).any()
        ]
        assert row["gradient"] == pytest.approx(sum(own) / len(own), rel=1e-9)


class Tokens(nn.Module):
    """Words through a table that is also the head: several rows a sample, two uses of one weight."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.inner = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.table(ids))))


def digits():
    """A network, inputs and labels [16]: one class a sample."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model.double(), torch.randn(16, 6).double(), torch.randint(0, 3, (16,))


def texts():
    """A language model, tokens and labels [16, 4]: as many classes as tokens."""
    return Tokens().double(), torch.randint(0, 7, (16, 4)), torch.randint(0, 7, (16, 4))


def convolutions():
    """A convolutional network, images and labels [16]."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(16, 3))
    return model.double(), torch.randn(16, 2, 4, 4).double(), torch.randint(0, 3, (16,))


def followed(path, made, optimizer, batches, rates, see=lambda model, optimizer: None):
    """The memory of a run, and of every step its batch, each sample's own gradient, and what ``see`` returns after."""
    torch.manual_seed(5)
    model, x, y = made()
    twin, optimizer = copy.deepcopy(model), optimizer(model.parameters())
    recorder, steps = dualhook.instrument(model, path, layers="all", verbose=False), []
    for batch, rate in zip(batches, rates, strict=True):
        own = []
        twin.load_state_dict(model.state_dict())
        for s in batch.tolist():
            out = twin(x[s : s + 1]).flatten(0, -2)
            loss = F.cross_entropy(out, y[s : s + 1].flatten(), reduction="sum")
            own.append(torch.autograd.grad(loss, list(twin.parameters())))
        recorder.batch(samples=batch)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]).flatten(0, -2), y[batch].flatten()).backward()
        optimizer.step()
        steps.append((batch, own, see(model, optimizer)))
    return recorder.close(), steps, y[0].numel()


BATCHES = [torch.arange(16).roll(-4 * step)[:4] for step in range(10)]
RATES = [0.2, 0.3, 0.25, 0.1, 0.2, 0.3, 0.1, 0.15, 0.2, 0.05]


@pytest.mark.parametrize("made", [digits, texts, convolutions])
def test_self_influence_is_what_own_steps_have_lowered(tmp_path, made):
    settings = {"lr": 1.0, "momentum": 0.7, "weight_decay": 0.05}
    memory, steps, rows = followed(tmp_path / "m", made, lambda p: torch.optim.SGD(p, **settings), BATCHES, RATES)

    def coefficient(step):  # what is in the weights at the end of a gradient of 1
        weight = nn.Parameter(torch.zeros(1).double())
        optimizer = torch.optim.SGD([weight], **settings)
        for number, rate in enumerate(RATES):
            optimizer.param_groups[0]["lr"] = rate
            weight.grad = torch.full_like(weight, float(number == step))
            optimizer.step()
        return -weight.item()

    expected = np.zeros(16)
    for step, (batch, own, _) in enumerate(steps):
        for sample, grads in zip(batch.tolist(), own, strict=True):
            size = sum(float(g.square().sum()) for g in grads)
            expected[sample] += coefficient(step) * size / (len(batch) * rows)
    table = memory.suspects()
    np.testing.assert_allclose(table["self_influence"], expected[table["sample"]], rtol=1e-5)


def line():
    """A layer whose preconditioner is a column: two outputs, one input."""
    return nn.Linear(1, 2, bias=False).double(), torch.randn(16, 1).double(), torch.randint(0, 2, (16,))


def under_adam(path, made, steps, beta):
    """Self-influence [16] by the rows, and with the preconditioner of every step held fixed."""

    def seen(model, optimizer):
        return [optimizer.state[p]["exp_avg_sq"].clone() for p in model.parameters()]

    batches = [torch.arange(16).roll(-4 * step)[:4] for step in range(steps)]
    optimizer = functools.partial(torch.optim.Adam, betas=(beta, 0.99))
    memory, followed_steps, _ = followed(path, made, optimizer, batches, [0.01] * steps, seen)
    found, expected = np.zeros((2, 16))
    for step, (batch, own, second) in enumerate(followed_steps):
        factors = [torch.zeros_like(v) for v in second]
        for later, (*_, moments) in list(enumerate(followed_steps))[step:]:
            share = 0.01 * (1 - beta) * beta ** (later - step) / (1 - beta ** (later + 1))
            for factor, v in zip(factors, moments, strict=True):
                factor += share / ((v / (1 - 0.99 ** (later + 1))).sqrt() + 1e-8)
        for sample, grads in zip(batch.tolist(), own, strict=True):
            squares = [g.square() for g in grads]
            expected[sample] += sum(float((f * g).sum()) for f, g in zip(factors, squares, strict=True)) / len(batch)
    table = memory.suspects()
    found[table["sample"]] = table["self_influence"]
    return found, expected


def test_self_influence_under_adam_is_in_its_metric(tmp_path):
    found, expected = under_adam(tmp_path / "m", line, 8, 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_self_influence_under_adam_is_close_where_the_metric_is_rounded(tmp_path):
    found, expected = under_adam(tmp_path / "m", digits, 300, 0.9)
    assert np.corrcoef(found, expected)[0, 1] > 0.9
    assert np.median(found / expected) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("numbers", [2**24, 40])
def test_disagreement_is_that_of_the_nearest(tmp_path, monkeypatch, numbers):
    monkeypatch.setattr("dualhook.suspects.NUMBERS", numbers)
    last = {}

    def seen(model, optimizer):
        return [p.detach().clone() for p in model.parameters()]

    batches = [*BATCHES, torch.tensor([3, 3, 7, 9])]  # a sample twice in its last batch
    memory, steps, _ = followed(
        tmp_path / "m", digits, lambda p: torch.optim.SGD(p, lr=0.1), batches, [*RATES[:-1], 9.0, 0.1], seen
    )
    torch.manual_seed(5)
    model, x, y = digits()
    weights = [[p.detach().clone() for p in model.parameters()], *(after for *_, after in steps)]
    for (batch, *_), before in zip(steps, weights, strict=False):
        features = torch.tanh(x[batch] @ before[0].T + before[1])
        last |= dict(zip(batch.tolist(), features / features.norm(dim=1, keepdim=True), strict=True))
    for count in (1, 3, 100):
        table = memory.suspects(16, neighbours=count)
        for sample, share in zip(table["sample"].tolist(), table["disagreement"], strict=True):
            others = sorted((s for s in last if s != sample), key=lambda s: -float(last[s] @ last[sample]))[:count]
            assert share == pytest.approx(np.mean([int(y[s]) != int(y[sample]) for s in others]))
    assert len(set(table["disagreement"])) > 1


def test_what_the_rows_do_not_tell_is_left_out(tmp_path):
    memory, *_ = followed(tmp_path / "m", texts, lambda p: torch.optim.SGD(p, lr=0.1), BATCHES, RATES)
    table = memory.suspects()
    assert "disagreement" not in table.columns
    assert "one label a sample" in table.footer
    memory, *_ = followed(tmp_path / "n", digits, lambda p: torch.optim.Rprop(p, lr=0.1), BATCHES, RATES)
    table = memory.suspects()
    assert table.columns == ["rank", "sample", "loss", "last_loss", "rows", "disagreement"]
    assert "no self_influence" in table.footer


def test_both_columns_find_flipped_labels(tmp_path):
    torch.manual_seed(1)
    y = torch.randint(0, 3, (60,))
    x = (F.one_hot(y, 3).double() * 3) @ torch.randn(3, 6).double() + torch.randn(60, 6).double()
    flipped = torch.randperm(60)[:6]
    y[flipped] = (y[flipped] + 1) % 3
    memory, _ = trained(tmp_path / "m", F.cross_entropy, torch.arange(60), x, y, steps=90)
    table = memory.suspects(60)
    wrong = np.isin(table["sample"], flipped.numpy())
    for column in ("self_influence", "disagreement"):
        assert dualhook.evaluate.mislabel_table({column: table[column]}, wrong)["auc"][0] > 0.9


def test_bad_questions(tmp_path):
    x, y = torch.randn(8, 5).double(), torch.randint(0, 3, (8,))
    memory, _ = trained(tmp_path / "m", F.cross_entropy, None, x, y, steps=1)
    with pytest.raises(DualHookError, match="recorder.track"):
        memory.suspects()
    with pytest.raises(DualHookError, match="k=0: expected at least 1"):
        memory.suspects(0)
    with pytest.raises(DualHookError, match="neighbours=0: expected at least 1"):
        memory.suspects(neighbours=0)
