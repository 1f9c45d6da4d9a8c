"""What the tests of faults share: keys of any size are stored once."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="module")
def small_keys():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualhook.store.pool.WORTH_BYTES", 1)
        yield
