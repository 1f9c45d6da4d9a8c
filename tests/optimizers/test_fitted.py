"""The fit of optimisers without a rule: what it must find exactly, and what it must say of the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualhook

I, O = 12, 5


class Unruled(torch.optim.Optimizer):
    """Momentum and decoupled decay, each gradient entry scaled by a fixed row and column: no rule knows it."""

    def __init__(self, params, lr=0.05, momentum=0.0, weight_decay=0.0, scaled=False):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "scaled": scaled})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.mul_(group["momentum"]).add_(p.grad)
                update = mean.clone()
                if group["scaled"] and p.ndim == 2:
                    rows, columns = (torch.linspace(0.5, 2.0, n, dtype=p.dtype) for n in p.shape)
                    update *= rows[:, None] * columns.flip(0)
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
        return loss


class Hidden(torch.optim.Adam):
    """Adam under a name of its own."""

    def step(self, closure=None):
        return super().step(closure)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(I, 16), nn.Tanh(), nn.Linear(16, O)).double()


def trained(make, steps=40, path=None, **settings):
    """A recorded run: the model, its memory, and the weights after every step."""
    options = {name: settings.pop(name) for name in ("max_bytes",) if name in settings}
    closure = settings.pop("closure", False)
    model = network()
    weights = [copy.deepcopy(model.state_dict())]
    recorder = dualhook.instrument(model, path, verbose=False, **options)
    optimizer = make(model.parameters(), **settings)
    with pytest.warns(dualhook.InexactWarning, match="no exact rule is known for .*: what each of its steps does"):
        for _ in range(steps):
            x, y = torch.randn(8, I).double(), torch.randint(0, O, (8,))

            def loss(x=x, y=y):
                optimizer.zero_grad()
                found = F.cross_entropy(model(x), y)
                found.backward()
                return found

            if closure:
                optimizer.step(loss)
            else:
                loss()
                optimizer.step()
            weights.append(copy.deepcopy(model.state_dict()))
    return model, recorder.close(), weights


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({}, 1e-10),
        ({"momentum": 0.9}, 1e-10),
        ({"momentum": 0.9, "weight_decay": 0.5}, 1e-10),
        ({"momentum": 0.9, "closure": True}, 1e-10),
        ({"scaled": True}, 1e-3),  # the vectors are found by iteration
        ({"scaled": True, "momentum": 0.8}, 5e-3),  # and their means over the momentum's reach are not the vectors
        ({"scaled": True, "momentum": 0.9, "weight_decay": 0.5}, 5e-3),
    ],
)
def test_what_the_fit_can_express_it_finds(settings, tolerance):
    model, memory, weights = trained(Unruled, **settings)
    assert memory.verify().max_error < tolerance
    assert not memory.verify()["exact"].any()
    attention = memory.attend(model, torch.randn(3, I).double())
    assert (attention.explained["explained"] > 1 - tolerance).all()
    for step in (1, 17):
        left = (memory.weight("0", step=step) - weights[step]["0.weight"]).norm()
        assert left < tolerance * weights[step]["0.weight"].norm()


def test_the_momentum_is_found_where_no_hyper_parameter_names_it():
    class Heavy(Unruled):
        def __init__(self, params):
            super().__init__(params)
            self.param_groups[0]["momentum_"] = self.param_groups[0].pop("momentum")

        def step(self, closure=None):
            self.param_groups[0]["momentum"] = 0.9
            super().step(closure)
            del self.param_groups[0]["momentum"]

    model, memory, _ = trained(Heavy)
    assert (memory.attend(model, torch.randn(3, I).double()).explained["explained"] > 0.99).all()


def test_what_it_cannot_express_is_residual():
    model, memory, weights = trained(Hidden, lr=0.01)
    attention = memory.attend(model, torch.randn(3, I).double())
    explained = attention.explained["explained"]
    assert (explained < 0.99).all()
    assert (explained > 0.1).all()
    parts = attention.parts
    assert (abs(parts.where(part="residual")["contribution"]) > 1e-3).any()
    for query in range(3):
        listed = attention.sum_by("step", layers="2").where(query=query)["contribution"].sum()
        own = parts.where(query=query, layer="2", part="patterns")["contribution"]
        assert listed == pytest.approx(float(own[0]), rel=1e-9)
    true = (weights[-1]["0.weight"] - weights[0]["0.weight"]).norm()
    assert 0.05 < (memory.weight("0") - weights[-1]["0.weight"]).norm() / true < 0.9
    assert memory.info()["rule"].tolist() == ["fitted", "fitted"]


def test_every_contribution_is_the_value_of_its_sample():
    torch.manual_seed(1)
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = Hidden(model.parameters(), lr=0.01)
    with pytest.warns(dualhook.InexactWarning):
        for step in range(20):
            recorder.batch(torch.arange(4) + 4 * (step % 3))
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(4, I).double()), torch.randint(0, O, (4,))).backward()
            optimizer.step()
    memory = recorder.close()
    x = torch.randn(1, I).double()
    whole, hidden = memory.state_dict(), model[:2](x).detach()
    for row in memory.attend(model, x, target=2, layers="2").sum_by("sample"):
        without = memory.without(int(row["sample"]))
        weight, bias = (whole[f"2.{name}"] - without[f"2.{name}"] for name in ("weight", "bias"))
        assert row["contribution"] == pytest.approx(float(hidden @ weight[2] + bias[2]), rel=1e-8, abs=1e-12)
    twin = memory.dual(model)
    rebuilt = copy.deepcopy(model)
    rebuilt.load_state_dict(whole)
    assert torch.allclose(twin(x), rebuilt(x), rtol=1e-8)


def test_folding_and_averages(tmp_path):
    _, memory, _ = trained(Unruled, steps=80, path=tmp_path / "run", momentum=0.9, max_bytes=30_000)
    assert memory._store.first_step > 0
    assert memory.verify().max_error < 2e-3
    _, memory, weights = trained(Unruled, momentum=0.9, scaled=True)
    true = sum(w["0.weight"] for w in weights[1:]) / (len(weights) - 1)
    assert torch.allclose(memory.averaged("swa").weight("0"), true, atol=2e-3)


def test_training_is_bit_identical():
    def run(record):
        torch.manual_seed(3)
        model = network()
        recorder = dualhook.instrument(model, verbose=False) if record else None
        optimizer = Hidden(model.parameters(), lr=0.01, foreach=True)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, I).double()), torch.randint(0, O, (8,))).backward()
            optimizer.step()
        if recorder:
            recorder.close()
        return model.state_dict()

    bare = run(False)
    with pytest.warns(dualhook.InexactWarning):
        recorded = run(True)
    assert all(torch.equal(bare[name], recorded[name]) for name in bare)


def test_an_optimiser_that_changes_weights_outside_gradients_is_told():
    class Noisy(Unruled):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.add_(torch.randn_like(p), alpha=0.01)

    model, memory, _ = trained(Noisy)
    assert memory.verify().max_error > 0.01
    assert (memory.attend(model, torch.randn(3, I).double()).explained["explained"] < 0.99).all()
