"""Every replayed rule against torch's optimiser, on gradients that are given: no model, no hooks, float64.

A rule joins the suite by one line in ``REPLAYED`` of ``runs.py``.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import REPLAYED, muon_settings
from third_party import Lion
from torch import Tensor, nn

from dualhook.optimizers import (
    Adjoint,
    Entry,
    LinearStep,
    LionRule,
    ParameterState,
    advance,
    apply,
    class_name,
    pass_by,
    rule_for,
)

DRAWN = st.sampled_from(REPLAYED).flatmap(lambda pair: st.tuples(st.just(pair[0]), pair[1]))
SHAPES = st.sampled_from([(3, 2), (2, 3), (4,), (1, 1)])


class Trajectory:
    """One parameter under a real optimiser: every value, every state, every ledger entry."""

    def __init__(self, make, settings, gradients, *, warm_up=0, rates=None, dtype=torch.float64) -> None:
        shape = gradients[0].shape
        self.parameter = nn.Parameter(torch.randn(shape, dtype=dtype))
        optimizer = make([self.parameter], **settings)
        self.rule = rule_for(class_name(make))
        for _ in range(warm_up):
            self.parameter.grad = torch.randn(shape, dtype=dtype)
            optimizer.step()
        self.gradients = gradients
        self.values, self.states, self.entries = [self.value()], [self.state(optimizer)], []
        for k, gradient in enumerate(gradients):
            group = optimizer.param_groups[0]
            if rates is not None:
                group["lr"] = group["lr"] * rates[k]
            hyper = numbers(group) | self.rule.hyper_numbers(group)
            held = optimizer.state.get(self.parameter) or {}
            self.entries.append(Entry(hyper, self.rule.state_numbers(held, hyper), 1.0, not held))
            self.parameter.grad = gradient.clone()
            optimizer.step()
            self.values.append(self.value())
            self.states.append(self.state(optimizer))

    def value(self) -> Tensor:
        return self.parameter.detach().clone()

    def state(self, optimizer) -> dict[str, Tensor]:
        held = copy.deepcopy(dict(optimizer.state.get(self.parameter, {})))
        return {name: value for name, value in held.items() if isinstance(value, Tensor) and value.ndim}

    def replayed(self, units=slice(None)) -> tuple[ParameterState, list[LinearStep], list[Tensor]]:
        """The end, the linear maps, and the weight before every step."""
        at = ParameterState(self.values[0][units].clone(), {n: v[units].clone() for n, v in self.states[0].items()})
        steps, weights = [], []
        for gradient, entry in zip(self.gradients, self.entries, strict=True):
            weights.append(at.weight.clone())
            steps.append(advance(self.rule, at, gradient[units], entry, whole=True))
        return at, steps, weights

    def summed(self, steps, weights, horizon, readout=None) -> Tensor:
        """The weight after ``horizon``, or a weighted sum of weights, as the sum of its parts."""
        side = self.rule.side(self.parameter)
        adjoint, total = Adjoint(0.0), torch.zeros_like(self.values[0])
        for k in range(horizon - 1, -1, -1):
            adjoint.read(float(k + 1 == horizon) if readout is None else readout[k + 1])
            entry, at_step = self.entries[k], adjoint.weight
            values, scale = adjoint.back(steps[k], fresh=entry.fresh)
            gradient = self.rule.gradient_scale(entry) * self.gradients[k] + self.rule.decay(entry) * weights[k]
            total -= apply(values, gradient * scale, side)
            if steps[k].rest is not None:
                total -= at_step * steps[k].rest
        adjoint.read(float(horizon == 0) if readout is None else readout[0])
        total += adjoint.weight * self.values[0]
        buffer = self.states[0].get(self.rule.buffer or "")
        return total if buffer is None else total - apply(adjoint.buffer, buffer, side)


def numbers(group) -> dict[str, float]:
    found = {}
    for name, value in group.items():
        if name != "params":
            several = enumerate(value) if isinstance(value, (tuple, list)) else ()
            found |= {f"{name}.{k}": float(v) for k, v in several if isinstance(v, (int, float))}
            if isinstance(value, (int, float)):
                found[name] = float(value)
    return found


@st.composite
def gradients(draw: st.DrawFn) -> list[Tensor]:
    shape, count = draw(SHAPES), draw(st.integers(1, 12))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    found = [torch.randn(shape, dtype=torch.float64) for _ in range(count)]
    for k in draw(st.sets(st.integers(0, count - 1), max_size=2)):  # a step without gradient
        found[k] = torch.zeros(shape, dtype=torch.float64)
    return found


@given(DRAWN, gradients(), st.integers(0, 4), st.data())
def test_state_and_weight_as_torch_has_them(chosen, given_gradients, warm_up, data):
    rates = [data.draw(st.sampled_from([1.0, 1.0, 0.5, 2.0, 0.0])) for _ in given_gradients]
    run = Trajectory(*chosen, given_gradients, warm_up=warm_up, rates=rates)
    at, _, _ = run.replayed()
    assert torch.allclose(at.weight, run.values[-1], rtol=1e-11, atol=1e-12)
    for name, value in run.states[-1].items():
        assert torch.allclose(at.tensors[name], value, rtol=1e-11, atol=1e-12), name


@given(DRAWN, gradients(), st.integers(0, 4), st.data())
def test_the_parts_sum_to_the_weight_at_every_horizon(chosen, given_gradients, warm_up, data):
    rates = [data.draw(st.sampled_from([1.0, 1.0, 0.5, 2.0, 0.0])) for _ in given_gradients]
    run = Trajectory(*chosen, given_gradients, warm_up=warm_up, rates=rates)
    _, steps, weights = run.replayed()
    for horizon in {0, len(steps), data.draw(st.integers(0, len(steps)))}:
        assert torch.allclose(run.summed(steps, weights, horizon), run.values[horizon], rtol=1e-9, atol=1e-11)


@given(DRAWN, gradients())
def test_an_average_of_the_weights(chosen, given_gradients):
    run = Trajectory(*chosen, given_gradients)
    _, steps, weights = run.replayed()
    readout = torch.rand(len(steps) + 1).tolist()
    true = sum(r * value for r, value in zip(readout, run.values, strict=True))
    assert torch.allclose(run.summed(steps, weights, len(steps), readout), true, rtol=1e-9, atol=1e-11)


@given(DRAWN, gradients())
def test_a_block_of_output_units_alone(chosen, given_gradients):
    run = Trajectory(*chosen, given_gradients)
    if run.rule.separable:
        units = slice(0, max(1, given_gradients[0].shape[0] // 2))
        at, _, _ = run.replayed(units)
        assert torch.allclose(at.weight, run.values[-1][units], rtol=1e-11, atol=1e-12)


@given(DRAWN, gradients())
def test_what_a_rule_is_given_stays_and_what_it_returns_is_its_own(chosen, given_gradients):
    run = Trajectory(*chosen, given_gradients)
    gradient, entry = given_gradients[0], run.entries[0]
    state = run.rule.start(run.values[0], entry)
    kept = gradient.clone(), run.values[0].clone()
    step = run.rule.linearize(run.values[0], gradient, state, entry)
    assert torch.equal(gradient, kept[0])
    assert torch.equal(run.values[0], kept[1])
    for part in (step.factor, step.buffer_factor, step.rest):
        if isinstance(part, Tensor):
            assert part.data_ptr() not in {value.data_ptr() for value in (*state.values(), gradient, run.values[0])}


@pytest.mark.parametrize("make", [make for make, _ in REPLAYED if make not in (torch.optim.Adafactor, Lion)])
@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"differentiable": False}])
def test_variants_of_torch(make, options):
    run = Trajectory(make, options, [torch.randn(3, 2, dtype=torch.float64) for _ in range(8)])
    at, _, _ = run.replayed()
    assert torch.allclose(at.weight, run.values[-1], rtol=1e-11, atol=1e-12)


@given(muon_settings(), st.sampled_from([(6, 4), (4, 6), (5, 5)]), st.integers(1, 8), st.integers(0, 3))
def test_muon_up_to_its_own_rounding(settings, shape, count, warm_up):
    torch.manual_seed(count)
    run = Trajectory(
        torch.optim.Muon, settings, [torch.randn(shape) for _ in range(count)], warm_up=warm_up, dtype=torch.float32
    )
    at, steps, weights = run.replayed()
    size = run.values[-1].norm()
    assert (at.weight - run.values[-1]).norm() <= 1e-2 * size  # bfloat16 may round the other way
    assert (run.summed(steps, weights, count) - at.weight).norm() <= 1e-5 * size
    update = sum((weights[k] - run.values[k + 1]).norm() for k in range(count))
    rest = sum(step.rest.norm() for step in steps)
    assert rest <= 0.1 * update


def test_lion_refuses_what_it_does_not_know():
    assert LionRule().refuses({"lr": 0.1, "cautious_factor": 1.0}) == ""
    assert LionRule().refuses({"cautious_factor": 0.0}) == "cautious_factor=0"


class Signed(torch.optim.Optimizer):
    """An optimiser of the user's, which CONTRIBUTING.md writes a rule for."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                state["mean"].mul_(group["beta"]).add_(p.grad.abs(), alpha=1 - group["beta"])
                p.addcdiv_(p.grad, state["mean"] + 1e-3, value=-group["lr"])


def test_a_rule_of_the_users_own():
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    exec(example, {"Signed": Signed})
    run = Trajectory(Signed, {}, [torch.randn(3, 2, dtype=torch.float64) for _ in range(9)])
    assert run.rule.name == "signed"
    at, steps, weights = run.replayed()
    assert torch.allclose(at.weight, run.values[-1], rtol=1e-12)
    assert torch.allclose(run.summed(steps, weights, 9), run.values[-1], rtol=1e-11)


@given(muon_settings(), gradients().filter(lambda own: own[0].ndim == 2))
def test_passing_a_step_by_leaves_the_buffer_that_taking_it_does(settings, gradients):
    run = Trajectory(torch.optim.Muon, settings, gradients)
    taken, passed = (ParameterState(run.values[0].clone(), {}) for _ in range(2))
    for gradient, entry in zip(run.gradients, run.entries, strict=True):
        advance(run.rule, taken, gradient, entry, whole=False)
        assert pass_by(run.rule, passed, gradient, entry)
    assert passed.tensors.keys() == taken.tensors.keys()
    for name, value in taken.tensors.items():
        assert torch.allclose(passed.tensors[name], value, rtol=1e-12, atol=1e-15)
