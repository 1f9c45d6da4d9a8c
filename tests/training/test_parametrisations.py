"""Weights that are computed from other parameters are not recorded, and the table says why."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from training.ways import PATTERNS, STEPS, Net, net, plain, same

import dualhook


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


MAKERS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "one's own": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "old weight_norm": torch.nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MAKERS)
def test_it_is_refused_with_the_reason_and_its_neighbours_are_recorded(name):
    def make() -> Net:
        model = net()
        torch.manual_seed(5)
        MAKERS[name](model.first)
        return model

    model, bare = make(), make()
    recorder = dualhook.instrument(model, verbose=False)
    notes = {row["parameter"]: row["note"] for row in recorder.coverage if row["layer"] is None}
    assert notes
    assert all(parameter.startswith("first.") for parameter in notes)
    assert any("computed from other parameters" in note for note in notes.values()), notes
    torch.manual_seed(6)
    plain(model, recorder.track)
    torch.manual_seed(6)
    plain(bare, lambda data: data)
    assert same(model, bare)
    memory = recorder.close()
    assert memory.layers == ["head"]
    assert memory.steps == STEPS
    assert memory.patterns("head") == PATTERNS
    assert memory.verify().max_error < 1e-5
    assert not any(memory.verify()["inexact_steps"])


def test_a_model_of_nothing_else_is_refused():
    with pytest.raises(dualhook.DualHookError, match="computed from other parameters"):
        dualhook.instrument(parametrizations.weight_norm(nn.Linear(3, 2)), verbose=False)
