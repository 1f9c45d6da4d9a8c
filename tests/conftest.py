"""What every test shares: few threads, fixed seeds, the Hypothesis profiles."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from hypothesis import HealthCheck, settings

from dualhook.recorder.front import OPEN

# The same examples in every run of the gate; HYPOTHESIS_PROFILE=search looks for new ones, and for longer.
settings.register_profile(
    "gate", derandomize=True, max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tests' matrices are small


@pytest.fixture(autouse=True)
def alone():
    """No recorder that a test leaves open sees the steps of the next one, and none leaves a thread behind."""
    yield
    for recorder in list(OPEN.values()):
        recorder.discard()
    assert threads() == []


def threads() -> list[str]:
    """Our threads."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dualhook")]
