"""What a step will write, told before training, is what it writes; and asking changes nothing."""

from __future__ import annotations

import pytest
import torch
from capture.test_kinds import CASES, network

import dualhook


@pytest.mark.parametrize("case", CASES)
def test_an_estimate_is_what_a_step_records_and_changes_nothing(case):
    model, x = network(case), CASES[case][1]()
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    table = recorder.estimate(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with recorder.batch(samples=range(len(x))):
        model(x).square().sum().backward()
    optimizer.step()
    memory = recorder.close()
    assert memory.verify()["exact"].all()
    recorded = {use for layer in memory.layers for use in memory.uses(layer)}
    estimated = dict(zip(table["layer"], table["patterns"], strict=True))
    assert recorded == {layer for layer, patterns in estimated.items() if patterns}
    for layer in recorded:
        stored = [part for segment in memory._store.segments for part in stored_in(memory, segment, layer)]
        written = sum(part.patterns(len(part.step)) for part in stored)
        assert 0 < written <= estimated[layer]  # rows whose output gradient is zero are not written


def stored_in(memory, segment, layer):
    return memory._store._stored(segment, [memory._spec(layer)])
