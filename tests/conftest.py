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
    "gate", derandomize=True, max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))


LONG = ("test_trainer", "test_torchvision", "test_compiled", "test_compile", "test_examples", "test_executors",
        "test_kills", "test_every_kind_together", "test_distributed", "test_together", "test_packaging")  # fmt: skip
"""The files that take longest begin: the last one of a run has no other beside it."""


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist would begin with those of most tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONG)


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
