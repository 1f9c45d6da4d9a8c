"""Cosines do not depend on how the rows lie in files: several processes' rows of a step are in several."""

from __future__ import annotations

import torch
from held import Held, I, O
from hypothesis import given
from hypothesis import strategies as st

from dualhook.query.cosine import cosine_scores
from dualhook.query.gradients import Gradient
from dualhook.records import LayerSpec, Rows

SAMPLES = 4


class Source(Held):
    def count(self, layer: str) -> int:
        return len(self.rows)

    def blocks(self, layer: str, *, last_step: int, block_rows: int, first_step: int = 0):
        blocks = super().blocks(layer, last_step=last_step, block_rows=block_rows)
        yield from (own for rows in blocks if len(own := rows.where(rows.step >= first_step)))


@given(st.data())
def test_files_that_share_a_step_are_one(data):
    steps = sorted(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=15)))
    count = len(steps)
    sample = torch.tensor(data.draw(st.lists(st.integers(0, SAMPLES - 1), min_size=count, max_size=count)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    key, output_grad = (torch.randn(count, width, generator=generator) for width in (I, O))
    rows = Rows(key, output_grad, torch.tensor(steps), sample, torch.zeros_like(sample))
    spec = LayerSpec("layer", I, O, "weight", None)
    query, direction = (torch.randn(2, 1, width, generator=generator) for width in (I, O))
    asked = Gradient(spec, query, direction, None)
    cuts = data.draw(st.lists(st.integers(0, count), max_size=4))
    (found,) = cosine_scores(Source(rows, cuts), [asked], (1, 3), lambda rows: rows.sample, torch.arange(SAMPLES))

    expected = torch.zeros(2, SAMPLES, dtype=torch.float64)
    for step in set(steps):
        for one in range(SAMPLES):
            own = (rows.step == step) & (sample == one)
            gradient = (output_grad[own].T @ key[own]).double()
            if own.any():
                met = -torch.einsum("qpo,oi,qpi->q", direction.double(), gradient, query.double())
                expected[:, one] += met / gradient.norm()
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
