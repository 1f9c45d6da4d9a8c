"""Questions on other devices, in other dtypes, and to memories of unusual sizes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from elsewhere import elsewhere
from held import cases
from hypothesis import assume, given
from runs import recorded_shortly
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import dualhook
from dualhook.errors import LayerError
from dualhook.query import LayerQuery
from dualhook.query.parts import SealedRows
from dualhook.query.scores import Scores
from dualhook.records import FactorVectors


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "memory"
    return recorded_shortly(path, partial(torch.optim.SGD, lr=0.1), 10), path


def tables(recorded, device) -> list:
    model, path = recorded
    attention = dualhook.load(path).attend(model, torch.ones(2, 5), device=device)
    return [attention.top(4), attention.top(4, by="weight", largest=False), attention.sum_by("step"), attention.receipt]


def test_the_processor_by_name_is_the_default(recorded):
    for one, other in zip(tables(recorded, None), tables(recorded, torch.device("cpu")), strict=True):
        assert all(one[name].tolist() == other[name].tolist() for name in one.columns)


def assert_alike(tables, others):
    for one, other in zip(tables, others, strict=True):
        for name in one.columns:
            if one[name].dtype.kind == "f":
                assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6)
            elif name not in ("pattern", "sample", "step"):  # nearly equal ones may change places
                assert one[name].tolist() == other[name].tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_gives_the_same_answers(recorded):
    assert_alike(tables(recorded, None), tables(recorded, "cuda"))


def test_elsewhere_gives_the_same_answers(recorded):
    with elsewhere() as device:
        there = tables(recorded, device)
    assert_alike(tables(recorded, None), there)


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "factor", "sealed"])
@given(case=cases())
def test_every_product_is_made_where_it_was_asked_for(kind, slots, case):
    """torch's fake tensors know their device, and refuse to meet one of another, without there being any."""
    rows, made_of, query, direction, _, _ = case
    assume(len(rows))
    if slots > 1:
        rows = replace(rows, slot=torch.zeros(len(rows), dtype=torch.int64))
    steps = len(made_of.weight)
    if kind == "factor":
        made_of = replace(made_of, factor=FactorVectors(torch.ones(steps, 2), torch.ones(steps, 3 * slots)))
    if kind == "sealed":
        made_of = replace(made_of, sealed=SealedRows("left", rows.output_grad, 0))
    slot = torch.zeros(query.shape[:2], dtype=torch.int64) if slots > 1 else None
    here = LayerQuery(made_of, query, direction, direction, slot, present=torch.ones(query.shape[:2]))
    shapes = {name: getattr(Scores(here, rows), name).shape for name in ("weight", "contribution")}
    mode = FakeTensorMode()
    fake = partial(fake_of, mode)
    made_of = replace(
        made_of, weight=fake(made_of.weight), bias=fake(made_of.bias),
        factor=None if made_of.factor is None else made_of.factor.each(fake),
        sealed=None if made_of.sealed is None else replace(made_of.sealed, values=fake(made_of.sealed.values)),
    )  # fmt: skip
    there = LayerQuery(made_of, fake(query), fake(direction), fake(direction), fake(slot), present=fake(here.present))
    with mode:
        scores = Scores(there.on(torch.device("cuda")), rows.each(fake))
        for name in ("weight", "contribution"):
            assert getattr(scores, name).device.type == "cuda"
            assert getattr(scores, name).shape == shapes[name]
        assert scores.output().device.type == "cuda"
        assert scores.rows.key.device.type == "cpu"


def fake_of(mode, values):
    return None if values is None else mode.from_tensor(values)


@pytest.mark.parametrize("device", ["cuda:99", "nowhere", "meta", 3.5])
def test_a_device_that_is_not_there_is_refused(recorded, device):
    with pytest.raises(dualhook.DualHookError, match=r"device=.*: torch cannot compute there"):
        tables(recorded, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_query_of_another_dtype_is_answered_as_one_of_the_rows(recorded, dtype):
    model, path = recorded
    other = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    other.load_state_dict(model.state_dict())
    x = torch.tensor([[1.0, -2.0, 0.5, 0.0, 4.0]])
    memory = dualhook.load(path)
    found = memory.attend(other.to(dtype), x.to(dtype), layers="0").top(100, by="weight")
    true = memory.attend(model, x, layers="0").top(100, by="weight")
    assert found["pattern"].tolist() == true["pattern"].tolist()
    assert found["weight"].tolist() == true["weight"].tolist()  # x is the same number in all dtypes


def test_more_patterns_asked_for_than_there_are(recorded):
    model, path = recorded
    memory = dualhook.load(path)
    top = memory.attend(model, torch.ones(2, 5)).top(10**6)
    assert len(top) == 2 * 2 * memory.patterns("0")
    assert sorted(top.where(query=1, layer="0")["pattern"].tolist()) == list(range(40))


def test_a_memory_without_patterns_says_so(tmp_path):
    model = nn.Linear(3, 2)
    with dualhook.instrument(model, tmp_path / "memory", verbose=False):
        pass
    with pytest.raises(LayerError, match="holds no patterns"):
        dualhook.load(tmp_path / "memory").attend(model, torch.ones(1, 3))


def test_no_pattern_before_the_first_step(recorded):
    _, path = recorded
    memory = dualhook.load(path)
    origin = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    origin.load_state_dict(memory.state_dict(step=0))
    attention = memory.attend(origin, torch.ones(2, 5), step=0)
    assert len(attention.top(3)) == 0
    assert len(attention.sum_by("sample")) == 0
    assert attention.explained["explained"].tolist() == [1.0] * 4
