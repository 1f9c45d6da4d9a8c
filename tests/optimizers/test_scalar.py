"""The scalar rules against torch's optimisers, on gradients that are given: no model, no hooks, float64."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import asgd_settings, sgd_settings
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dualhook.errors import RuleError
from dualhook.optimizers import SGDRule, average_weights, class_name, coefficients, components, register, rule_for
from dualhook.records import AVERAGE, MOMENTUM, VALUE, History, Mark

SHAPE = (3, 2)


class Trajectory:
    """One parameter under a real optimiser, every state kept."""

    def __init__(self, make, settings: dict, gradients: list[Tensor], warm_up: int = 0) -> None:
        self.parameter = nn.Parameter(torch.randn(SHAPE, dtype=torch.float64))
        optimizer = make([self.parameter], **settings)
        self.name = class_name(make)
        rule = rule_for(self.name)
        for _ in range(warm_up):
            self.parameter.grad = torch.randn(SHAPE, dtype=torch.float64)
            optimizer.step()
        self.gradients = gradients
        self.values = [self.parameter.detach().clone()]
        self.states = [copy.deepcopy(dict(optimizer.state.get(self.parameter, {})))]
        hyper: list[dict[str, float]] = []
        numbers: list[dict[str, float]] = []
        marks = []
        for gradient in gradients:
            group = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
            hyper.append({name: float(v) for name, v in group.items() if isinstance(v, (int, float))})
            state = optimizer.state.get(self.parameter) or {}
            numbers.append(rule.state_numbers(state, hyper[-1]))
            marks.append(Mark.FRESH if all(value is None for value in state.values()) else Mark(0))
            self.parameter.grad = gradient.clone()
            optimizer.step()
            self.values.append(self.parameter.detach().clone())
            self.states.append(copy.deepcopy(dict(optimizer.state.get(self.parameter, {}))))
        count = len(gradients)
        self.history = History(
            "p",
            torch.arange(1, count + 1),
            (self.name,) * count,
            {name: torch.tensor([h[name] for h in hyper], dtype=torch.float64) for name in hyper[0]},
            {name: torch.tensor([n[name] for n in numbers], dtype=torch.float64) for name in numbers[0]},
            torch.ones(count, dtype=torch.float64),
            torch.zeros(count, dtype=torch.float64),
            torch.tensor([int(mark) for mark in marks]),
        )

    def rebuilt(self, horizon: int, **asked) -> Tensor:
        found = coefficients(self.history, horizon=horizon, **asked)
        origin = {VALUE: self.values[0], **{k: v for k, v in self.states[0].items() if isinstance(v, Tensor)}}
        total = sum((factor * origin[part] for part, factor in found.origin.items() if part in origin),
                    torch.zeros(SHAPE, dtype=torch.float64))  # fmt: skip
        for c, gradient in zip(found.pattern.tolist(), self.gradients, strict=False):
            total = total - c * gradient
        return total


def gradients(count: int) -> list[Tensor]:
    return [torch.randn(SHAPE, dtype=torch.float64) for _ in range(count)]


OPTIMISERS = st.one_of(
    sgd_settings().map(lambda settings: (torch.optim.SGD, settings)),
    asgd_settings().map(lambda settings: (torch.optim.ASGD, settings)),
)


@given(OPTIMISERS, st.integers(1, 12), st.integers(0, 3), st.data())
def test_weight_at_every_horizon(chosen, steps, warm_up, data):
    run = Trajectory(*chosen, gradients(steps), warm_up)
    horizon = data.draw(st.integers(0, steps))
    assert torch.allclose(run.rebuilt(horizon), run.values[horizon], rtol=1e-12, atol=1e-13)


@given(OPTIMISERS, st.integers(1, 12), st.integers(0, 3), st.data())
def test_optimiser_state_at_every_horizon(chosen, steps, warm_up, data):
    run = Trajectory(*chosen, gradients(steps), warm_up)
    horizon = data.draw(st.integers(1, steps))
    for name in components(run.history, run.states[0]):
        if name == MOMENTUM and run.states[horizon].get(MOMENTUM) is not None:
            true = run.states[horizon][MOMENTUM]
        elif name == AVERAGE:
            true = run.states[horizon][AVERAGE]
        else:
            continue
        assert torch.allclose(run.rebuilt(horizon, component=name), true, rtol=1e-12, atol=1e-13)


@given(sgd_settings(), st.integers(1, 3), st.data())
def test_averaged_model_of_torch(settings, every, data):
    steps = data.draw(st.integers(every, 12))
    for name, decay in (("ema", 0.7), ("ema", 0.999), ("swa", 0.0)):
        run = Trajectory(torch.optim.SGD, settings, gradients(steps))
        holder = nn.Linear(SHAPE[1], SHAPE[0], bias=False).double()
        average = AveragedModel(holder, multi_avg_fn=get_ema_multi_avg_fn(decay) if name == "ema" else None)
        for step in range(every, steps + 1, every):
            holder.weight.data.copy_(run.values[step])
            average.update_parameters(holder)
        weights = average_weights(name, horizon=steps, start=every, every=every, decay=decay)
        assert float(weights.sum()) == pytest.approx(1.0)
        assert torch.allclose(run.rebuilt(steps, weights=weights), average.module.weight, rtol=1e-12, atol=1e-13)


def test_average_that_starts_from_the_untrained_weights():
    run = Trajectory(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, gradients(5))
    true = run.values[0]
    for value in run.values[1:]:
        true = 0.8 * true + 0.2 * value
    weights = average_weights("ema", horizon=5, start=0, decay=0.8)
    assert torch.allclose(run.rebuilt(5, weights=weights), true, rtol=1e-12)


def test_hyper_parameters_that_change_along_the_way():
    parameter = nn.Parameter(torch.randn(SHAPE, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.0)
    given_gradients, values, entries = gradients(9), [parameter.detach().clone()], []
    for k, gradient in enumerate(given_gradients):
        group = optimizer.param_groups[0]
        group["lr"] = 0.1 / (k + 1)
        group["momentum"] = (0.0, 0.9, 0.9, 0.0, 0.0, 0.5, 0.5, 0.0, 0.9)[k]  # the buffer rests and goes on
        group["weight_decay"] = 0.1 * (k % 2)
        fresh = optimizer.state.get(parameter, {}).get("momentum_buffer") is None
        entries.append((dict(group), Mark.FRESH if fresh else Mark(0)))
        parameter.grad = gradient
        optimizer.step()
        values.append(parameter.detach().clone())
    names = ("lr", "momentum", "weight_decay", "dampening", "nesterov", "maximize")
    history = History(
        "p", torch.arange(1, 10), ("torch.optim.sgd.SGD",) * 9,
        {n: torch.tensor([float(group[n]) for group, _ in entries], dtype=torch.float64) for n in names}, {},
        torch.ones(9, dtype=torch.float64), torch.zeros(9), torch.tensor([int(mark) for _, mark in entries]),
    )  # fmt: skip
    for horizon in range(10):
        found = coefficients(history, horizon=horizon)
        total = found.origin.get(VALUE, 0.0) * values[0]
        for c, gradient in zip(found.pattern.tolist(), given_gradients, strict=False):
            total = total - c * gradient
        assert torch.allclose(total, values[horizon], rtol=1e-12, atol=1e-14)


class SGDW(torch.optim.Optimizer):
    """Decoupled decay as published (Loshchilov and Hutter 2019), with torch's momentum."""

    def __init__(self, params, lr=0.1, momentum=0.9, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = p.grad.clone()
                else:
                    state["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)
                p.add_(state["momentum_buffer"], alpha=-group["lr"])


def test_decoupled_decay():
    register(SGDW, SGDRule(decoupled=True))
    run = Trajectory(SGDW, {}, gradients(8))
    for horizon in range(9):
        assert torch.allclose(run.rebuilt(horizon), run.values[horizon], rtol=1e-12, atol=1e-14)


def test_one_rule_after_another():
    """A parameter that SGD trains and ASGD goes on with: each entry by its own rule."""
    first = Trajectory(torch.optim.SGD, {"lr": 0.1}, gradients(3))
    second = Trajectory(torch.optim.ASGD, {"lr": 0.05, "lambd": 0.1}, gradients(4))
    names = set(first.history.hyper) | set(second.history.hyper)
    nan = {
        3: torch.full((3,), float("nan"), dtype=torch.float64),
        4: torch.full((4,), float("nan"), dtype=torch.float64),
    }
    joined = History(
        "p", torch.arange(1, 8), first.history.optimizer + second.history.optimizer,
        {n: torch.cat([first.history.hyper.get(n, nan[3]), second.history.hyper.get(n, nan[4])]) for n in names},
        {n: torch.cat([nan[3], second.history.state[n]]) for n in second.history.state},
        torch.ones(7, dtype=torch.float64), torch.zeros(7), torch.cat([first.history.mark, second.history.mark]),
    )  # fmt: skip
    found = coefficients(joined, horizon=7)
    total = found.origin[VALUE] * first.values[0]
    for c, gradient in zip(found.pattern.tolist(), first.gradients + second.gradients, strict=True):
        total = total - c * gradient
    alone = coefficients(second.history, horizon=4)
    true = alone.origin[VALUE] * first.values[3]
    for c, gradient in zip(alone.pattern.tolist(), second.gradients, strict=True):
        true = true - c * gradient
    assert torch.allclose(total, true, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("polyak", {}), "unknown average 'polyak'"),
        (("ema", {"decay": 1.5}), "expected a number from 0 to 1"),
        (("swa", {"start": 9}), "expected a start from 0 to 5"),
        (("swa", {"every": 0}), "every >= 1"),
    ],
)
def test_settings_that_make_no_average(arguments, words):
    name, settings = arguments
    with pytest.raises(RuleError, match=words):
        average_weights(name, horizon=5, **settings)


def test_an_optimiser_whose_rule_is_gone():
    run = Trajectory(torch.optim.SGD, {"lr": 0.1}, gradients(2))
    run.history = History(**{**run.history.__dict__, "optimizer": ("some.package.Sophia",) * 2})
    with pytest.raises(RuleError, match=r"'p' was trained by some\.package\.Sophia, whose rule was registered when"):
        run.rebuilt(2)
