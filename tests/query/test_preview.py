"""Previews against exact replays: the same where every step has a snapshot, close where few have."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.data import load_fashion_mnist_subset
from dualhook.errors import RuleError

I, O = 6, 3
PREVIEWED = [
    (torch.optim.Adam, {"lr": 0.01}),
    (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "maximize": True}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (torch.optim.RAdam, {"lr": 0.01}),
    (torch.optim.Adamax, {"lr": 0.01}),
    (torch.optim.RMSprop, {"lr": 0.01}),
    (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    (torch.optim.Adagrad, {"lr": 0.1}),
]


def trained(make, settings, steps=17, before=0, path=None):
    model = nn.Sequential(nn.Linear(I, 8), nn.Tanh(), nn.Linear(8, O)).double()
    optimizer = make(model.parameters(), **settings)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)

    def train(count):
        for _ in range(count):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(5, I).double()), torch.randint(0, O, (5,))).backward()
            optimizer.step()
            schedule.step()

    train(before)
    recorder = dualhook.instrument(model, path, verbose=False)
    train(steps)
    return model, recorder.close()


@pytest.fixture
def _at_every_step(monkeypatch):
    monkeypatch.setattr("dualhook.recorder.snapshots.RATIO", 1.0)
    monkeypatch.setattr("dualhook.query.preview.AGAIN", 1)  # every row goes through the matrices themselves
    monkeypatch.setattr("dualhook.query.preview.NEGLIGIBLE", 0.0)


@pytest.mark.usefixtures("_at_every_step")
@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize(("make", "settings"), PREVIEWED)
def test_with_a_snapshot_of_every_step_a_preview_is_exact(make, settings, before):
    model, memory = trained(make, settings, before=before)
    x = torch.randn(3, I).double()
    exact, preview = (memory.attend(model, x, target=1, method=method) for method in ("exact", "preview"))
    for layer in exact.layers:
        one, other = (a.sum_by("step", layers=layer)["contribution"] for a in (exact, preview))
        assert np.allclose(one, other, rtol=1e-8, atol=1e-12)
        tops = (a.top(9, layers=layer, by="abs_contribution") for a in (exact, preview))
        one, other = (top["contribution"] for top in tops)
        assert np.allclose(one, other, rtol=1e-8, atol=1e-12)
        origins = (a.parts.where(layer=layer, part="origin")["contribution"] for a in (exact, preview))
        one, other = origins
        assert np.allclose(one, other, rtol=1e-9)


@pytest.mark.usefixtures("_at_every_step")
def test_averages_and_earlier_steps():
    model, memory = trained(torch.optim.Adam, {"lr": 0.01})
    x = torch.randn(2, I).double()
    model.load_state_dict(memory.state_dict(step=9))
    for asked, step in ((memory, 9), (memory.averaged("swa"), None)):
        one, other = (
            asked.attend(model, x, target=0, method=method, step=step).sum_by("step")["contribution"]
            for method in ("exact", "preview")
        )
        assert np.allclose(one, other, rtol=1e-8, atol=1e-12)


def test_a_few_snapshots_name_the_patterns_that_the_replay_names(tmp_path):
    data = load_fashion_mnist_subset()
    model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    with dualhook.instrument(model, tmp_path / "run", verbose=False) as recorder:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for x, y in recorder.track(zip(data.train_images.split(50), data.train_labels.split(50), strict=True)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    memory = recorder.close()
    assert len(list((tmp_path / "run" / "snapshots").iterdir())) < 25
    exact, preview = (memory.attend(model, data.test_images[:8], method=m).top(10) for m in ("exact", "preview"))
    for layer in memory.layers:
        for query in range(8):
            one, other = (set(top.where(layer=layer, query=query)["pattern"]) for top in (exact, preview))
            assert len(one & other) >= 7
    assert preview.footer.startswith("preview, not exact; receipt: explained at least")
    assert "preview" not in exact.footer


def test_a_preview_is_kept_like_a_replay(tmp_path):
    model, memory = trained(torch.optim.Adam, {"lr": 0.01}, path=tmp_path / "run")
    x = torch.randn(3, I).double()
    attention = memory.attend(model, x, method="preview", cache=True)
    whole = [str(table) for table in (attention.top(5), attention.sum_by("step"), attention.parts)]
    shutil.rmtree(tmp_path / "run" / "snapshots")  # what is kept needs none of them
    (tmp_path / "run" / "snapshots").mkdir()
    again = memory.attend(model, x, method="preview", cache=True)
    assert [str(table) for table in (again.top(5), again.sum_by("step"), again.parts)] == whole
    exact = memory.attend(model, x, cache=True)
    assert str(exact.top(5)) != whole[0]


def test_flushing_often_takes_no_more_snapshots(tmp_path):
    model = nn.Linear(I, O)
    with dualhook.instrument(model, tmp_path / "run", verbose=False) as recorder:
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(30):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(4, I)), torch.randint(0, O, (4,))).backward()
            optimizer.step()
            recorder.flush()
    taken = sorted(int(path.stem) for path in (tmp_path / "run" / "snapshots").iterdir())
    assert taken == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 22, 27, 30]
    memory = dualhook.load(tmp_path / "run")
    assert len(memory.attend(model, torch.randn(2, I), method="preview").top(3)) == 6


def test_sgd_has_nothing_to_preview():
    model, memory = trained(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
    x = torch.randn(2, I).double()
    exact, preview = (memory.attend(model, x, method=method).top(5) for method in ("exact", "preview"))
    assert str(exact) == str(preview)


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.Rprop])
def test_what_cannot_be_previewed_says_so(make):
    model, memory = trained(make, {})
    with pytest.raises(RuleError, match=r"no preview of '0\.weight': .* ask with method='exact'"):
        memory.attend(model, torch.randn(2, I).double(), method="preview")


def test_a_memory_without_snapshots_says_so(tmp_path):
    model, memory = trained(torch.optim.Adam, {"lr": 0.01}, path=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "snapshots")
    memory = dualhook.load(tmp_path / "run")
    with pytest.raises(RuleError, match="the memory holds no snapshots"):
        memory.attend(model, torch.randn(2, I).double(), method="preview")
    with pytest.raises(dualhook.DualHookError, match="expected one of exact, preview"):
        memory.attend(model, torch.randn(2, I).double(), method="fast")


def test_a_disk_that_takes_no_snapshot_stops_neither_training_nor_recording(monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("dualhook.store.writer.Writer.write_snapshot", full)
    with pytest.warns(UserWarning, match="step 1: no more snapshots for previews: no space left"):
        _, memory = trained(torch.optim.Adam, {"lr": 0.01})
    assert memory.verify().max_error < 1e-10
