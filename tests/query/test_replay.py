"""Replays in segments, under any budget, against one that keeps everything; and against torch's own run."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualhook

STEPS = 23


def trained(tmp_path, make=torch.optim.Adam, **settings):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    weights = [{name: value.clone() for name, value in model.state_dict().items()}]
    with dualhook.instrument(model, tmp_path / "run", verbose=False) as recorder:
        optimizer = make(model.parameters(), **settings)
        for step in range(STEPS):
            recorder.batch(torch.arange(4) + 4 * (step % 5))
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(4, 6).double()), torch.randint(0, 3, (4,))).backward()
            optimizer.step()
            weights.append({name: value.clone() for name, value in model.state_dict().items()})
    return model, recorder.close(), weights


@pytest.mark.parametrize("budget", [1, 2_000, 20_000])
def test_any_budget_gives_the_same_answers(tmp_path, monkeypatch, budget):
    monkeypatch.setattr("dualhook.query.replay.BLOCK_BYTES", 100)  # blocks of a few output units
    model, memory, _ = trained(tmp_path, weight_decay=0.01, lr=0.01)
    x = torch.randn(3, 6).double()
    whole = memory.attend(model, x)
    small = dualhook.load(tmp_path / "run")
    small.replay_bytes = budget
    attention = small.attend(model, x)
    for one, other in ((whole.top(5), attention.top(5)), (whole.sum_by("sample"), attention.sum_by("sample"))):
        for name in one.columns:
            if name == "layer":
                assert (one[name] == other[name]).all()
            else:
                assert torch.allclose(torch.from_numpy(one[name]), torch.from_numpy(other[name]), rtol=1e-9), name
    assert small.verify().max_error < 1e-12


def test_contributions_parts_and_output_are_one_sum(tmp_path):
    model, memory, _ = trained(tmp_path, weight_decay=0.1, lr=0.01)
    x = torch.randn(3, 6).double()
    attention = memory.attend(model, x, target=1)
    parts = attention.parts
    assert set(parts["part"]) == {"origin", "patterns", "weight-decay", "residual"}
    for query in range(3):
        for layer in attention.layers:
            of = {row["part"]: row["contribution"] for row in parts.where(query=query, layer=layer)}
            listed = attention.sum_by("step", layers=layer).where(query=query)["contribution"].sum()
            assert listed == pytest.approx(of["patterns"], rel=1e-9)
            assert abs(of["residual"]) < 1e-10
            assert abs(of["weight-decay"]) > 1e-6
    logits = model(x)[:, 1] - model[2].bias[1]
    last = [sum(row["contribution"] for row in parts.where(query=q, layer="2")) for q in range(3)]
    assert torch.allclose(torch.tensor(last, dtype=torch.float64), logits + model[2].bias[1], rtol=1e-10)


def test_contributions_are_the_values_of_each_pattern(tmp_path):
    """Every single contribution by finite removal: the weights without one sample's values."""
    model, memory, _ = trained(tmp_path, lr=0.01)
    x = torch.randn(1, 6).double()
    attention = memory.attend(model, x, target=0, layers="2")
    by_sample = attention.sum_by("sample")
    whole = memory.state_dict()
    hidden = model[1](model[0](x)).detach()
    for row in by_sample:
        without = memory.without(int(row["sample"]))
        weight, bias = (whole[f"2.{name}"] - without[f"2.{name}"] for name in ("weight", "bias"))
        assert row["contribution"] == pytest.approx(float(hidden @ weight[0] + bias[0]), rel=1e-8, abs=1e-12)


def test_every_question_at_an_earlier_step(tmp_path):
    model, memory, weights = trained(tmp_path, lr=0.01, amsgrad=True)
    for step in (0, 1, 7, STEPS):
        for name, value in memory.state_dict(step=step).items():
            assert torch.allclose(value, weights[step][name], rtol=1e-10, atol=1e-13)
    model.load_state_dict(weights[7])
    x = torch.randn(2, 6).double()
    assert (memory.attend(model, x, step=7).explained["explained"] > 1 - 1e-9).all()
    twin = memory.dual(model)  # of the last step
    model.load_state_dict(weights[STEPS])
    assert torch.allclose(twin(x), model(x), rtol=1e-10)


def test_average_of_the_weights_under_adam(tmp_path):
    _, memory, weights = trained(tmp_path, lr=0.01, weight_decay=0.1)
    true = {name: sum(w[name] for w in weights[1:]) / STEPS for name in weights[0]}
    for name, value in memory.averaged("swa").state_dict().items():
        assert torch.allclose(value, true[name], rtol=1e-10)


def test_folding_under_adam_keeps_every_answer(tmp_path):
    model = nn.Linear(6, 3).double()
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False, max_bytes=6_000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 6).double()), torch.randint(0, 3, (8,))).backward()
        optimizer.step()
    memory = recorder.close()
    assert memory._store.first_step > 0
    assert memory.verify().max_error < 1e-9
    assert memory.verify()["exact"].all()
    assert (memory.attend(model, torch.randn(2, 6).double()).explained["explained"] > 1 - 1e-9).all()


def test_adam_after_sgd_on_the_same_parameters(tmp_path):
    model = nn.Linear(6, 3).double()
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False)
    values = []
    for make, settings in (
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
        (torch.optim.Adam, {"lr": 0.01}),
        (torch.optim.SGD, {"lr": 0.1}),
    ):
        optimizer = make(model.parameters(), **settings)
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 6).double()), torch.randint(0, 3, (8,))).backward()
            optimizer.step()
            values.append(model.weight.detach().clone())
    memory = recorder.close()
    assert memory.verify().max_error < 1e-10
    for step in (3, 5, 8, 12):
        assert torch.allclose(
            memory.weight("", step=step) if "" in memory.layers else memory.weight(memory.layers[0], step=step),
            values[step - 1],
        )


def test_recording_that_begins_in_the_middle_of_an_adam_run(tmp_path):
    model = nn.Linear(6, 3).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 6).double()), torch.randint(0, 3, (8,))).backward()
            optimizer.step()

    steps(7)
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False)
    steps(9)
    memory = recorder.close()
    assert memory.verify().max_error < 1e-11
    assert memory.verify()["exact"].all()


def test_mixed_families_in_one_layer(tmp_path):
    model = nn.Linear(6, 3).double()
    optimizers = [torch.optim.Adam([model.weight], lr=0.01), torch.optim.SGD([model.bias], lr=0.1, momentum=0.9)]
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False)
    for _ in range(9):
        F.cross_entropy(model(torch.randn(8, 6).double()), torch.randint(0, 3, (8,))).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    memory = recorder.close()
    assert memory.verify().max_error < 1e-11
    attention = memory.attend(model, torch.randn(2, 6).double())
    assert (attention.explained["explained"] > 1 - 1e-9).all()
    assert memory.info()["rule"].tolist() == ["adam, sgd"]
