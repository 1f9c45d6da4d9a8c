from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel

from dualhook.capture import select_layers, unwrapped
from dualhook.errors import LayerError


class Special(nn.Linear):
    pass


def network() -> nn.Module:
    return nn.ModuleDict(
        {
            "block1": nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}),
            "block2": nn.ModuleDict({"up": nn.Linear(4, 8), "down": Special(8, 4, bias=False)}),
            "norm": nn.LayerNorm(4),
            "classifier": nn.Linear(4, 3),
        }
    )


ALL = ["block1.up", "block1.down", "block2.up", "block2.down", "classifier"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, ALL),
        ("all", ALL),
        ("head", ["classifier"]),
        ("classifier", ["classifier"]),
        ("*.up", ["block1.up", "block2.up"]),
        ("block2", ["block2.up", "block2.down"]),
        (["block2", "classifier"], ["block2.up", "block2.down", "classifier"]),
        (Special, ["block2.down"]),
        ([Special, "block1.*"], ["block1.up", "block1.down", "block2.down"]),
        (lambda name, module: module.out_features == 8, ["block1.up", "block2.up"]),
    ],
)
def test_ways_to_choose(layers, expected):
    selection = select_layers(network(), layers)
    assert [spec.name for spec in selection.specs] == expected
    assert set(selection.reasons) == set(ALL) - set(expected)


def test_specs_name_parameters_and_shapes():
    spec = select_layers(network(), "block2.down").specs[0]
    assert (spec.name, spec.in_features, spec.out_features) == ("block2.down", 8, 4)
    assert (spec.weight, spec.bias) == ("block2.down.weight", None)
    assert select_layers(nn.Linear(2, 3), None).specs[0].name == "(model)"


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("clasifier", "no linear map matches 'clasifier': did you mean 'classifier'"),
        (["block1", "xyz"], "no linear map matches 'xyz': the model has block1.up, block1.down"),
        (nn.Conv2d, "no linear map of type Conv2d: the model has"),
        (lambda name, module: False, "the predicate given as layers= chose none of"),
    ],
)
def test_choices_that_match_nothing(layers, words):
    with pytest.raises(LayerError, match=words):
        select_layers(network(), layers)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.LayerNorm(3), "LayerNorm has no linear map to record: expected at least one torch.nn.Linear"),
        (
            nn.Conv2d(1, 1, 3),
            r"of other kinds only \(model\): record them with layers='all'",
        ),
        (nn.LazyLinear(3), "shape is not known before the first forward pass: run one, then instrument"),
        (weight_norm(nn.Linear(2, 3)), "computed from other parameters"),
        (nn.Linear(2, 3, dtype=torch.complex64), "dtype torch.complex64 are not recorded"),
    ],
)
def test_models_without_a_linear_map_to_record(model, words):
    with pytest.raises(LayerError, match=words):
        select_layers(model, None)


def test_a_layer_that_cannot_be_recorded_says_why_when_named():
    model = nn.Sequential(nn.Linear(2, 2), weight_norm(nn.Linear(2, 2)))
    assert [spec.name for spec in select_layers(model, None).specs] == ["0"]
    with pytest.raises(LayerError, match="layer '1' cannot be recorded: its weight is computed"):
        select_layers(model, "1")


def test_shared_weights_are_one_layer_if_the_bias_is_shared_too():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    model[1].weight = model[2].weight = model[0].weight
    selection = select_layers(model, None)
    assert [(tapped.spec.name, tapped.module) for tapped in selection.layers] == [("0", model[0]), ("0", model[1])]
    assert "shares its weight with 0 but not its bias" in selection.reasons["2"]


def test_wrappers_of_torch_are_looked_through():
    model = network()
    assert unwrapped(nn.DataParallel(model)) is model
    assert [spec.name for spec in select_layers(unwrapped(AveragedModel(model)), None).specs] == ALL
