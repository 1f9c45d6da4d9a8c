"""Models on a CUDA device, and rows that reach the host later than their backward pass."""

from __future__ import annotations

import pytest
import torch
from elsewhere import DEVICE, elsewhere
from torch import nn
from torch.nn import functional as F
from training.ways import (
    BATCH,
    CLASSES,
    PATTERNS,
    STEPS,
    WIDTH,
    assert_exact,
    loader,
    loss_of,
    net,
    plain,
    rows_of,
    same,
    sgd,
    trained,
)

import dualhook

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def with_dropped_micro_batches(model, track):
    optimizer = sgd(model)
    for x, y in track(loader()):
        loss_of(model(x), y).backward()
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        x.zero_()  # free to be written to, once the backward pass is over
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("limit", [0, 2**30])
def test_rows_that_come_late_are_those_of_the_plain_run(monkeypatch, limit):
    monkeypatch.setenv("DUALHOOK_DEVICE", "elsewhere")
    monkeypatch.setattr("dualhook.recorder.staging.STAGED_BYTES", limit)
    assert_exact(trained(plain), patterns=PATTERNS, steps=STEPS)
    assert_exact(trained(with_dropped_micro_batches), patterns=PATTERNS // 2, steps=STEPS // 2)


class Words(nn.Module):
    """A tied head as wide as it takes for its output gradients to be computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2048, 8)
        self.head = nn.Linear(8, 2048, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids).tanh())


@pytest.mark.parametrize("settings", [{}, {"head_grads": 4}, {"head_grads": "dense"}, {"dtype": torch.float16}])
def test_words_elsewhere(settings):
    """Rows of every form, which are those of the same training here."""
    found = []
    for device in (torch.device("cpu"), DEVICE):
        torch.manual_seed(0)
        ids = torch.randint(0, 2048, (3, 12, 40))
        with elsewhere():
            with device:
                model = Words()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            recorder = dualhook.instrument(model, layers="all", on_error="raise", verbose=False, **settings)
            for batch in recorder.track(list(ids)):
                optimizer.zero_grad()
                batch = batch.to(device)
                loss = F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
                loss.backward()
                optimizer.step()
            coverage, memory = recorder.coverage, recorder.close()
        rows = [rows_of(memory, use) for use in memory.uses(memory.layers[0])]
        found.append((list(coverage["note"]), memory.patterns(memory.layers[0]), rows))
    (notes, count, here), (other_notes, other_count, there) = found
    assert (notes, count) == (other_notes, other_count)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.sample, other.sample)
        assert torch.allclose(one.key, other.key, rtol=1e-5, atol=1e-9)
        assert torch.allclose(one.output_grad, other.output_grad, rtol=1e-5, atol=1e-9)


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


@cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("fused", [False, True])
def test_no_step_waits_for_a_device(fused):
    """As far as torch can tell; but for the first ones, and snapshots of the optimiser's state."""
    model = net().cuda()
    recorder = dualhook.instrument(model, verbose=False, on_error="raise")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    x, y = torch.randn(20, BATCH, WIDTH).cuda(), torch.randint(0, CLASSES, (20, BATCH)).cuda()
    recorder._book.snapshots.after = lambda *args, **settings: None
    for step in range(20):
        torch.cuda.set_sync_debug_mode("default" if step < 3 else "error")
        optimizer.zero_grad()
        loss_of(model(x[step]), y[step]).backward()
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    memory = recorder.close()
    assert memory.steps == 20
    assert memory.verify(model)["exact"].all()
