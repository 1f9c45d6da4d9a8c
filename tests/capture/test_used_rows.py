"""Which rows of output gradients are not exactly zero, against a look at every number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dualhook
from dualhook.capture import used_rows

NUMBERS = (0.0, -0.0, 1.0, -(2.0**-20), math.nan, math.inf)


@given(
    st.integers(0, 9), st.sampled_from([0, 1, 3, 70, 200]), st.integers(0, 2**20), st.sampled_from([0.0, 0.01, 0.5]),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]), st.booleans(),
)  # fmt: skip
def test_they_are_those_with_a_number(count, width, seed, share, dtype, turned):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(2, len(NUMBERS), (count, width), generator=generator)
    chosen *= torch.rand(count, width, generator=generator) < share
    values = torch.tensor(NUMBERS, dtype=dtype)[chosen]
    values = values.T.contiguous().T if turned else values
    found, expected = used_rows(values), [row for row in range(count) if any(v != 0 for v in values[row].tolist())]
    assert (list(range(count)) if found is None else found.tolist()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_torch_holds_negated(dtype):
    values = torch._neg_view(torch.tensor([[0.0, 0.0], [0.0, 2.0], [1.0, 0.0]], dtype=dtype))
    assert used_rows(values).tolist() == [1, 2]


def test_a_gradient_that_comes_back_negated():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.real, self.imaginary, self.out = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            z = torch.complex(self.real(x), self.imaginary(x))
            return self.out((z.conj() * (1 + 2j)).imag)

    torch.manual_seed(0)
    model = Complex()
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    memory = recorder.close()
    assert memory.steps == 3
    assert memory.verify().max_error < 1e-5
