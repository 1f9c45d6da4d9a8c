"""Gradient checkpointing, reentrant and not: the layers run twice, their rows count once and keep their sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training.ways import PATTERNS, POSITIONS, STEPS, assert_exact, loader, loss_of, plain, rows_of, same, sgd, trained

import dualhook


class Checkpointed(nn.Module):
    """Runs ``inner`` in a checkpoint, or in a checkpoint within a checkpoint."""

    def __init__(self, inner: nn.Module, reentrant: bool, nested: bool = False) -> None:
        super().__init__()
        self.inner, self.reentrant, self.nested = inner, reentrant, nested

    def forward(self, x):
        x = x.requires_grad_()  # reentrant checkpoints need it

        def again(x):
            return checkpoint(self.inner, x, use_reentrant=self.reentrant)

        return checkpoint(again, x, use_reentrant=self.reentrant) if self.nested else again(x)


def two_forwards_first(model, track):
    """A loop that is a batch ahead: the backward pass comes after the forward pass of the next batch."""
    optimizer = sgd(model)
    waiting = []
    for x, y in track(loader()):
        waiting.append(loss_of(model(x), y))
        if len(waiting) == 2:
            optimizer.zero_grad()
            waiting.pop(0).backward()
            waiting.pop(0).backward()
            optimizer.step()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_it_is_the_plain_run(reentrant, nested):
    outcome = trained(plain, wrap=lambda model: Checkpointed(model, reentrant, nested))
    assert_exact(outcome, patterns=PATTERNS, steps=STEPS)
    assert same(outcome.model, trained(plain).model)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_pass_after_the_next_forward_pass_keeps_the_samples(reentrant, nested):
    outcome = trained(two_forwards_first, wrap=lambda model: Checkpointed(model, reentrant, nested))
    assert_exact(outcome, patterns=8 * POSITIONS, steps=1)


def test_a_recomputation_of_unknown_origin_has_no_sample():
    class Again(torch.autograd.Function):
        """Another one's checkpoint, whose first pass does not call the layer: nothing tells its batch."""

        @staticmethod
        def forward(context, x, run):
            context.run = run
            context.save_for_backward(x)
            with torch.no_grad():
                return x.clone()

        @staticmethod
        def backward(context, gradient):
            (x,) = context.saved_tensors
            with torch.enable_grad():
                context.run(x.detach().requires_grad_()).sum().backward()
            return gradient, None

    model = nn.Linear(3, 2)
    recorder, optimizer = dualhook.instrument(model, verbose=False), sgd(model)
    with recorder.batch(samples=[0, 1]):
        loss = Again.apply(torch.randn(2, 3, requires_grad=True), model).sum()
    with recorder.batch(samples=[2, 3]):
        loss.backward()
        optimizer.step()
    memory = recorder.close()
    assert memory.verify().max_error < 1e-5
    assert rows_of(memory, "(model)").sample.tolist() == [-1, -1]
