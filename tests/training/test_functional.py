"""``torch.func``: a functional call trains like any other; transforms give gradients back and leave no rows."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from training.ways import PATTERNS, STEPS, assert_exact, loader, loss_of, net, plain, same, sgd, trained

import dualhook


class Functional(torch.nn.Module):
    """Calls ``inner`` with its own parameters, handed over."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return functional_call(self.inner, dict(self.inner.named_parameters()), (x,))


def test_a_functional_call_is_the_plain_run():
    outcome = trained(plain, wrap=Functional)
    assert_exact(outcome, patterns=PATTERNS, steps=STEPS)
    assert same(outcome.model, trained(plain).model)


def test_a_call_with_other_parameters_is_none_of_the_layers_business():
    def loop(model, track):
        optimizer = sgd(model)
        others = {name: torch.nn.Parameter(p.detach() + 1) for name, p in model.named_parameters()}
        for x, y in track(loader()):
            optimizer.zero_grad()
            loss_of(functional_call(model, others, (x,)), y).backward()
            loss_of(model(x), y).backward()
            optimizer.step()

    assert_exact(trained(loop), patterns=PATTERNS // 2, steps=STEPS // 2)


def test_gradients_of_transforms_leave_no_rows():
    def loop(model, track):
        optimizer = sgd(model)
        for x, y in track(loader()):
            own = {name: p.detach() for name, p in model.named_parameters()}

            def loss(parameters, x, y):
                return loss_of(functional_call(model, parameters, (x,)), y)

            grad(loss)(own, x, y)
            vmap(grad(loss), in_dims=(None, 0, 0))(own, x, y)  # one per sample
            vmap(model)(x)
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()

    assert_exact(trained(loop), patterns=PATTERNS // 2, steps=STEPS // 2)


def test_a_step_on_gradients_of_a_transform_is_marked():
    model = net()
    recorder, optimizer = dualhook.instrument(model, verbose=False), sgd(model)
    x, y = next(iter(loader()))
    own = {name: p.detach() for name, p in model.named_parameters()}
    found = grad(lambda parameters: loss_of(functional_call(model, parameters, (x,)), y))(own)
    for name, parameter in model.named_parameters():
        parameter.grad = found[name]
    with pytest.warns(dualhook.InexactWarning, match="first"):
        optimizer.step()
    memory = recorder.close()
    assert list(memory.verify()["inexact_steps"]) == [1, 1]


def through_vmap(model, x, y):
    return loss_of(vmap(model)(x), y)


def through_derivatives(model, x, y):
    return vmap(grad(lambda one: model(one).tanh().sum()))(x).square().mean()


@pytest.mark.parametrize("loss", [through_vmap, through_derivatives])
def test_a_backward_pass_through_a_transform_is_marked(loss):
    model, bare = net(), net()
    recorder = dualhook.instrument(model, verbose=False)
    x, y = next(iter(loader()))
    for each in (model, bare):
        optimizer = sgd(each)
        loss(each, x, y).backward()
        if each is bare:
            optimizer.step()
        else:
            with pytest.warns(dualhook.InexactWarning):
                optimizer.step()
    assert same(model, bare)
    assert list(recorder.close().verify()["inexact_steps"]) == [1, 1]


class Interrupted(torch.nn.Module):
    """Uses its parameter in a function, and a hand on the keyboard comes between."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 5))
        self.interrupts = False

    def forward(self, x):
        y = F.linear(x, self.weight)
        if self.interrupts:
            self.interrupts = False
            raise KeyboardInterrupt
        return y


class Learning(torch.nn.Module):
    """Fits something else on the way, by an optimiser of its own."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        other = torch.nn.Linear(5, 5)
        optimizer = sgd(other)
        with torch.enable_grad():
            other(x.detach()).square().mean().backward()
        optimizer.step()
        return F.linear(x, self.weight)


def test_another_optimiser_steps_in_a_forward_pass():
    def loop(model, track):
        optimizer = sgd(model)
        for x, _ in track(loader()):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(Learning())

    outcome = trained(loop, make=make)
    assert outcome.memory.verify(outcome.model).max_error < 1e-5
    assert outcome.memory.patterns("0") == PATTERNS // 2


@pytest.mark.parametrize("goes_on", [True, False])
def test_an_interrupted_forward_pass_leaves_torch_as_it_was(goes_on):
    linear, model = F.linear, torch.nn.Sequential(Interrupted())
    recorder, optimizer = dualhook.instrument(model, layers="all", verbose=False), sgd(model)

    def train(steps):
        for x, _ in recorder.track(list(loader())[:steps]):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    train(1)
    model[0].interrupts = True
    with pytest.raises(KeyboardInterrupt):
        train(1)
    assert F.linear is not linear  # as the interruption has left it
    if goes_on:
        train(2)
        assert F.linear is linear
    memory = recorder.close()
    assert F.linear is linear
    assert memory.verify(model).max_error < 1e-5
    assert not any(memory.verify()["inexact_steps"])
    assert memory.steps == (3 if goes_on else 1)
