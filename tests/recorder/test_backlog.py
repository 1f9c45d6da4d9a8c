"""Steps that are measured some steps later, when their rows are looked at for several steps in one go."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.capture import LayerProbe
from dualhook.errors import InexactWarning
from dualhook.recorder.backlog import Backlog
from dualhook.records import LayerSpec
from dualhook.store.reader import Store

STEPS = 41


class Net(nn.Module):
    """Plain layers beside others: a convolution and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)
        self.first, self.twice, self.last = nn.Linear(20, 40), nn.Linear(40, 40), nn.Linear(40, 3, bias=False)

    def forward(self, x):
        x = torch.tanh(self.first(self.conv(x[:, None]).flatten(1)))
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


def sgd(net):
    return [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)]


def adam(net):
    return [torch.optim.AdamW(net.parameters(), lr=0.01)]


def one_of_weights_and_one_of_biases(net):
    named = list(net.named_parameters())
    return [
        torch.optim.SGD([value for name, value in named if name.endswith(kind)], lr=0.05) for kind in ("weight", "bias")
    ]


def plain(net, step):
    net.loss(6).backward()


def clipped(net, step):
    net.loss(6).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.01 * (1 + step % 5))


def accumulated(net, step):
    for size in (3, 5, 2)[: 1 + step % 3]:  # steps of 3, 8 and 10 rows
        net.loss(size).backward()


WAYS = [(sgd, plain), (sgd, clipped), (sgd, accumulated), (adam, clipped), (one_of_weights_and_one_of_biases, plain)]


def trained(
    path, make=sgd, backward=plain, *, segment_bytes=None, after_step=lambda net, step, recorder: None, **options
):
    """The weights after every step, and the recorder."""
    torch.manual_seed(0)
    net = Net().double()
    net.loss = lambda size: F.cross_entropy(net(torch.randn(size, 12).double()), torch.randint(0, 3, (size,)))
    optimizers = make(net)
    recorder = dualhook.instrument(net, path, layers="all", verbose=False)
    if segment_bytes is not None:
        recorder._writer.segment_bytes = segment_bytes
    weights = [{name: value.detach().clone() for name, value in net.named_parameters()}]
    for step in range(1, STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(net, step)
        for optimizer in optimizers:
            optimizer.step()
        weights.append({name: value.detach().clone() for name, value in net.named_parameters()})
        after_step(net, step, recorder)
    return weights, recorder


def columns(path):
    """The ledger by parameter: steps, scales, residuals, marks."""
    return {n: (h.step, h.scale, h.residual, h.mark) for n, h in Store(path).histories.items()}


@pytest.mark.parametrize("segment_bytes", [None, 1, 50_000])
@pytest.mark.parametrize(("make", "backward"), WAYS, ids=lambda way: way.__name__)
def test_the_ledger_is_what_it_would_be_measured_at_once(tmp_path, monkeypatch, make, backward, segment_bytes):
    weights, recorder = trained(tmp_path / "later", make, backward, segment_bytes=segment_bytes)
    memory = recorder.close()
    seen = []
    monkeypatch.setattr(LayerProbe, "glance", lambda self, gradients, whole: seen.append(gradients))
    trained(tmp_path / "once", make, backward, segment_bytes=segment_bytes)[1].close()
    assert len(seen) > STEPS  # it is what measures later
    later, once = columns(tmp_path / "later"), columns(tmp_path / "once")
    assert later.keys() == once.keys() == weights[0].keys()
    for name, (steps, scale, residual, mark) in once.items():
        assert torch.equal(later[name][0], steps)
        torch.testing.assert_close(later[name][1], scale, rtol=1e-9, atol=0)
        torch.testing.assert_close(later[name][2], residual, rtol=0, atol=1e-9)
        assert torch.equal(later[name][3], mark)
    assert memory.verify()["exact"].all()
    for step, expected in enumerate(weights):
        for name, value in memory.state_dict(step=step).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rows_at_once", [1, 20, 2**15])
def test_scales_are_those_of_their_steps(tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr("dualhook.recorder.backlog.ROWS", rows_at_once)

    def scaled(net, step):
        plain(net, step)
        for parameter in net.parameters():
            parameter.grad *= 1 / step

    trained(tmp_path / "run", sgd, scaled)[1].close()
    for _, scale, _, _ in columns(tmp_path / "run").values():
        torch.testing.assert_close(scale, 1 / torch.arange(1, STEPS).double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("at", [2, 7, 16, STEPS - 1])
def test_a_step_that_is_not_explained_is_told_with_its_number(tmp_path, at):
    def disturbed(net, step):
        plain(net, step)
        if step == at:
            net.first.weight.grad += 0.01 * torch.randn_like(net.first.weight)

    with pytest.warns(
        InexactWarning, match=rf"step {at}: the recorded rows leave .* of the gradient of 'first.weight'"
    ):
        trained(tmp_path / "run", sgd, disturbed)[1].close()
    found = columns(tmp_path / "run")
    assert found["first.weight"][3].nonzero().flatten().tolist() == [0, at - 1]  # the first is marked as fresh
    assert found["twice.weight"][3].nonzero().flatten().tolist() == [0]


def test_numbers_that_are_none_and_weights_that_changed_are_told_in_their_step(tmp_path):
    told = {}

    def disturbed(net, step):
        if step == 7:
            net.twice.weight.data *= 1.01
        plain(net, step)
        if step == 11:
            net.first.weight.grad[:] = math.nan

    def after_step(net, step, recorder):
        told[step] = [str(one.message) for one in caught]
        if step == 11:  # the rest of the run is not about numbers
            for value, sound in zip(net.parameters(), Net().double().parameters(), strict=True):
                value.data.copy_(sound)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(tmp_path / "run", sgd, disturbed, after_step=after_step)[1].close()
    assert not told[6]
    assert "'twice.weight' or its optimiser state was changed" in told[7][0]
    assert len(told[10]) == 1
    assert "step 11: NaN or infinity in the gradient of 'first.weight'" in told[11][1]


def test_a_flush_puts_every_step_in_the_ledger(tmp_path):
    found = {}

    def after_step(net, step, recorder):
        if step in (6, 13, 27):
            recorder.flush()
            found[step] = {name: steps.tolist() for name, (steps, *_) in columns(tmp_path / "run").items()}

    weights, recorder = trained(tmp_path / "run", after_step=after_step)
    recorder.close()
    assert found == {step: {name: list(range(1, step + 1)) for name in weights[0]} for step in (6, 13, 27)}


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_steps_that_cannot_be_measured_are_not_in_the_memory(tmp_path, monkeypatch, fails_at):
    original, calls = LayerProbe.later, []

    def later(self, *args):
        calls.append(self)
        if len(calls) > 3 * (fails_at - 1):  # in a turn there are three plain layers
            raise RuntimeError("no")
        return original(self, *args)

    monkeypatch.setattr(LayerProbe, "later", later)
    with pytest.warns(UserWarning, match="recording stopped after step"):
        weights, recorder = trained(tmp_path / "run", sgd, plain)
        memory = recorder.close()
    assert memory.steps == {1: 4, 2: 17, 3: 33}[fails_at]
    monkeypatch.undo()
    for step in range(memory.steps + 1):
        for name, value in memory.state_dict(step=step).items():
            torch.testing.assert_close(value, weights[step][name], rtol=1e-8, atol=1e-10)


def test_a_corner_without_numbers_is_measured_at_once():
    probe = LayerProbe(LayerSpec("layer", 40, 48, "layer.weight", "layer.bias"))
    gradients = {"layer.weight": torch.randn(48, 40), "layer.bias": torch.randn(48)}
    seen = probe.glance(gradients)
    assert list(seen.computed) == ["layer.weight", "layer.bias"]
    assert [len(values) for values in seen.entries] == [32 * 16, 32]
    for change in (lambda own: own.zero_(), lambda own: own.fill_(math.nan), lambda own: own.fill_(-math.inf)):
        for name in gradients:
            other = {n: change(own.clone()) if n == name else own for n, own in gradients.items()}
            assert probe.glance(other) is None


def test_rows_are_not_looked_at_in_every_step(tmp_path, monkeypatch):
    original, counts = Backlog.work, []
    monkeypatch.setattr(Backlog, "work", lambda self: (counts.append(len(self._steps)), original(self)))
    trained(tmp_path / "run")[1].close()
    # the first ones alone, then up to those whose gradients are looked at as a whole; the last ones at the end
    assert [count for count in counts if count] == [1, 1, 1, 1, 13, 16, 7]
