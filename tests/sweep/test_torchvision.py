"""Every classification family of torchvision, recorded whole."""

from __future__ import annotations

import pytest
import torchvision
from sweep.harness import check
from sweep.torchvision_families import FAMILIES

CASES = {(family, member): case for family, members in FAMILIES.items() for member, case in members.items()}


def test_every_family_that_torchvision_registers_is_swept():
    names = torchvision.models.list_models(module=torchvision.models)
    registered = {torchvision.models.get_model_builder(name).__module__.rpartition(".")[2] for name in names}
    assert registered == set(FAMILIES)
    for (family, member), case in CASES.items():
        assert type(case.build()).__module__ == f"torchvision.models.{family}", member


@pytest.mark.parametrize(("family", "member"), CASES)
def test_every_map_is_rebuilt_and_the_rest_is_as_expected(family, member):
    check(CASES[family, member])
