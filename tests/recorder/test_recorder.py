"""The recorder's life: what it leaves on a model, what it refuses, what it keeps."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import dualhook
from dualhook.errors import BudgetError, LayerError, StoreError
from dualhook.optimizers import registry

I, O = 5, 3
optimizer_module = importlib.import_module("torch.optim.optimizer")  # the attribute is deleted


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(I, 8), nn.ReLU(), nn.Linear(8, O))


def train(model: nn.Module, steps: int = 3, **settings: float) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, I)), torch.randint(0, O, (6,))).backward()
        optimizer.step()
    return optimizer


def hooks_and_attributes(model: nn.Module) -> list[object]:
    found: list[object] = []
    for module in model.modules():
        found.append(sorted(module.__dict__))
        found.append({name: dict(value) for name, value in module.__dict__.items() if "_hooks" in name})
    for parameter in model.parameters():
        found.append((parameter._backward_hooks, parameter._post_accumulate_grad_hooks, sorted(parameter.__dict__)))
    found.append(list(model.state_dict()))
    found.append((dict(nn.modules.module._global_forward_hooks), dict(nn.modules.module._global_forward_pre_hooks)))
    found.append((dict(optimizer_module._global_optimizer_pre_hooks),
                  dict(optimizer_module._global_optimizer_post_hooks)))  # fmt: skip
    return found


@pytest.mark.parametrize("fails", [False, True])
def test_closing_leaves_the_model_as_it_was_also_after_an_exception(fails):
    model = network()
    model[0].register_forward_hook(lambda *_: None)  # a hook of the user's
    before = hooks_and_attributes(model)
    threads = threading.active_count()
    try:
        with dualhook.instrument(model, verbose=False) as recorder:
            train(model)
            assert hooks_and_attributes(model) != before
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    model.zero_grad()
    assert hooks_and_attributes(model) == before
    assert threading.active_count() == threads
    assert recorder.close().steps == 3
    assert recorder.close() is recorder.close()  # closing twice
    for duplicate in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        one, other = duplicate(nn.Sequential(model[2])), duplicate(nn.Sequential(nn.Linear(8, O)))
        assert hooks_and_attributes(one) == hooks_and_attributes(other)


def test_copies_made_while_recording_are_silent_and_work():
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    train(model, 2)
    average = AveragedModel(model)
    twin, shallow = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    train(twin, 2)
    train(shallow, 2)
    average(torch.randn(2, I)).sum().backward()
    train(model, 1)
    memory = recorder.close()
    assert memory.steps == 3
    assert memory.patterns("2") == 3 * 6
    assert memory.verify().max_error < 1e-6


@pytest.mark.parametrize("part", ["front.FirstPass", "attached.RootHook", "attached.StepWatcher"])
def test_a_recorder_that_cannot_begin_leaves_nothing_behind(monkeypatch, tmp_path, part):
    def fails(*args, **kwargs):
        raise RuntimeError("no luck")

    model = nn.Linear(3, 2)
    with monkeypatch.context() as patched:
        patched.setattr(f"dualhook.recorder.{part}", fails)
        with pytest.raises(RuntimeError, match="no luck"):
            dualhook.instrument(model, tmp_path / "memory", verbose=False)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    dualhook.instrument(model, tmp_path / "memory", overwrite=True, verbose=False).close()


def test_instrumenting_twice_and_again_after_closing():
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    with pytest.raises(LayerError, match=r"already instrumented: close\(\) its recorder first"):
        dualhook.instrument(model)
    with pytest.raises(LayerError, match="already instrumented"):
        dualhook.instrument(nn.Sequential(model))  # a part of it is
    recorder.close()
    dualhook.instrument(model, verbose=False).close()


def test_calls_on_a_closed_recorder():
    recorder = dualhook.instrument(network(), verbose=False)
    recorder.close()
    for name in ("flush", "pause", "resume"):
        with pytest.raises(dualhook.DualHookError, match=f"{name}\\(\\) of a recorder that is closed"):
            getattr(recorder, name)()


def test_path_that_holds_something(tmp_path):
    model = network()
    with dualhook.instrument(model, tmp_path / "run", verbose=False):
        train(model)
    with pytest.raises(StoreError, match="already holds a memory: .* overwrite=True"):
        dualhook.instrument(model, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with dualhook.instrument(model, tmp_path / "run", overwrite=True, verbose=False):
        train(model, 1)
    assert dualhook.load(tmp_path / "run").steps == 1
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(StoreError, match="holds no memory: choose another path"):
            dualhook.instrument(model, tmp_path / "other", overwrite=overwrite)
    assert (tmp_path / "other" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": torch.int16}, "expected torch.float64, float32"),
        ({"on_full": "panic"}, "expected 'fold', 'stop' or 'error'"),
        ({"max_bytes": 0}, "expected a number of bytes above 0"),
        ({"dtype": "float16"}, "expected torch.float64, float32"),
        ({"max_bytes": "1GB"}, "expected a number of bytes above 0"),
        ({"optimizer": "sgd"}, "expected a torch.optim.Optimizer"),
        ({"optimizer": 5}, "expected a torch.optim.Optimizer"),
        ({"layers": []}, "layers= names nothing"),
        ({"layers": 5}, "layers=5: expected names"),
        ({"layers": "head2"}, "no linear map matches 'head2'"),
    ],
)
def test_arguments_of_a_wrong_kind(tmp_path, arguments, words):
    with pytest.raises(dualhook.DualHookError, match=words):
        dualhook.instrument(network(), tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()  # refused before anything is made


def test_running_a_cell_again_replaces_the_recorder_that_is_still_there(tmp_path):
    model, other = network(), network()
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False)
    train(model, 5)
    again = dualhook.instrument(other, tmp_path / "run", overwrite=True, verbose=False)
    assert "closed" in repr(recorder)
    train(model, 2)  # nobody records this any more
    train(other, 3)
    del recorder
    gc.collect()
    memory = again.close()
    assert memory.steps == 3
    assert memory.verify()["exact"].all()
    assert memory.verify().max_error < 1e-6


def test_rows_without_any_optimiser_are_said(tmp_path):
    model = network()
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False)
    for _ in range(3):
        model(torch.randn(4, I)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    with pytest.warns(UserWarning, match=r"no torch\.optim\.Optimizer was seen to step"):
        memory = recorder.close()
    assert np.isnan(memory.verify().max_error)
    with pytest.raises(LayerError, match="holds no patterns"):
        memory.attend(model, torch.randn(2, I))


def test_attention_keeps_its_temporary_memory():
    def ask():
        model = network()
        recorder = dualhook.instrument(model, verbose=False)
        train(model)
        return recorder.close().attend(model, torch.randn(2, I))

    attention = ask()
    gc.collect()
    assert len(attention.top(3)) == 2 * 2 * 3


def test_a_temporary_memory_goes_with_its_last_user(tmp_path):
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    train(model)
    kept = recorder.save(tmp_path / "kept")
    path = recorder.path
    memory = recorder.close()
    del recorder
    gc.collect()
    assert path.exists()
    assert memory.verify().max_error < 1e-6
    dual = memory.dual(model)
    del memory
    gc.collect()
    dual(torch.randn(2, I))
    assert path.exists()  # the dual model reads from it
    del dual
    gc.collect()
    assert not path.exists()
    assert kept.verify().max_error < 1e-6
    with pytest.raises(StoreError, match="exists and is not empty"):
        dualhook.instrument(network(), verbose=False).save(tmp_path / "kept")


def test_flush_shows_the_finished_steps_to_a_reader(tmp_path):
    model = network()
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False)
    train(model, 2)
    recorder.flush()
    early = dualhook.load(tmp_path / "run")
    weights = copy.deepcopy(model.state_dict())
    train(model, 2)
    recorder.close()
    assert early.steps == 2
    assert torch.allclose(early.weight("0"), weights["0.weight"], atol=1e-7)
    assert dualhook.load(tmp_path / "run").steps == 4


def test_a_script_that_forgets_to_close_loses_nothing(tmp_path):
    """Nor what it has asked for at its end before: that comes after."""
    script = f"""
        import atexit, shutil, torch, dualhook
        from torch import nn
        atexit.register(shutil.copytree, {str(tmp_path / "run")!r}, {str(tmp_path / "copy")!r})
        model = nn.Linear(4, 2)
        recorder = dualhook.instrument(model, {str(tmp_path / "run")!r}, verbose=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.randn(5, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    for name in ("run", "copy"):
        memory = dualhook.load(tmp_path / name)
        assert memory.steps == 3
        assert memory.verify().max_error < 1e-6


def test_a_recorder_that_nobody_holds_closes_itself(tmp_path):
    model = network()
    dualhook.instrument(model, tmp_path / "run", verbose=False)
    train(model)
    del model
    gc.collect()
    assert dualhook.load(tmp_path / "run").verify().max_error < 1e-6


def test_a_layer_replaced_after_instrumenting_is_said():
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    model[2] = nn.Linear(8, O)
    train(model)
    with pytest.warns(UserWarning, match="layer '2' is no longer part of the model"):
        memory = recorder.close()
    assert memory.layers == ["0"]


@pytest.mark.parametrize("same_values", [True, False])
def test_parameters_replaced_by_loading_are_followed(same_values):
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    train(model, 2, momentum=0.0)
    state = {name: value.clone() * (1 if same_values else 2) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)  # new Parameter objects
    if same_values:
        train(model, 2, momentum=0.0)
    else:
        with pytest.warns(dualhook.InexactWarning, match="step 3: "):
            train(model, 2, momentum=0.0)
    memory = recorder.close()
    assert memory.steps == 4
    assert memory.verify()["exact"].all() == same_values
    assert (memory.verify().max_error < 1e-6) == same_values


def test_a_model_that_changes_its_dtype():
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    train(model, 2)
    model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, I).double()), torch.randint(0, O, (6,))).backward()
        optimizer.step()
    memory = recorder.close()
    assert memory.verify()["exact"].all()
    assert memory.verify().max_error < 1e-6


def test_dtype_of_the_rows(tmp_path):
    model = network()
    with dualhook.instrument(model, tmp_path / "run", dtype=torch.bfloat16, verbose=False) as recorder:
        train(model, 5)
    report = recorder.close().verify()
    assert report["inexact_steps"].tolist() == [0, 0]  # within what bfloat16 can say, every step is explained
    assert 1e-6 < report.max_error < 1e-2  # what the narrower rows cost shows
    assert not report["exact"].any()
    rows = next(recorder.close()._store.blocks("0", last_step=5, block_rows=10))
    assert rows.key.dtype == rows.output_grad.dtype == torch.bfloat16


def test_rows_with_zero_output_gradient_are_dropped():
    model = nn.Linear(I, O)
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    labels = torch.tensor([0, -100, 1, -100, -100, 2])
    with recorder.batch(samples=range(10, 16), task=7):
        F.cross_entropy(model(torch.randn(6, I)), labels).backward()
    optimizer.step()
    memory = recorder.close()
    assert memory.patterns("(model)") == 3
    assert memory.samples.tolist() == [10, 12, 15]
    assert memory.verify().max_error < 1e-6


def test_first_step_says_what_it_costs(capsys, tmp_path):
    model = network()
    with dualhook.instrument(model, tmp_path / "run", max_bytes=10_000_000):
        train(model)
    (line,) = capsys.readouterr().err.splitlines()
    size = 6 * (4 * (I + 8) + 24 + 4 * (8 + O) + 24) + 4 * 64  # rows and ledger
    assert line.startswith(f"dualhook: recording 2 layers, {size / 1000:.3g} kB a step; the budget of 10 MB")
    assert f"{10_000_000 // size:,} steps" in line


def test_estimate_leaves_everything_as_it_was():
    model = nn.Sequential(nn.Linear(I, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, O))
    recorder = dualhook.instrument(model, verbose=False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    table = recorder.estimate(torch.randn(6, I, generator=torch.Generator().manual_seed(1)))
    assert table["patterns"].tolist() == [6, 6]
    assert table["bytes"].tolist() == [6 * (4 * (I + 8) + 24), 6 * (4 * (8 + O) + 24)]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    recorder.close()


def test_coverage_tells_every_trainable_parameter():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3)
            self.attention = nn.MultiheadAttention(4, 2)
            self.body, self.norm, self.head = nn.Linear(I, 8), nn.LayerNorm(8), nn.Linear(8, O)
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

        def forward(self, x):
            return self.head(self.norm(self.body(x)))

    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = dualhook.instrument(model, layers=["body", "frozen"], optimizer=optimizer, verbose=False)
    table = {row["parameter"]: row for row in recorder.coverage}
    assert set(table) == {name for name, p in model.named_parameters() if p.requires_grad} | {
        "frozen.weight", "frozen.bias"}  # fmt: skip
    assert table["body.weight"]["layer"] == "body"
    assert table["body.weight"]["rule"] == "sgd (exact)"
    assert table["body.weight"]["bytes_per_row"] == 4 * (I + 8) + 24
    assert table["head.weight"]["note"] == "not chosen by layers="
    assert table["frozen.weight"]["note"].startswith("frozen")
    assert table["attention.out_proj.weight"]["note"] == "not chosen by layers="
    assert "LayerNorm" in table["norm.weight"]["note"]
    assert table["conv.weight"]["layer"] is None
    recorder.close()


def test_an_optimiser_whose_rule_is_gone_has_attention_weights_only(tmp_path, monkeypatch):
    model = network()
    with dualhook.instrument(model, tmp_path / "run", verbose=False) as recorder:
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(6, I)), torch.randint(0, O, (6,))).backward()
            optimizer.step()
    memory = recorder.close()
    monkeypatch.delitem(registry._RULES, "torch.optim.adam.Adam")  # as in a process that has not registered it
    assert not memory.info()["exact"].any()
    assert memory._store.histories["0.weight"].hyper["betas.1"].tolist() == [0.999, 0.999]
    for ask in (memory.verify, lambda: memory.weight("0"), lambda: memory.dual(model), lambda: memory.without([])):
        with pytest.raises(dualhook.DualHookError, match=r"torch\.optim\.adam\.Adam, whose rule was registered"):
            ask()
    x = torch.randn(2, I)
    attention = memory.attend(model, x)
    with pytest.raises(dualhook.DualHookError, match="attention weights, by='weight', need no rule"):
        attention.top(3)
    top = attention.top(3, by="weight", layers="0")
    keys = torch.cat([rows.key for rows in memory._store.blocks("0", last_step=9, block_rows=99)])
    true = (x @ keys.T + 1).topk(3).values.flatten()
    assert np.allclose(top["weight"], true, rtol=1e-5)
    assert np.isnan(top["contribution"]).all()
    assert np.isnan(attention.explained["explained"]).all()


class TestBudget:
    def test_folding_keeps_the_identity_and_the_budget(self, tmp_path):
        model = network().double()
        values = []
        with dualhook.instrument(model, tmp_path / "run", max_bytes=60_000, verbose=False) as recorder:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True)
            for _ in range(120):
                optimizer.zero_grad()
                F.cross_entropy(model(torch.randn(6, I).double()), torch.randint(0, O, (6,))).backward()
                optimizer.step()
                values.append(copy.deepcopy(model.state_dict()))
        memory = recorder.close()
        assert memory._store.nbytes <= 60_000
        first = memory._store.first_step
        assert 0 < first < 120
        assert memory.verify().max_error < 1e-10
        assert memory.verify()["exact"].all()
        for step in (first, (first + 120) // 2):
            assert torch.allclose(memory.weight("0", step=step), values[step - 1]["0.weight"], atol=1e-12)
        with pytest.raises(dualhook.DualHookError, match=f"step {first - 1}: expected {first} to 120, steps before"):
            memory.weight("0", step=first - 1)
        assert memory.attend(model, torch.randn(2, I).double()).explained["explained"].min() > 1 - 1e-9
        with pytest.raises(dualhook.DualHookError, match="an average needs every step"):
            memory.averaged("ema")

    def test_folding_of_asgd_keeps_its_running_mean(self, tmp_path):
        model = network().double()
        with dualhook.instrument(model, tmp_path / "run", max_bytes=60_000, verbose=False) as recorder:
            optimizer = torch.optim.ASGD(model.parameters(), lr=0.05, t0=10)
            for _ in range(120):
                optimizer.zero_grad()
                F.cross_entropy(model(torch.randn(6, I).double()), torch.randint(0, O, (6,))).backward()
                optimizer.step()
        memory = recorder.close()
        assert memory._store.first_step > 10
        assert memory.verify().max_error < 1e-10
        mean = memory.averaged("asgd").weight("0")
        assert torch.allclose(mean, optimizer.state[model[0].weight]["ax"], rtol=1e-9, atol=1e-10)

    def test_folding_keeps_the_momentum_of_a_layer_that_rests(self, tmp_path):
        model = network().double()
        with dualhook.instrument(model, tmp_path / "run", max_bytes=20_000, verbose=False) as recorder:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            for k in range(80):
                model[0].requires_grad_(not 10 <= k < 60)
                optimizer.zero_grad()
                F.cross_entropy(model(torch.randn(6, I).double()), torch.randint(0, O, (6,))).backward()
                optimizer.step()
                recorder._writer._sealed.join()
        memory = recorder.close()
        assert memory._store.first_step > 10
        assert memory.verify()["exact"].all()
        assert memory.verify().max_error < 1e-10

    def test_folding_keeps_the_marks_and_no_more_origins_than_needed(self, tmp_path):
        model = network().double()
        recorder = dualhook.instrument(model, tmp_path / "run", max_bytes=20_000, verbose=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with pytest.warns(dualhook.InexactWarning, match="step 3: "):
            for k in range(80):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(torch.randn(6, I).double()), torch.randint(0, O, (6,)))
                (loss + (model[0].weight.square().sum() if k == 2 else 0)).backward()
                optimizer.step()
                recorder._writer._sealed.join()
        memory = recorder.close()
        assert memory._store.first_step > 3
        assert memory.verify()["inexact_steps"].tolist() == [1, 0]
        assert memory.verify()["exact"].tolist() == [False, True]
        assert len(list((tmp_path / "run" / "origin").iterdir())) == 1

    def test_stopping_keeps_a_whole_memory_and_training_goes_on(self, tmp_path):
        model = network()
        recorder = dualhook.instrument(model, tmp_path / "run", max_bytes=5_000, on_full="stop", verbose=False)
        with pytest.warns(UserWarning, match=r"recording stopped after step \d+: .*max_bytes="):
            train(model, 50)
        recorder.flush()
        copied = recorder.save(tmp_path / "copy")
        memory = recorder.close()
        assert copied.verify().max_error < 1e-6
        assert 0 < memory.steps < 50
        assert memory.verify().max_error < 1e-6
        assert memory.verify()["exact"].all()

    def test_error(self, tmp_path):
        model = network()
        recorder = dualhook.instrument(model, tmp_path / "run", max_bytes=5_000, on_full="error", verbose=False)
        with pytest.raises(BudgetError, match="used its budget of 5 kB"):
            train(model, 50)
        assert recorder.close().verify().max_error < 1e-6

    def test_folding_needs_a_rule(self, tmp_path, monkeypatch):
        model = network()
        recorder = dualhook.instrument(model, tmp_path / "run", max_bytes=20_000, verbose=False)
        optimizer = torch.optim.RMSprop(model.parameters())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for k in range(200):
                if k == 3:
                    monkeypatch.delitem(registry._RULES, "torch.optim.rmsprop.RMSprop")
                optimizer.zero_grad()
                F.cross_entropy(model(torch.randn(6, I)), torch.randint(0, O, (6,))).backward()
                optimizer.step()
                recorder._writer._sealed.join()  # let the writing thread come to its budget
        assert any("recording stopped" in str(w.message) and "cannot be folded" in str(w.message) for w in caught)
        assert recorder.close().steps > 0


def test_a_disk_that_fails_stops_the_recording_not_the_training(tmp_path, monkeypatch):
    model = network()
    recorder = dualhook.instrument(model, tmp_path / "run", max_bytes=10**6, verbose=False)
    train(model, 2)
    recorder.flush()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dualhook.store.writer.write_tensors", full)
    recorder._writer.segment_bytes = 1
    with pytest.warns(UserWarning, match="recording stopped after step .*No space left"):
        for _ in range(10):
            train(model, 1, momentum=0.0)
            recorder._writer._sealed.join()
    memory = recorder.close()  # what was committed before is whole
    assert memory.steps == 2
    assert memory.verify().max_error < 1e-6


def test_memory_of_the_writer_is_bounded(tmp_path):
    model = nn.Linear(200, 100)
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False)
    recorder._writer.segment_bytes = 200_000
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(torch.randn(32, 200)).square().mean().backward()
        optimizer.step()
    assert recorder._writer._made <= 3
    memory = recorder.close()
    assert len(memory._store.segments) > 5
    assert memory.verify().max_error < 1e-6
    assert [path.name for path in sorted((tmp_path / "run").rglob("*partial*"))] == []


def test_overwriting_removes_the_old_columns(tmp_path):
    model = network()
    for columns in (True, False):
        with dualhook.instrument(model, tmp_path / "run", overwrite=True, verbose=False) as recorder:
            with recorder.batch(samples=range(6)):
                train(model, 1)
        memory = dualhook.load(tmp_path / "run")
        assert "label" not in memory.columns
        if columns:
            memory.add_column("label", list(range(6)))
            assert "label" in dualhook.load(Path(tmp_path / "run")).columns
