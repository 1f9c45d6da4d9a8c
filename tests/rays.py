"""A Ray of this machine for a test, and what its workers are told to do."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

MISSING = "ray is not installed: pip install 'dualhook[ray]'"


@contextmanager
def local_ray(cpus: int) -> Iterator[Any]:
    """Ray with so many workers, which import what the tests import."""
    ray = pytest.importorskip("ray", reason=MISSING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
        )
        try:
            yield ray
        finally:
            ray.shutdown()


def die(*given: Any) -> None:
    """End the process that does this, whatever it is given."""
    os._exit(1)


def die_once(path: Path) -> str:
    """End the first process that does this."""
    if not path.exists():
        path.touch()
        die()
    return "done"


def resources() -> dict[str, float]:
    """What Ray has set aside for the call."""
    return import_module("ray").get_runtime_context().get_assigned_resources()


def linger(begun: Path) -> None:
    """Half a minute of instructions."""
    begun.touch()
    for _ in range(3000):
        time.sleep(0.01)


def fail(error: Exception) -> None:
    """Raise it."""
    raise error
