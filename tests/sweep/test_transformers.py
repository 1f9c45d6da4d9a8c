"""Hugging Face models of every sort, recorded whole."""

from __future__ import annotations

import pytest
from sweep.harness import check
from sweep.transformers_families import FAMILIES

CASES = {(family, member): case for family, members in FAMILIES.items() for member, case in members.items()}


@pytest.mark.parametrize(("family", "member"), CASES)
def test_every_map_is_rebuilt_and_the_rest_is_as_expected(family, member):
    check(CASES[family, member])
