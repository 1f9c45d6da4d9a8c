"""What replayed patterns contribute to queries: every way of computing it against the sum as it is written down."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dualhook.query.parts import ReplayShare
from dualhook.query.scoring import ReplayScores
from dualhook.records import Rows

O, I, N = 6, 5, 7


def share(outputs: int, inputs: int) -> ReplayShare:
    weight = torch.zeros(outputs, inputs, dtype=torch.float64)
    return ReplayShare("weight", 0, weight, {}, {}, torch.ones(1), torch.float64)


def rows_of(key: Tensor, output_grad: Tensor, slot: Tensor | None = None) -> Rows:
    no = torch.zeros(len(key), dtype=torch.int64)
    return Rows(key, output_grad, no, no, no, slot=slot)


def thinned(size: tuple[int, ...], share: float, generator: torch.Generator) -> Tensor:
    """Numbers of which about so large a share is not zero."""
    kept = torch.rand(size, generator=generator) < share
    return torch.randn(size, generator=generator, dtype=torch.float64) * kept


TOGETHER = st.sampled_from([0, 2**14])
SHARES = st.sampled_from([0.0, 0.2, 0.6, 1.0])


@given(st.integers(1, 4), st.integers(1, 4), SHARES, SHARES, st.integers(0, 1000), st.booleans(), TOGETHER)
def test_contributions_are_the_sum_over_all_entries(queries, positions, inputs, outputs, seed, in_blocks, together):
    generator = torch.Generator().manual_seed(seed)
    query, direction = (
        thinned((queries, positions, size), kept, generator) for size, kept in ((I, inputs), (O, outputs))
    )
    key, output_grad = thinned((N, I), 0.7, generator), thinned((N, O), 0.7, generator)
    coefficient = torch.randn(O, I, generator=generator, dtype=torch.float64)
    found = torch.zeros(queries, N, dtype=torch.float64)
    for units in (slice(0, 2), slice(2, O)) if in_blocks else (slice(0, O),):
        with mock.patch("dualhook.query.scoring.TOGETHER", together):
            block = ReplayScores(query, direction).of(share(O, I), units, torch.float64)
        found += block.of(rows_of(key, output_grad), coefficient[units], 0.5, "elementwise")
    expected = -0.5 * torch.einsum("qpo,no,oi,ni,qpi->qn", direction, output_grad, coefficient, key, query)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 3), st.integers(1, 4), SHARES, st.integers(0, 1000))
def test_the_same_where_keys_fill_slots(queries, positions, outputs, seed):
    slots, generator = 3, torch.Generator().manual_seed(seed)
    query, direction = (
        thinned((queries, positions, I), 1.0, generator),
        thinned((queries, positions, O), outputs, generator),
    )
    slot = torch.randint(0, slots, (queries, positions), generator=generator)
    key, output_grad = thinned((N, I), 1.0, generator), thinned((N, O), 1.0, generator)
    filled = torch.randint(0, slots, (N,), generator=generator)
    coefficient = torch.randn(O, slots, I, generator=generator, dtype=torch.float64)
    block = ReplayScores(query, direction, slot, slots).of(share(O, slots * I), slice(0, O), torch.float64)
    found = block.of(rows_of(key, output_grad, filled), coefficient.reshape(O, -1), 2.0, "elementwise")
    meets = slot[:, :, None] == filled
    own = coefficient[:, filled]  # [o, n, i]
    expected = -2.0 * torch.einsum("qpn,qpo,no,oni,ni,qpi->qn", meets.double(), direction, output_grad, own, key, query)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 3), st.integers(1, 4), SHARES, st.integers(0, 1000), st.booleans())
def test_a_bias_answers_every_position(queries, positions, outputs, seed, scaled):
    generator = torch.Generator().manual_seed(seed)
    query, direction = torch.zeros(queries, positions, I).double(), thinned((queries, positions, O), outputs, generator)
    output_grad = thinned((N, O), 0.7, generator)
    constant = torch.randn(N, generator=generator, dtype=torch.float64) if scaled else None
    coefficient = torch.randn(O, generator=generator, dtype=torch.float64)
    found = torch.zeros(queries, N, dtype=torch.float64)
    bias = ReplayShare("bias", 0, torch.zeros(O, dtype=torch.float64), {}, {}, torch.ones(1), torch.float64)
    rows = replace(rows_of(torch.zeros(N, I).double(), output_grad), constant=constant)
    for units in (slice(0, 2), slice(2, O)):
        block = ReplayScores(query, direction).of(bias, units, torch.float64)
        found += block.of(rows, coefficient[units], 0.5, "elementwise")
    ones = torch.ones(N, dtype=torch.float64) if constant is None else constant
    expected = -0.5 * torch.einsum("qpo,no,o,n->qn", direction, output_grad, coefficient, ones)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
