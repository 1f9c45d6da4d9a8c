"""Gradient accumulation: half batches, one step."""

from __future__ import annotations

from elsewhere import placed
from training.ways import BATCH, EPOCHS, PATTERNS, STEPS, assert_exact, close, loader, loss_of, net, plain, sgd, trained


def micro_batches(model, track):
    optimizer = sgd(model)
    data = loader(batch_size=BATCH // 2)
    for number, (x, y) in enumerate(pair for _ in range(EPOCHS) for pair in track(data)):
        (loss_of(model(x), y) / 2).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()


def test_two_half_batches_are_one_batch():
    outcome = trained(micro_batches)
    assert_exact(outcome, patterns=PATTERNS, steps=STEPS)
    with placed():
        whole = net()
        plain(whole, lambda data: data)
    assert close(outcome.model, whole, 1e-5)
