"""dattri's own metrics, evaluating a recorded memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from blobs import SAMPLES, blobs, trained
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

pytest.importorskip("dattri", reason="dattri is not installed: pip install 'dualhook[dattri]'")

from dattri.algorithm.tracin import TracInAttributor
from dattri.benchmark.utils import SubsetSampler
from dattri.metric import lds, mislabel_detection_auc
from dattri.task import AttributionTask
from dualhook.integrations.dattri import DualMemoryAttributor

from dualhook import DualHookError
from dualhook.evaluate import datamodelling_score, random_subsets
from dualhook.evaluate.statistics import area_under_roc


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = blobs()
    return data, *trained(data, tmp_path_factory.mktemp("run") / "memory")


def loaders(data):
    queries = TensorDataset(data.queries, data.labels)
    return DataLoader(data.dataset, 7, shuffle=False), DataLoader(queries, 4, shuffle=False)


def test_scores_are_the_influence_in_the_orders_of_the_loaders(run):
    data, model, memory = run
    train, test = loaders(data)
    expected = memory.influence(model, data.queries, target=data.labels)
    whole = torch.zeros(SAMPLES, len(data.queries))
    whole[torch.from_numpy(expected.samples)] = expected.scores.T.float()
    attributor = DualMemoryAttributor(model, memory)
    attributor.cache(train)
    torch.testing.assert_close(attributor.attribute(train, test), whole)
    chosen = [31, 2, 17]
    part = DataLoader(data.dataset, 2, sampler=SubsetSampler(chosen))
    torch.testing.assert_close(attributor.attribute(part, test), whole[chosen])


def test_scores_have_the_sign_of_dattris_own(run):
    data, model, memory = run

    def loss(parameters, given):
        point, label = given
        return F.cross_entropy(torch.func.functional_call(model, parameters, point[None]), label[None])

    attributor = TracInAttributor(
        AttributionTask(loss, model, model.state_dict()), torch.ones(1), normalized_grad=False
    )
    theirs = attributor.attribute(*loaders(data))
    ours = DualMemoryAttributor(model, memory, of="loss", method="contribution").attribute(*loaders(data))
    assert theirs.shape == ours.shape
    assert np.corrcoef(theirs.flatten().numpy(), ours.flatten().numpy())[0, 1] > 0.5


def test_its_datamodelling_score_is_ours(run):
    data, model, memory = run
    kept = random_subsets(SAMPLES, 10, 0.5)
    logits = [trained(data, kept=row)[0](data.queries).detach() for row in kept]
    outcomes = -torch.stack([F.cross_entropy(own, data.labels, reduction="none") for own in logits])
    scores = DualMemoryAttributor(model, memory).attribute(*loaders(data))
    found, _ = lds(scores, (outcomes, torch.stack([torch.from_numpy(row.nonzero()[0]) for row in kept])))
    np.testing.assert_allclose(found.numpy(), datamodelling_score(scores.T, kept, outcomes), atol=1e-5)
    assert found.mean() > 0.3


def test_its_mislabel_detection_takes_self_attributions(run):
    data, model, memory = run
    scores = DualMemoryAttributor(model, memory).self_attribute(loaders(data)[0])
    area, _ = mislabel_detection_auc(scores, data.wrong)
    assert float(area) == pytest.approx(area_under_roc(scores.numpy(), data.wrong.numpy()), abs=1e-5)
    assert area > 0.8


def test_what_does_not_fit_is_refused(run, tmp_path):
    data, model, memory = run
    train, test = loaders(data)
    attributor = DualMemoryAttributor(model, memory)
    with pytest.raises(DualHookError, match="the training loader shuffles"):
        attributor.attribute(DataLoader(data.dataset, shuffle=True), test)
    with pytest.raises(DualHookError, match="knows sample 47, the training loader's data set has 10 rows"):
        attributor.attribute(DataLoader(Subset(data.dataset, range(10))), test)
    other, memory = trained(data, tmp_path / "memory", optimizer=torch.optim.Rprop)
    with pytest.raises(DualHookError, match="no self-influence is known"):
        DualMemoryAttributor(other, memory).self_attribute(train)
