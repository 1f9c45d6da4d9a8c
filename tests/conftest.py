"""What every test shares: few threads, fixed seeds, the Hypothesis profiles."""

from __future__ import annotations

import gc
import os
import tempfile
import threading
from pathlib import Path

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


@pytest.fixture(scope="session", autouse=True)
def nothing_left(tmp_path_factory):
    """After all tests no thread of ours runs, no file of theirs is open, no temporary directory of ours is there."""
    folder, before = tmp_path_factory.mktemp("temporary"), tempfile.tempdir
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)  # of child processes too
    yield
    tempfile.tempdir = before
    gc.collect()
    assert threads() == []
    assert open_files(tmp_path_factory.getbasetemp()) == []
    assert [path.name for path in folder.glob("dualhook*")] == []


def threads() -> list[str]:
    """Our threads."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dualhook")]


def open_files(folder: Path) -> list[str]:
    """What this process has open below a folder, mapped files too, by Linux's /proc."""
    handles = Path("/proc/self/fd")
    found = [os.readlink(handle) for handle in handles.iterdir() if handle.is_symlink()] if handles.is_dir() else []
    return sorted(path for path in found if path.startswith(f"{folder}/"))
