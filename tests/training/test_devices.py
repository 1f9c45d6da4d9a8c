"""Models on a CUDA device, and rows that reach the host later than their backward pass."""

from __future__ import annotations

import pytest
import torch
from training.ways import PATTERNS, STEPS, assert_exact, loader, loss_of, net, plain, same, sgd, trained

import dualhook
from dualhook.recorder.staging import Staging

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def staged(monkeypatch):
    """Let rows on the CPU take the way of those on a CUDA device."""
    monkeypatch.setattr(Staging, "takes", staticmethod(lambda rows: True))


def with_dropped_micro_batches(model, track):
    optimizer = sgd(model)
    for x, y in track(loader()):
        loss_of(model(x), y).backward()
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        x.zero_()  # free to be written to, once the backward pass is over
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.usefixtures("staged")
@pytest.mark.parametrize("limit", [0, 2**30])
def test_staged_rows_are_those_of_the_plain_run(monkeypatch, limit):
    monkeypatch.setattr("dualhook.recorder.staging.STAGED_BYTES", limit)
    assert_exact(trained(plain), patterns=PATTERNS, steps=STEPS)
    assert_exact(trained(with_dropped_micro_batches), patterns=PATTERNS // 2, steps=STEPS // 2)


def on_cuda(model, track):
    optimizer = sgd(model)
    for x, y in track(loader()):
        x, y = x.cuda(), y.cuda()
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        x.zero_()
        optimizer.step()


@cuda
def test_a_model_on_a_device():
    assert_exact(trained(on_cuda, make=lambda: net().cuda()), patterns=PATTERNS // 2, steps=STEPS // 2)


@cuda
def test_a_model_that_moves():
    model, bare = net(), net()
    recorder = dualhook.instrument(model, verbose=False)
    for each, track in ((model, recorder.track), (bare, lambda data: data)):
        plain(each, track)
        on_cuda(each.cuda(), track)
        plain(each.cpu(), track)
    assert same(model, bare)
    memory = recorder.close()
    assert memory.patterns("head") == PATTERNS * 5 // 2
    assert memory.verify(model).max_error < 1e-5
