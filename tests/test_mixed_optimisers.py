"""Several optimisers in one model, as people train today: Muon for matrices, AdamW for the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from third_party import Lion
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.optimizers import LionRule, register
from dualhook.query import Replay

I, H, O = 12, 16, 5
register(Lion, LionRule())


def network(dtype):
    return nn.Sequential(nn.Linear(I, H), nn.Tanh(), nn.Linear(H, H), nn.Tanh(), nn.Linear(H, O)).to(dtype)


def trained(split, dtype=torch.float64, steps=25, path=None, clip=None, batches=1):
    model = network(dtype)
    optimizers = split(model)
    recorder = dualhook.instrument(model, path, verbose=False)
    for step in range(steps):
        recorder.batch(torch.arange(8) + 8 * (step % 4))
        for optimizer in optimizers:
            optimizer.zero_grad()
        for _ in range(batches):
            F.cross_entropy(model(torch.randn(8, I, dtype=dtype)), torch.randint(0, O, (8,))).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
    return model, recorder.close()


def muon_and_adamw(model):
    return [
        torch.optim.Muon([model[0].weight, model[2].weight], lr=0.01),
        torch.optim.AdamW([model[4].weight, *(p for p in model.parameters() if p.ndim == 1)], lr=0.01),
    ]


def a_different_one_for_every_layer(model):
    return [
        torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adam([model[2].weight], lr=0.01, weight_decay=0.01),
        Lion([model[2].bias], lr=0.01),
        torch.optim.RMSprop(model[4].parameters(), lr=0.01, momentum=0.5),
    ]


def test_every_question_with_a_different_rule_for_every_layer(tmp_path):
    model, memory = trained(a_different_one_for_every_layer, path=tmp_path / "run")
    assert memory.info()["rule"].tolist() == ["sgd", "adam, lion", "rmsprop"]
    assert memory.info()["kind"].tolist() == ["scalar", "elementwise", "elementwise"]
    assert memory.info()["cost"].tolist() == ["one pass", "a replay", "a replay"]
    report = memory.verify()
    assert report.max_error < 1e-9
    assert report["exact"].all()
    x = torch.randn(4, I).double()
    attention = memory.attend(model, x)
    assert (attention.explained["explained"] > 1 - 1e-9).all()
    assert len(attention.top(3)) == 3 * 3 * 4
    assert torch.allclose(memory.dual(model)(x), model(x), rtol=1e-9)
    without = memory.without([3])
    whole = memory.state_dict()
    for layer in memory.layers:
        of_sample = attention.sum_by("sample", layers=layer).where(sample=3, query=0)["contribution"]
        asked = attention._layers[layer]
        change = (whole[f"{layer}.weight"] - without[f"{layer}.weight"]) @ asked.query[0, 0]
        change = change + whole[f"{layer}.bias"] - without[f"{layer}.bias"]
        assert float(of_sample[0]) == pytest.approx(float(change @ asked.direction[0, 0]), rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(("clip", "batches"), [(None, 1), (0.1, 1), (0.1, 3)])
def test_muon_beside_adamw_up_to_muons_rounding(clip, batches):
    model, memory = trained(muon_and_adamw, torch.float32, clip=clip, batches=batches)
    assert memory.info()["rule"].tolist() == ["muon, adam", "muon, adam", "adam"]
    assert memory.info()["kind"].tolist() == ["matrix, elementwise", "matrix, elementwise", "elementwise"]
    assert memory.verify()["error"][2] < 1e-5
    assert (memory.verify()["error"][:2] < 1e-2).all()  # torch iterates in bfloat16; the replay may round otherwise
    x = torch.randn(6, I)
    attention = memory.attend(model, x)
    receipt = attention.receipt
    assert (receipt.where(layer="4")["explained"] > 1 - 1e-4).all()
    assert (receipt["explained"] > 0.9).all()
    parts = attention.parts
    assert np.abs(parts.where(part="rounding")["contribution"]).max() > 0
    for layer in ("0", "2"):  # with the rounding part named, little is left open
        for query in range(6):
            of = {row["part"]: row["contribution"] for row in parts.where(layer=layer, query=query)}
            assert abs(of["residual"]) < 0.05 * (abs(of["patterns"]) + abs(of["rounding"]))


@pytest.mark.parametrize("widths", [(12, 16), (16, 12)])  # the matrix acts from the smaller side
def test_muons_rows_are_sealed_beside_the_memory(tmp_path, widths, monkeypatch):
    model = nn.Sequential(nn.Linear(I, widths[0]), nn.Tanh(), nn.Linear(*widths), nn.Tanh(), nn.Linear(widths[1], O))
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False)
    optimizers = muon_and_adamw(model)
    for _ in range(20):
        model.zero_grad()
        F.cross_entropy(model(torch.randn(8, I)), torch.randint(0, O, (8,))).backward()
        for optimizer in optimizers:
            optimizer.step()
    memory = recorder.close()

    def everything(x, **options):
        attention = memory.attend(model, x, target=1, **options)
        tables = [attention.sum_by("step"), attention.parts, attention.top(200, by="abs_contribution")]
        return tables, attention.receipt["explained"]

    for x in (torch.randn(3, I), torch.randn(5, I)):
        (sums, parts, top), explained = everything(x)
        (sealed_sums, sealed_parts, sealed_top), sealed_explained = everything(x, cache=True)
        assert np.allclose(sums["contribution"], sealed_sums["contribution"], rtol=1e-4, atol=1e-6)
        assert np.allclose(sums["weight"], sealed_sums["weight"])
        assert parts["part"].tolist() == sealed_parts["part"].tolist()
        assert np.allclose(parts["contribution"], sealed_parts["contribution"], rtol=1e-4, atol=1e-5)
        assert np.allclose(top["contribution"], sealed_top["contribution"], rtol=1e-4, atol=1e-6)
        assert np.allclose(explained, sealed_explained, atol=1e-4)
    replayed = []
    through = Replay._through

    def counted(self, begin, end):
        replayed.append([share.weight.ndim for share in self._shares])
        yield from through(self, begin, end)

    monkeypatch.setattr(Replay, "_through", counted)
    memory = dualhook.load(tmp_path / "run")
    everything(torch.randn(7, I), cache=True)  # another question: of Muon's layers only the biases, which are AdamW's
    assert [1] in replayed
    assert sum(2 in ndims for ndims in replayed) == 1  # the last layer's weight is AdamW's


def test_a_fitted_optimiser_beside_exact_ones():
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    def split(model):
        return [
            Own(model[0].parameters(), lr=0.1, momentum=0.9),
            torch.optim.Adam([*model[2].parameters(), *model[4].parameters()], lr=0.01),
        ]

    with pytest.warns(dualhook.InexactWarning, match="no exact rule is known"):
        model, memory = trained(split)
    assert memory.info()["exact"].tolist() == [False, True, True]
    assert memory.verify()["exact"].tolist() == [False, True, True]
    assert memory.verify().max_error < 1e-9  # momentum and one rate: the fit finds them
    assert (memory.attend(model, torch.randn(3, I).double()).explained["explained"] > 1 - 1e-9).all()
