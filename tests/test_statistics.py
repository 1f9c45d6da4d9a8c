"""Votes, predictive power, spreads and rankings within classes, against a dense computation of every pattern."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.errors import DualHookError
from dualhook.statistics import agreement, spread, votes
from dualhook.summaries import Ranking, Totals
from dualhook.table import Table

N, CLASSES, EPOCHS = 21, 3, 4
DEFINITIONS = ("weight", "abs_weight", "contribution", "abs_contribution")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("dualhook.query.streaming.BLOCK_ROWS", 5)
    monkeypatch.setattr("dualhook.query.streaming.TASK_ROWS", 12)


@pytest.fixture(scope="module")
def case():
    """An attention of five queries, and of every layer the dense scores [q, n], classes, samples and steps [n]."""
    torch.manual_seed(1)
    images, labels = torch.randn(N, 6, dtype=torch.float64), torch.arange(N) % CLASSES
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    keys, gradients, samples, steps = {0: [], 2: []}, {0: [], 2: []}, [], []
    recorder = dualhook.instrument(model, verbose=False)
    for _ in range(EPOCHS):
        for rows in torch.randperm(N).split(5):
            with recorder.batch(samples=rows):
                optimizer.zero_grad()
                hidden = model[0](images[rows])
                seen = model[1](hidden)
                output = model[2](seen)
                hidden.retain_grad()
                output.retain_grad()
                F.cross_entropy(output, labels[rows]).backward()
            for layer, key, grad in ((0, images[rows], hidden.grad), (2, seen.detach(), output.grad)):
                keys[layer].append(key)
                gradients[layer].append(grad.clone())
            samples.append(rows)
            steps += [recorder.steps + 1] * len(rows)
            optimizer.step()
    memory = recorder.close()
    memory.add_column("label", labels)
    queries = torch.randn(5, 6, dtype=torch.float64)
    hidden = model[0](queries)
    hidden.retain_grad()
    seen = model[1](hidden)
    output = model[2](seen)
    target = output.argmax(1)
    output.gather(1, target[:, None]).sum().backward()
    sample = torch.cat(samples)
    scores = {}
    for layer, query, along in ((0, queries, hidden.grad), (2, seen.detach(), F.one_hot(target, CLASSES).double())):
        weight = query @ torch.cat(keys[layer]).T + 1  # the bias
        contribution = weight * (along @ (-0.3 * torch.cat(gradients[layer])).T)
        scores[str(layer)] = {
            "weight": weight.detach().numpy(),
            "abs_weight": weight.abs().detach().numpy(),
            "contribution": contribution.detach().numpy(),
            "abs_contribution": contribution.abs().detach().numpy(),
        }
    about = {"label": labels[sample].numpy(), "sample": sample.numpy(), "step": np.array(steps)}
    return memory.attend(model, queries), scores, about, target.numpy()


def class_totals(scores, labels):
    return np.stack([scores[:, labels == label].sum(1) for label in range(CLASSES)], 1)


@pytest.mark.parametrize("by", DEFINITIONS)
def test_votes_are_the_classes_with_the_largest_total(case, by):
    attention, scores, about, _ = case
    found = attention.vote("label", by=by)
    for layer, dense in scores.items():
        totals = class_totals(dense[by], about["label"])
        own = found.where(layer=layer)
        assert own["label"].tolist() == totals.argmax(1).tolist()
        assert own["total"] == pytest.approx(totals.max(1))
        assert own["share"] == pytest.approx(totals.max(1) / np.abs(totals).sum(1))


def test_predictive_power_by_every_definition(case):
    attention, scores, about, output = case
    targets = np.where(np.arange(5) < 3, output, (output + 1) % CLASSES)
    found = attention.predictive_power("label", targets=targets)
    assert len(found) == 2 * 4 * 3
    for row in found:
        vote = class_totals(scores[row["layer"]][row["by"]], about["label"]).argmax(1)
        among = {"all": slice(None), "correct": slice(0, 3), "wrong": slice(3, 5)}[row["predictions"]]
        assert row["queries"] == len(vote[among])
        assert row["equals_target"] == pytest.approx((vote == targets)[among].mean())
        assert row["equals_output"] == pytest.approx((vote == output)[among].mean())


def test_spread_is_the_normalised_variance(case):
    attention, scores, about, _ = case
    found = attention.spread("label")
    for layer, dense in scores.items():
        for by in DEFINITIONS:
            totals = class_totals(dense[by], about["label"])
            expected = totals.var(1) / np.abs(totals).mean(1) ** 2
            assert found.where(layer=layer)[by] == pytest.approx(expected)


@pytest.mark.parametrize("by", DEFINITIONS)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 4, 100])
def test_the_strongest_patterns_of_each_class(case, by, largest, k):
    attention, scores, about, _ = case
    found = attention.top_by("label", k, by=by, largest=largest)
    for layer, dense in scores.items():
        for q in range(5):
            for label in range(CLASSES):
                among = np.flatnonzero(about["label"] == label)
                values = dense[by][q, among].round(9)
                order = among[np.lexsort((among, -values if largest else values))][:k]
                own = found.where(query=q, layer=layer, label=label)
                assert dense[by][q, own["pattern"]] == pytest.approx(dense[by][q, order])
                assert own["rank"].tolist() == list(range(1, len(order) + 1))
                assert (about["label"][own["pattern"]] == label).all()
                assert own["step"].tolist() == about["step"][own["pattern"]].tolist()
                assert own["contribution"] == pytest.approx(dense["contribution"][q, own["pattern"]])


@pytest.mark.parametrize("by", DEFINITIONS)
@pytest.mark.parametrize("largest", [True, False])
def test_the_strongest_samples_over_all_their_repeats(case, by, largest):
    attention, scores, about, _ = case
    found = attention.sum_by("sample", top=4, by=by, largest=largest)
    for layer, dense in scores.items():
        for q in range(5):
            totals = np.array([dense[by][q, about["sample"] == sample].sum() for sample in range(N)])
            order = np.argsort(-totals if largest else totals, kind="stable")[:4]
            own = found.where(query=q, layer=layer)
            assert own["sample"].tolist() == order.tolist()
            assert own[by] == pytest.approx(totals[order])


def test_several_questions_in_one_pass_give_what_each_gives(case):
    attention, *_ = case
    top, totals = attention.gather(Ranking(3, "weight"), Totals(("label", "step")))
    for found, alone in ((top, attention.top(3, by="weight")), (totals, attention.sum_by(["label", "step"]))):
        assert found.columns == alone.columns
        assert all((found[name] == alone[name]).all() for name in found.columns)


def test_patterns_without_a_class_have_no_vote():
    rows = [(0, "fc", "unknown", 9.0), (0, "fc", "a", -2.0), (0, "fc", "b", 1.0)]
    table = Table(
        {n: [row[k] for row in rows] for k, n in enumerate(("query", "layer", "class"))}
        | {by: [row[3] for row in rows] for by in DEFINITIONS}
    )
    found = votes(table, "class", "weight")
    assert (found["class"].tolist(), found["share"].tolist()) == (["b"], [pytest.approx(1 / 3)])
    assert agreement([found], "class", ["b"], ["a"])["equals_target"].tolist() == [1.0, None, 1.0]
    assert spread(table, "class")["weight"] == pytest.approx([2.25 / 2.25])


def test_what_does_not_fit_is_said(case):
    attention, *_ = case
    with pytest.raises(DualHookError, match="by='size'"):
        attention.vote("label", by="size")
    with pytest.raises(DualHookError, match="top=0"):
        attention.sum_by("sample", top=0)
    with pytest.raises(DualHookError, match="targets of shape"):
        attention.predictive_power("label", targets=[0])
    with pytest.raises(DualHookError, match="no column"):
        attention.top_by("colour")


def test_plots_name_what_they_show(case):
    attention, *_ = case
    for axes, label, unit in (
        (attention.plot(1, 3), "layer · sample · step", "contribution / logit"),
        (attention.vote("label").plot(), "query · layer · label", "share of all groups' absolute totals"),
        (
            attention.predictive_power("label", targets=[0] * 5).plot(),
            "layer · by · predictions",
            "share of predictions",
        ),
    ):
        assert axes.get_ylabel() == label
        assert axes.get_xlabel().startswith(unit)
        assert len(axes.patches) > 0


def test_notebooks_show_what_was_asked(case):
    attention, *_ = case
    assert "Attention of 5 queries" in attention._repr_html_()
    assert attention._repr_html_().count("<tr>") == 6
