"""The reading side as users call it: an ordinary classifier, its memory, every question."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import dualhook
from dualhook.errors import LayerError, RuleError, StoreError

N, I, H, C = 60, 6, 12, 3
STEPS = 24


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(I, H)
        self.head = nn.Linear(H, C)

    def forward(self, x):
        return self.head(self.body(x).relu_())


class Trained:
    """One recorded run; the weights after every step and two averages of them kept aside."""

    def __init__(self, path) -> None:
        torch.manual_seed(1)
        self.model = Classifier().double()
        self.x, self.y = torch.randn(N, I, dtype=torch.float64), torch.randint(0, C, (N,))
        self.weights = [copy.deepcopy(self.model.state_dict())]
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        with dualhook.instrument(self.model, path, verbose=False) as recorder:
            loader = DataLoader(TensorDataset(self.x, self.y), batch_size=10, shuffle=True)
            for _ in range(STEPS // 6):
                for x, y in recorder.track(loader):
                    optimizer.zero_grad()
                    F.cross_entropy(self.model(x), y).backward()
                    optimizer.step()
                    self.ema.update_parameters(self.model)
                    self.weights.append(copy.deepcopy(self.model.state_dict()))
        self.memory = dualhook.load(path)
        self.memory.add_column("label", self.y)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("run") / "memory")


def test_what_is_in_it(trained):
    memory = trained.memory
    assert memory.layers == ["body", "head"]
    assert memory.steps == STEPS
    assert memory.samples.tolist() == list(range(N))
    assert memory.columns == ["step", "sample", "position", "label"]
    assert memory.patterns("head") == STEPS * 10
    info = memory.info()
    assert info["rule"].tolist() == ["sgd", "sgd"]
    assert info["exact"].all()
    assert "24 steps, 60 samples" in repr(memory)


def test_verify(trained):
    report = trained.memory.verify()
    assert report.columns == ["layer", "error", "rule", "exact", "inexact_steps"]
    assert report.max_error < 1e-13
    assert trained.memory.verify(trained.model).max_error == pytest.approx(report.max_error)
    with torch.no_grad():
        other = copy.deepcopy(trained.model)
        other.head.weight[0, 0] += 0.1
        size = torch.cat([parameter.flatten() for parameter in other.head.parameters()]).norm().item()
    error = trained.memory.verify(other).where(layer="head")["error"][0]
    assert error == pytest.approx(0.1 / size, rel=1e-6)


def test_time_travel(trained):
    for step in (0, 1, 7, STEPS):
        assert torch.allclose(
            trained.memory.weight("body", step=step), trained.weights[step]["body.weight"], atol=1e-13
        )
        state = trained.memory.state_dict(step=step)
        assert state.keys() == trained.weights[step].keys()
        assert all(torch.allclose(value, trained.weights[step][name], atol=1e-13) for name, value in state.items())
    for step in (-1, STEPS + 1):
        with pytest.raises(dualhook.DualHookError, match=f"step {step}: expected 0 to {STEPS}"):
            trained.memory.weight("body", step=step)


def test_attention_at_an_earlier_step(trained):
    then = copy.deepcopy(trained.model)
    then.load_state_dict(trained.weights[9])
    attention = trained.memory.attend(then, trained.x[:3], step=9)
    assert (attention.explained["explained"] > 1 - 1e-10).all()
    assert attention.top(1000)["step"].max() == 9


def test_top_names_the_rows(trained):
    attention = trained.memory.attend(trained.model, trained.x[:2])
    top = attention.top(5, by="abs_weight", layers="body")
    assert top.columns == ["query", "layer", "rank", "pattern", "sample", "step", "position", "weight", "contribution"]
    assert top["rank"].tolist() == [1, 2, 3, 4, 5] * 2
    for row in top:  # the key of the first layer is the sample itself
        assert row["weight"] == pytest.approx(float(trained.x[row["sample"]] @ trained.x[row["query"]] + 1))
    smallest = attention.top(3, by="contribution", largest=False)
    assert (smallest["contribution"] <= attention.top(3)["contribution"].min()).all()


def test_contributions_sum_to_what_training_put_into_the_logit(trained):
    """The head's contributions of class c add up to that logit minus what the untrained head gives the same input."""
    model, memory = trained.model, trained.memory
    x = trained.x[:4]
    hidden = model.body(x).relu().detach()
    decayed = memory._composition(memory._spec("head"), STEPS)
    untrained = hidden @ decayed.origin_weight.T + decayed.origin_bias
    for target in (0, 2, [0, 1, 2, 0], torch.tensor([2, 2, 1, 1]), lambda logits: logits[:, 1], None):
        totals = memory.attend(model, x, target=target, layers="head").sum_by("label")
        logits = model(x).detach()
        classes = logits.argmax(1) if target is None else torch.tensor([1] * 4) if callable(target) else target
        for query in range(4):
            c = int(torch.as_tensor(classes).expand(4)[query])
            total = totals.where(query=query)["contribution"].sum()
            assert total == pytest.approx(float(logits[query, c] - untrained[query, c]), abs=1e-10)


def test_body_contributions_use_the_gradient_of_the_logit(trained):
    model, memory = trained.model, trained.memory
    x = trained.x[:1]
    y = model.body(x).detach().requires_grad_()
    (u,) = torch.autograd.grad(model.head(y.relu())[0, 1], y)
    made_of = memory._composition(memory._spec("body"), STEPS)
    change = x @ (model.body.weight - made_of.origin_weight).T + model.body.bias - made_of.origin_bias
    total = memory.attend(model, x, target=1).sum_by("step", layers="body")["contribution"].sum()
    assert total == pytest.approx((u * change).sum().item(), abs=1e-10)


def test_sum_by(trained):
    attention = trained.memory.attend(trained.model, trained.x[:2])
    by_label = attention.sum_by("label", layers="head")
    assert by_label.columns == ["query", "layer", "label", "weight", "abs_weight", "contribution", "abs_contribution"]
    assert by_label["label"].tolist() == [0, 1, 2] * 2
    by_sample = attention.sum_by("sample", layers="head").where(query=0)
    for label in range(C):
        member = np.isin(by_sample["sample"], np.flatnonzero(trained.y.numpy() == label))
        one = by_label.where(query=0, label=label)
        for name in ("weight", "abs_weight", "contribution", "abs_contribution"):
            assert one[name][0] == pytest.approx(by_sample[name][member].sum())
    assert len(attention.sum_by("step", layers="head")) == 2 * STEPS
    with pytest.raises(
        dualhook.DualHookError, match="no column 'genre': expected one of step, sample, position, label"
    ):
        attention.sum_by("genre")


def test_sum_by_several_columns(trained):
    attention = trained.memory.attend(trained.model, trained.x[:2])
    both = attention.sum_by(("step", "label"))
    assert both.columns[:4] == ["query", "layer", "step", "label"]
    every = attention.top(10**6)
    step, label = every["step"], trained.y.numpy()[every["sample"]]
    found = {tuple(row.values())[:4]: row for row in both}
    assert len(found) == len(both) == len(set(zip(every["query"], every["layer"], step, label, strict=True)))
    for (query, layer, at, of), row in found.items():
        member = (every["query"] == query) & (every["layer"] == layer) & (step == at) & (label == of)
        assert row["patterns"] == member.sum()
        for name in ("weight", "contribution"):
            assert row[name] == pytest.approx(every[name][member].sum())
            assert row[f"abs_{name}"] == pytest.approx(np.abs(every[name][member]).sum())
    with pytest.raises(dualhook.DualHookError, match="at least one column"):
        attention.sum_by([])


def test_receipt_and_its_parts(trained):
    attention = trained.memory.attend(trained.model, trained.x[:2])
    assert attention.receipt.columns == ["query", "layer", "explained", "cancellation"]
    assert attention.explained.columns == ["query", "layer", "explained"]
    assert attention.cancellation.columns == ["query", "layer", "cancellation"]
    top = attention.top(10**6, layers="head").where(query=0)["contribution"]
    expected = np.abs(top).sum() / abs(top.sum())
    assert attention.cancellation.where(query=0, layer="head")["cancellation"][0] == pytest.approx(expected)
    assert attention.top(1).footer.startswith("receipt: explained at least 1.000000, cancellation ")


def test_a_receipt_of_another_model_says_so(trained):
    with torch.no_grad():
        other = copy.deepcopy(trained.model)
        other.head.weight.mul_(2)
    explained = trained.memory.attend(other, trained.x[:2]).explained
    assert (explained.where(layer="head")["explained"] < 0.9).all()
    assert (explained.where(layer="body")["explained"] > 1 - 1e-10).all()


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "frozen", "training", "inference"])
def test_forms_of_input_and_states_of_the_model(trained, form):
    model = copy.deepcopy(trained.model)
    true = trained.memory.attend(trained.model, trained.x[:2]).top(3)
    if form == "frozen":
        model.requires_grad_(False)
    model.train(form == "training")
    inputs = {"tuple": (trained.x[:2],), "mapping": {"x": trained.x[:2]}}.get(form, trained.x[:2])
    with torch.inference_mode(form == "inference"):
        found = trained.memory.attend(model, inputs).top(3)
    assert np.allclose(found["contribution"], true["contribution"])
    assert found["pattern"].tolist() == true["pattern"].tolist()
    assert model.training is (form == "training")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.body._forward_hooks
    assert not model.body._forward_pre_hooks


def test_dual_model(trained):
    dual = trained.memory.dual(trained.model)
    assert type(dual) is Classifier
    assert not list(dual.parameters())  # nothing but the memory answers
    x = torch.randn(7, I, dtype=torch.float64)
    assert torch.allclose(dual(x), trained.model(x), atol=1e-12)
    assert torch.allclose(dual.head.weight, trained.model.head.weight, atol=1e-12)
    assert "step=24" in repr(dual)
    assert isinstance(trained.model.head, nn.Linear)


def test_dual_of_a_model_that_is_one_layer():
    model = nn.Linear(I, C).double()
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(5, I).double()).square().sum().backward()
    optimizer.step()
    x = torch.randn(2, 3, I).double()
    assert torch.allclose(recorder.close().dual(model)(x), model(x), atol=1e-12)


def test_without_samples(trained):
    memory = trained.memory
    left = memory.without([3, 5])
    rows = list(memory._store.blocks("head", last_step=STEPS, block_rows=10**6))
    made_of = memory._composition(memory._spec("head"), STEPS)
    removed = torch.zeros(C, H, dtype=torch.float64)
    for block in rows:
        for n in np.flatnonzero(np.isin(block.sample.numpy(), [3, 5])):
            removed += made_of.weight[block.step[n]] * torch.outer(block.output_grad[n], block.key[n])
    assert torch.allclose(left["head.weight"], trained.model.head.weight + removed, atol=1e-12)
    everything = memory.without(memory.samples.tolist())
    assert torch.allclose(everything["head.weight"], made_of.origin_weight, atol=1e-12)
    assert torch.allclose(memory.without(3)["head.bias"], memory.without([3])["head.bias"])
    with pytest.raises(
        dualhook.DualHookError, match="no patterns of sample 999: expected samples out of memory.samples"
    ):
        memory.without([3, 999])


def test_averages_on_top(trained):
    memory = trained.memory.averaged("ema", decay=0.9)
    assert memory.verify(trained.ema).max_error < 1e-12
    assert (memory.attend(trained.ema, trained.x[:2]).explained["explained"] > 1 - 1e-10).all()
    assert torch.allclose(memory.dual(trained.ema)(trained.x[:2]), trained.ema(trained.x[:2]), atol=1e-12)
    mean = torch.stack([w["head.weight"] for w in trained.weights[12::3]]).mean(0)
    assert torch.allclose(trained.memory.averaged("swa", start=12, every=3).weight("head"), mean, atol=1e-12)
    with pytest.raises(StoreError, match="pass the model whose weights verify"):
        memory.verify()
    with pytest.raises(RuleError, match="unknown average 'polyak'"):
        trained.memory.averaged("polyak")
    assert trained.memory.verify().max_error < 1e-12  # the memory itself is not changed


def test_columns(trained, tmp_path):
    model = nn.Linear(I, C)
    with dualhook.instrument(model, tmp_path / "run", verbose=False) as recorder:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for task in range(2):
            recorder.batch(samples=[2, 4, 6], task=task)
            F.cross_entropy(model(torch.randn(3, I)), torch.tensor([0, 1, 2])).backward()
            optimizer.step()
            optimizer.zero_grad()
    memory = recorder.close()
    memory.add_column("genre", {2: "poem", 4: "law", 6: "poem"})
    memory.add_column("score", np.arange(7) / 10)
    memory = dualhook.load(tmp_path / "run")  # both are kept
    assert memory.columns == ["step", "sample", "position", "task", "genre", "score"]
    attention = memory.attend(model, torch.randn(1, I))
    assert attention.sum_by("task")["task"].tolist() == [0, 1]
    assert attention.sum_by("genre")["genre"].tolist() == ["law", "poem"]
    assert attention.sum_by("score")["score"].tolist() == [0.2, 0.4, 0.6]
    total = attention.sum_by("task")["contribution"].sum()
    assert attention.sum_by("genre")["contribution"].sum() == pytest.approx(total, rel=1e-4)
    for values, words in (
        ([1, 2, 3], "at least 7, since the memory holds patterns of sample 6"),
        (np.zeros((7, 2)), r"column 'new' of shape \[7, 2\]"),
        ({2: 1, 4: 1}, r"column 'new' has no value for sample 6 \(1 are missing\)"),
    ):
        with pytest.raises(dualhook.DualHookError, match=words):
            memory.add_column("new", values)
    with pytest.raises(dualhook.DualHookError, match="column 'task' is recorded with the patterns"):
        memory.add_column("task", [0] * 7)


def test_samples_that_are_not_known_are_a_group_of_their_own():
    model = nn.Linear(I, C)
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for known in (True, False):
        with recorder.batch(samples=[0, 1]) if known else recorder.batch(samples=[0]):
            model(torch.randn(2, I)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    memory = recorder.close()
    memory.add_column("label", ["a", "b"])
    assert memory.attend(model, torch.randn(1, I)).sum_by("label")["label"].tolist() == ["unknown", "a", "b"]


def test_columns_that_only_some_batches_have():
    model = nn.Linear(I, C)
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for k, columns in enumerate(({}, {"task": 5}, {"score": 0.5}, {"task": 6, "score": 0.25})):
        recorder.batch(samples=[k, k + 1], **columns)
        model(torch.randn(2, I)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if k == 1:
            recorder.flush()
    memory = recorder.close()
    attention = memory.attend(model, torch.randn(1, I))
    assert attention.sum_by("task")["task"].tolist() == ["unknown", 5, 6]
    assert attention.sum_by("score")["score"].tolist() == ["unknown", 0.25, 0.5]
    total = attention.sum_by("step")["contribution"].sum()
    for column in ("task", "score"):
        assert attention.sum_by(column)["contribution"].sum() == pytest.approx(total, rel=1e-5)


def test_samples_recorded_after_a_column_was_added(tmp_path):
    model = nn.Linear(I, C)
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for samples in ([0, 1], [2, 3]):
        recorder.batch(samples=samples)
        model(torch.randn(2, I)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        recorder.flush()
        if samples == [0, 1]:
            dualhook.load(tmp_path / "run").add_column("label", ["a", "b"])
    recorder.close()
    table = dualhook.load(tmp_path / "run").attend(model, torch.randn(1, I)).sum_by("label")
    assert table["label"].tolist() == ["unknown", "a", "b"]


def test_the_mean_of_asgd_needs_asgd(trained):
    with pytest.raises(RuleError, match=r"was not trained by torch\.optim\.ASGD"):
        trained.memory.averaged("asgd")


def test_a_run_without_samples():
    model = nn.Linear(I, C)
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, I)).square().sum().backward()
    optimizer.step()
    memory = recorder.close()
    assert memory.samples.tolist() == []
    assert memory.attend(model, torch.randn(1, I)).top(1)["sample"].tolist() == [-1]
    with pytest.raises(dualhook.DualHookError, match=r"the run named none: record it with recorder\.track\(loader\)"):
        memory.without([0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda t: t.memory.attend(t.model, torch.randn(2, I + 1).double()),
            "layer 'body' got inputs of width 7, expected 6",
        ),
        (
            lambda t: t.memory.attend(nn.Linear(I, C), t.x),
            "Linear has no linear layer 'body': expected the recorded model, with the layers body, head",
        ),
        (
            lambda t: t.memory.attend(nn.ModuleDict({"body": nn.Linear(I, 5), "head": nn.Linear(5, C)}), t.x),
            "layer 'body' of ModuleDict maps 6 to 5, the recorded one 6 to 12",
        ),
        (
            lambda t: t.memory.attend(t.model, t.x, target=C),
            r"expected one class from 0 to 2, or one for each of the 60",
        ),
        (lambda t: t.memory.attend(t.model, t.x[:2], target=[0, 1, 2]), r"target= of shape \[3\]"),
        (
            lambda t: t.memory.attend(t.model, t.x, target=lambda out: out),
            "the function to return a tensor of one number",
        ),
        (lambda t: t.memory.attend(t.model, t.x, layers="haed"), "records no layer 'haed': did you mean 'head'"),
        (lambda t: t.memory.attend(t.model, t.x).top(0), "k=0: expected at least 1"),
        (lambda t: t.memory.attend(t.model, t.x).top(by="size"), "by='size': expected one of weight, abs_weight"),
        (lambda t: t.memory.attend(t.model, t.x, layers="head").top(1, layers="body"), "layer 'body' was not asked"),
        (lambda t: t.memory.attend(t.model, t.x[0]), r"the model gave a tensor of shape \[3\], expected logits"),
        (lambda t: t.memory.weight("bodi"), "did you mean 'body'"),
        (lambda t: t.memory.attend(5, t.x), "model=int: expected the recorded"),
        (lambda t: t.memory.attend(t.model, t.x, target="cat"), "target='cat': expected a class number"),
        (lambda t: t.memory.attend(t.model, t.x[:0]), "inputs hold no query"),
    ],
)
def test_questions_that_do_not_fit(trained, call, words):
    with pytest.raises(
        LayerError if "k=0" not in words and "by=" not in words else dualhook.DualHookError, match=words
    ):
        call(trained)
    assert not trained.model.body._forward_pre_hooks  # nothing is left behind


def test_results_look_like_tables(trained):
    table = trained.memory.attend(trained.model, trained.x[:2]).top(3)
    frame = table.to_pandas()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.columns) == table.columns
    assert len(frame) == len(table) == 2 * 2 * 3
    text = str(table).splitlines()
    assert text[0] == "the 3 largest by contribution, per query and layer"
    assert text[1].split() == table.columns
    assert "receipt: explained at least" in text[-1]
    page = table._repr_html_()
    assert page.count("<tr>") == len(table) + 1
    axes = table.plot()
    assert axes.get_xlabel() == "contribution / logit"
    assert len(axes.patches) == len(table)


def test_progress_counts_every_pattern_of_a_pass(trained):
    memory, seen = dualhook.load(trained.memory.path), []
    memory.on_progress(seen.append)
    memory.verify()
    assert sum(seen) == memory.patterns("body") + memory.patterns("head")
    memory.on_progress(None)
    memory.verify()
    assert sum(seen) == memory.patterns("body") + memory.patterns("head")
    assert memory.nbytes == sum(path.stat().st_size for path in (memory.path / "segments").iterdir())


def test_names_are_escaped_in_html():
    table = dualhook.Table({"<b>": ["<script>alert(1)</script>"]}, title="<i>")
    assert "<script>" not in table._repr_html_()
    assert "<i>" not in table._repr_html_()


def test_long_tables_say_how_much_they_leave_out():
    table = dualhook.Table({"n": list(range(100))})
    assert "… 60 more rows" in str(table)
    assert len(table.to_text().splitlines()) == 102
