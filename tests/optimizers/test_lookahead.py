"""Lookahead's synchronisation: fitted to weights, and in the scalar pass, against the recursion written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from dualhook.optimizers import LOOKAHEAD, coefficients, fit_synchronization
from dualhook.records import SLOW, VALUE, History, Mark

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32)}


def rounded(values, dtype):
    return values.to(dtype).double()


@given(
    st.sampled_from(list(EPS)), st.sampled_from([0.05, 0.3, 0.5, 0.8, 0.95]), st.floats(1e-4, 1.0), st.integers(1, 300)
)
def test_alpha_is_found(dtype, alpha, distance, count):
    torch.manual_seed(count)
    slow = rounded(torch.randn(count), dtype)
    before = rounded(slow + distance * torch.randn(count), dtype)
    after = (before.to(dtype) * alpha).add_(slow.to(dtype), alpha=1 - alpha).double()
    assume((before - slow).norm() > 1e4 * EPS[dtype] * before.norm())
    assert fit_synchronization(before, after, slow, EPS[dtype]) == alpha


@pytest.mark.parametrize("factor", [1.01, 0.99, 0.0, -1.0, float("nan")])
def test_another_change_is_none(factor):
    torch.manual_seed(0)
    slow, before = torch.randn(2, 20, dtype=torch.float64)
    assert fit_synchronization(before, before * factor, slow, 2e-16) is None
    assert fit_synchronization(before, slow, slow, 2e-16) is None  # the earlier weights put back
    assert fit_synchronization(before, before + 0.5 * (before - slow), slow, 2e-16) is None  # away from them


def test_weights_that_are_the_slow_ones_already():
    before = torch.randn(20, dtype=torch.float64)
    assert fit_synchronization(before, before * (1 + 1e-16), before, 2.3e-16) == 1.0
    assert fit_synchronization(before, before * (1 + 1e-12), before, 2.3e-16) is None


@given(st.integers(1, 14), st.integers(1, 4), st.floats(0.1, 0.9), st.booleans(), st.integers(0, 5))
def test_the_scalar_pass_goes_through_synchronisations(steps, k, alpha, reads_all, folded):
    """SGD with momentum and decay under Lookahead, from any step on: the weights before it are the origin's."""
    torch.manual_seed(steps)
    parameter = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.1)
    values, buffers, gradients, entries = [parameter.detach().clone()], [None], [], []
    slow_step = 0
    for step in range(1, steps + 1):
        gradients.append(torch.randn(3, 2, dtype=torch.float64))
        parameter.grad = gradients[-1].clone()
        optimizer.step()
        entries.append((step, "torch.optim.sgd.SGD", 0.0, 0.0, step == 1))
        if step % k == 0:
            with torch.no_grad():
                parameter.copy_(alpha * parameter + (1 - alpha) * values[slow_step])
            entries.append((step, LOOKAHEAD, alpha, float(slow_step), False))
            slow_step = step
        values.append(parameter.detach().clone())
        buffers.append(optimizer.state[parameter]["momentum_buffer"].clone())
    begins = min(folded, steps - 1)
    used = [entry for entry in entries if entry[0] > begins]
    step, name, alphas, slows, fresh = zip(*used, strict=True)
    sgd = torch.tensor([one != LOOKAHEAD for one in name], dtype=torch.float64)
    history = History(
        "p", torch.tensor(step), name,
        {"lr": 0.1 * sgd, "momentum": 0.9 * sgd, "weight_decay": 0.1 * sgd,
         "alpha": torch.tensor(alphas, dtype=torch.float64), "slow_step": torch.tensor(slows, dtype=torch.float64)},
        {}, torch.ones(len(used), dtype=torch.float64), torch.zeros(len(used)),
        torch.tensor([int(Mark.FRESH) if one else 0 for one in fresh]),
    )  # fmt: skip
    weights = torch.rand(steps + 1, dtype=torch.float64) if reads_all else None
    if weights is not None:
        weights[:begins] = 0
    found = coefficients(history, horizon=steps, weights=weights, begins=begins)
    older = begins // k * k
    origin = {VALUE: values[begins], SLOW: values[older], "momentum_buffer": buffers[begins]}
    total = sum((factor * origin[part] for part, factor in found.origin.items()), torch.zeros(3, 2).double())
    for (at, what, *_), c in zip(used, found.pattern.tolist(), strict=True):
        assert what != LOOKAHEAD or c == 0
        total = total - c * gradients[at - 1]
    true = values[-1] if weights is None else sum(w * value for w, value in zip(weights, values, strict=True))
    assert torch.allclose(total, true, rtol=1e-11, atol=1e-12)
