"""Packed output gradients are the ones that autograd gave, or the largest of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dualhook.packing import Softmax, pack_largest, pack_softmax

SHARPNESS = (0.02, 0.3, 3.0)  # standard deviation of a weight: from flat to saturated probabilities


def rows(
    seed: int, count: int, outputs: int, sharp: float, *, dtype=torch.float64, bias=False, weighted=False, known=0.0
):
    """Keys, weight, output gradients of a cross-entropy and targets; of ``known`` rows the target is the likeliest."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(count, 24, generator=generator, dtype=dtype)
    weight = sharp * torch.randn(outputs, 24 + bias, generator=generator, dtype=dtype)
    logits = F.linear(key, weight[:, :24], weight[:, 24] if bias else None)
    target = torch.randint(0, outputs, (count,), generator=generator)
    target = torch.where(torch.rand(count, generator=generator) < known, logits.argmax(1), target)
    classes = torch.rand(outputs, generator=generator, dtype=dtype) + 0.1 if weighted else None
    logits.requires_grad_()
    F.cross_entropy(logits, target, weight=classes, reduction="sum").backward()
    assert logits.grad is not None
    return key, weight, logits.grad, target


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**20),
    count=st.integers(1, 40),
    outputs=st.integers(2, 700),
    sharp=st.sampled_from(SHARPNESS),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    bias=st.booleans(),
    weighted=st.booleans(),
    known=st.sampled_from([0.0, 0.5, 1.0]),
    start=st.integers(0, 10**6),
)
def test_softmax_rows_are_computed_again(seed, count, outputs, sharp, dtype, bias, weighted, known, start):
    key, weight, grads, target = rows(
        seed, count, outputs, sharp, dtype=dtype, bias=bias, weighted=weighted, known=known
    )
    there = (grads != 0).any(1)
    key, grads, target = key[there], grads[there], target[there]
    if not len(key):
        return
    packed = pack_softmax(key, grads, weight, start)
    assert packed is not None
    assert torch.equal(packed.target.long(), target)
    tolerance = {torch.float64: 1e-13, torch.float32: 3e-5}[dtype]  # a logit's rounding, in an exponent
    assert (packed.dense(key) - grads).abs().amax() <= tolerance
    some = torch.randperm(outputs)[: min(outputs, 7)]
    assert (packed.dense(key, some) - grads[:, some]).abs().amax() <= tolerance


def smoothed(grads, target):
    return grads - 0.1 * grads.abs().amax() / grads.shape[1]


def one_entry(grads, target):
    """Of the last row, where the softmax puts much."""
    grads = grads.clone()
    grads[-1, grads[-1].argmax()] *= 1.01
    return grads


def sharper(grads, target):
    grads = grads.clone()
    other = torch.ones_like(grads, dtype=torch.bool)
    other[torch.arange(len(grads)), target] = False
    return torch.where(other, grads.abs() ** 1.05, grads)


def one_row(grads, target):
    grads = grads.clone()
    grads[3] = torch.randn_like(grads[3]) * grads[3].abs().amax()
    return grads


def mixed(logits, target):
    """Two-hot targets, of mixup."""
    return 0.7 * F.cross_entropy(logits, target) + 0.3 * F.cross_entropy(logits, target.flip(0))


def masked(logits, target):
    """The last words pad a vocabulary."""
    hidden = torch.arange(logits.shape[1]) >= logits.shape[1] - 40
    return F.cross_entropy(logits.masked_fill(hidden, -1e9), target % 500)


def distilled(logits, target):
    teacher = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape).to(logits).sin().softmax(1)
    return 0.5 * F.cross_entropy(logits, target) + 0.5 * F.kl_div(logits.log_softmax(1), teacher, reduction="batchmean")


LOSSES = {
    "smoothed": lambda logits, target: F.cross_entropy(logits, target, label_smoothing=0.1),
    "colder": lambda logits, target: F.cross_entropy(0.5 * logits, target),
    "capped": lambda logits, target: F.cross_entropy(3 * torch.tanh(logits / 3), target),
    "mixed": mixed,
    "masked": masked,
    "distilled": distilled,
    "focal": lambda logits, target: (
        (1 - logits.softmax(1).gather(1, target[:, None])).square() * -logits.log_softmax(1).gather(1, target[:, None])
    ).mean(),
}


@pytest.mark.parametrize("sharp", [0.02, 0.3])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outputs", [600, 8000])
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "focal"])
def test_other_losses_are_told(name, outputs, autocast, sharp):
    generator = torch.Generator().manual_seed(0)
    key, weight = torch.randn(128, 64, generator=generator), sharp * torch.randn(outputs, 64, generator=generator)
    target = torch.randint(0, outputs, (128,), generator=generator)

    def packed(loss, start: int):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            logits = F.linear(key, weight)
        logits = logits.detach().requires_grad_()
        (1024 * loss(logits.float(), target)).backward()
        return pack_softmax(key.to(logits.dtype), logits.grad, weight, start)

    starts = (0, 7, 1234)
    assert all(packed(F.cross_entropy, start) is not None for start in starts)
    if name == "capped" and sharp == 0.02:  # of small logits nothing is capped
        return
    assert all(packed(LOSSES[name], start) is None for start in starts)


def test_a_focal_loss_weights_rows_only():
    """The gradient of a function of the target's probability is a multiple of the same row."""
    key, weight, _, target = rows(0, 30, 600, 0.3)
    logits = (key @ weight.T).requires_grad_()
    LOSSES["focal"](logits, target).backward()
    packed = pack_softmax(key, logits.grad, weight, 0)
    assert packed is not None
    assert (packed.dense(key) - logits.grad).abs().amax() < 1e-13


@pytest.mark.parametrize("spoil", [smoothed, one_entry, sharper, one_row, lambda grads, target: -grads])
def test_what_is_no_softmax_is_not_taken_for_one(spoil):
    key, weight, grads, target = rows(0, 30, 600, 0.3)
    assert pack_softmax(key, grads, weight, 0) is not None
    assert pack_softmax(key, spoil(grads, target), weight, 0) is None


def test_other_weights_are_told():
    key, weight, grads, _ = rows(0, 30, 600, 0.3, dtype=torch.float32)
    assert pack_softmax(key, grads, weight * 1.001, 0) is None


def test_autocast_is_as_near_as_its_rounding():
    key, weight, *_ = rows(1, 64, 600, 0.1, dtype=torch.float32)
    target = torch.randint(0, 600, (64,))
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(key, weight).requires_grad_()
        F.cross_entropy(logits.float(), target).backward()
    grads = logits.grad
    packed = pack_softmax(key.bfloat16(), grads, weight, 0)
    assert isinstance(packed, Softmax)
    assert (packed.dense(key.bfloat16()) - grads).norm() < 4e-3 * grads.norm()


@given(seed=st.integers(0, 2**20), count=st.integers(0, 20), outputs=st.integers(1, 200), kept=st.integers(1, 60))
def test_the_largest_are_kept(seed, count, outputs, kept):
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(count, outputs, generator=generator)
    packed, key = pack_largest(grads, kept), torch.zeros(count, 1)
    dense = packed.dense(key)
    left = torch.where(dense == grads, grads, 0.0)
    assert torch.equal(dense, left)  # a number is whole or missing
    assert ((dense != 0).sum(1) == min(kept, outputs)).all()
    missing = torch.where(dense == 0, grads, 0.0).abs().amax(1) if count else torch.zeros(0)
    smallest = torch.where(dense == 0, float("inf"), dense.abs()).amin(1) if count else torch.zeros(0)
    assert (missing <= smallest).all()
    some = torch.arange(0, outputs, 2)
    assert torch.equal(packed.dense(key, some), dense[:, some])
