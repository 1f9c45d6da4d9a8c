"""quanda's own metrics, evaluating a recorded memory."""

from __future__ import annotations

import pytest
import torch
from blobs import BATCH, SAMPLES, blobs, trained
from torch import nn
from torch.utils.data import Subset

pytest.importorskip("quanda", reason="quanda is not installed: pip install 'dualhook[quanda]'")

from dualhook.integrations.quanda import DualMemoryExplainer
from quanda.metrics.downstream_eval import ClassDetectionMetric, MislabelingDetectionMetric
from quanda.metrics.ground_truth import LinearDatamodelingMetric

from dualhook import DualHookError
from dualhook.evaluate import datamodelling_score, random_subsets
from dualhook.evaluate.statistics import area_under_roc


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = blobs()
    return data, *trained(data, tmp_path_factory.mktemp("run") / "memory")


@pytest.mark.parametrize("method", ["decayed", "cosine", "contribution"])
def test_explanations_are_the_influence_in_the_order_of_the_training_set(run, method):
    data, model, memory = run
    explainer = DualMemoryExplainer(model, data.dataset, memory=memory, method=method)
    found = explainer.explain(data.queries, data.labels.tolist())
    expected = memory.influence(model, data.queries, target=data.labels, method=method)
    assert found.shape == (len(data.queries), SAMPLES)
    torch.testing.assert_close(found[:, torch.from_numpy(expected.samples)], expected.scores.float())


def test_class_detection_judges_it(run):
    data, model, memory = run
    metric = ClassDetectionMetric(model, data.dataset, s=3)
    metric.update(
        DualMemoryExplainer(model, data.dataset, memory=memory).explain(data.queries, data.labels), data.labels
    )
    assert metric.compute()["score"] > 0.8  # a third by chance


def test_mislabeling_detection_makes_its_own_explainer(run):
    data, model, memory = run
    wrong = data.wrong.nonzero().squeeze(1).tolist()
    metric = MislabelingDetectionMetric(
        model, data.dataset, wrong, explainer_cls=DualMemoryExplainer, expl_kwargs={"memory": memory}
    )
    explainer = DualMemoryExplainer(model, data.dataset, memory=memory)
    scores, table = explainer.self_influence(), memory.suspects(SAMPLES)
    for sample, value in zip(table["sample"], table["self_influence"], strict=True):
        assert float(scores[sample]) == pytest.approx(value, rel=1e-6)
    assert area_under_roc(scores.numpy(), data.wrong.numpy()) > 0.8
    assert metric.compute()["score"] > 0.8  # a half by chance


def test_its_datamodelling_score_is_ours(run, tmp_path):
    data, model, memory = run
    kept, outcomes, files = random_subsets(SAMPLES, 10, 0.5), [], []
    for number, row in enumerate(kept):
        other, _ = trained(data, kept=row)
        files.append(str(tmp_path / f"{number}.ckpt"))
        torch.save(other.state_dict(), files[-1])
        logits = other(data.queries).detach()
        own = logits.gather(1, data.labels[:, None])
        others = logits.scatter(1, data.labels[:, None], -torch.inf).logsumexp(1, keepdim=True)
        outcomes.append((own - others)[:, 0])
    metric = LinearDatamodelingMetric(
        model, data.dataset, m=len(kept), subset_ids=[row.nonzero()[0].tolist() for row in kept],
        subset_ckpt_filenames=files, cache_dir=str(tmp_path), batch_size=BATCH,
    )  # fmt: skip
    scores = DualMemoryExplainer(model, data.dataset, memory=memory).explain(data.queries, data.labels)
    metric.update(scores, data.labels, data.queries)
    ours = datamodelling_score(scores, kept, torch.stack(outcomes)).mean()
    assert metric.compute()["score"] == pytest.approx(ours, abs=1e-5)
    assert ours > 0.3


def test_where_the_rows_do_not_tell_the_training_set_is_explained(tmp_path):
    data = blobs()
    model, memory = trained(data, tmp_path / "memory", optimizer=torch.optim.Rprop)
    explainer = DualMemoryExplainer(model, data.dataset, memory=memory, method="cosine")
    points, labels = data.dataset.tensors
    expected = memory.influence(model, points, target=labels, method="cosine").scores.diagonal()
    torch.testing.assert_close(explainer.self_influence(), expected.float(), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(run):
    data, model, memory = run
    with pytest.raises(DualHookError, match="expected rows 0 to 9 of train_dataset, got row 47"):
        DualMemoryExplainer(model, Subset(data.dataset, range(10)), memory=memory)
    with pytest.raises(ValueError, match="not supported"):
        DualMemoryExplainer(model, data.dataset, memory=memory, task="causal_lm")
    with pytest.raises(DualHookError, match="expected the recorded"):
        DualMemoryExplainer(nn.Linear(5, 3), data.dataset, memory=memory).explain(data.queries, data.labels)
