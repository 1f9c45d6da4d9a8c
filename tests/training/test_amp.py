"""Autocast in bfloat16 and float16, and loss scaling with steps that are skipped."""

from __future__ import annotations

import math

import pytest
import torch
from elsewhere import placed
from training.ways import (
    EPOCHS,
    PATTERNS,
    POSITIONS,
    SAMPLES,
    STEPS,
    assert_exact,
    close,
    loader,
    loss_of,
    net,
    plain,
    rows_of,
    trained,
)

MAKERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "fused sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
    "fused adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
def test_autocast(dtype, scaled):
    def loop(model, track):
        optimizer, data = MAKERS["sgd"](model), loader()
        scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=256.0, enabled=scaled)
        for _ in range(EPOCHS):
            for x, y in track(data):
                optimizer.zero_grad()
                with torch.autocast(torch.get_default_device().type, dtype):
                    loss = loss_of(model(x), y)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

    outcome = trained(loop)
    memory = outcome.memory
    assert not any(memory.verify()["inexact_steps"])
    assert memory.steps == STEPS
    rows = rows_of(memory, "first")
    assert rows.key.dtype == rows.output_grad.dtype == dtype  # what the layer was computed in
    assert torch.equal(rows.sample.double(), rows.key[:, -1].double() * 16)
    # the products of these rows are rounded to the narrow dtype by torch, and not by us
    assert memory.verify().max_error < torch.finfo(dtype).eps
    assert len(rows_of(memory, "head")) == PATTERNS


@pytest.mark.parametrize("name", MAKERS)
def test_loss_scaling_with_skipped_steps(name):
    def loop(model, track):
        optimizer, data = MAKERS[name](model), loader()
        scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=1024.0, growth_interval=3)
        skipped = 0
        for epoch in range(EPOCHS):
            # not the first step: torch's fused SGD would go on with a momentum that nobody has set
            for number, (x, y) in enumerate(track(data)):
                optimizer.zero_grad()
                loss = loss_of(model(x), y) * (math.inf if (epoch, number) in ((0, 1), (1, 1)) else 1.0)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                before = scaler.get_scale()
                scaler.update()
                skipped += scaler.get_scale() < before
        assert skipped == 2

    outcome = trained(loop)
    assert_exact(outcome, patterns=PATTERNS - 2 * SAMPLES // 3 * POSITIONS, steps=STEPS - 2)


def test_loss_scaling_is_the_plain_run():
    def loop(model, track):
        optimizer, data = MAKERS["sgd"](model), loader()
        scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=1024.0)
        for _ in range(EPOCHS):
            for x, y in track(data):
                optimizer.zero_grad()
                scaler.scale(loss_of(model(x), y)).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
                scaler.step(optimizer)
                scaler.update()

    outcome = trained(loop)
    assert_exact(outcome, patterns=PATTERNS, steps=STEPS)
    with placed():
        whole = net()
        plain(whole, lambda data: data)
    assert close(outcome.model, whole, 1e-5)
