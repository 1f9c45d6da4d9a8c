"""What the curvature is made of, against every sample's gradient made whole."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dualhook.query.curvature import moments_of, norms_of
from dualhook.records import Rows

SLOTS, COLUMNS, OUTPUTS = 3, 4, 2


@given(st.data())
def test_patterns_of_a_sample_and_step_are_one_gradient(data):
    count, has_slots = data.draw(st.integers(1, 12)), data.draw(st.booleans())
    step, sample, slot = (
        torch.tensor(data.draw(st.lists(st.integers(0, most), min_size=count, max_size=count)))
        for most in (1, 3, SLOTS - 1)
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    key, output_grad = (torch.randn(count, width, generator=generator) for width in (COLUMNS, OUTPUTS))
    rows = Rows(key, output_grad, step, sample, torch.zeros_like(step), slot=slot if has_slots else None)
    slots = SLOTS if has_slots else 1
    gradients: dict[tuple[int, int], torch.Tensor] = {}
    for one in range(count):
        own = torch.zeros(OUTPUTS, slots, COLUMNS)
        own[:, int(slot[one]) if has_slots else 0] = output_grad[one][:, None] * key[one]
        which = (int(step[one]), int(sample[one]))
        gradients[which] = gradients.get(which, 0) + own

    squares, group = norms_of(rows)
    expected = [gradients[int(step[one]), int(sample[one])].double().square().sum() for one in range(count)]
    assert len(squares) == len(gradients)
    assert torch.allclose(squares[group], torch.stack(expected), rtol=1e-5, atol=1e-6)
    moments = torch.stack([own.flatten(1) for own in gradients.values()]).square().sum(0)
    assert torch.allclose(moments_of(rows, slots, COLUMNS), moments, rtol=1e-5, atol=1e-6)
