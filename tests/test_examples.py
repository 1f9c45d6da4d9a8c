"""The examples run as a user would run them; each ends in an assert of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
WAYS = {"language_model": (["--passages", "60"], ["--passages", "60", "--model", "lstm", "--carry-state"])}
RUNS = [(path, *way) for path in EXAMPLES for way in WAYS.get(path.stem, ([],))]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: " ".join([run[0].stem, *run[1:]]))
def test_example(run, tmp_path):
    command = [sys.executable, *map(str, run), "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "largest relative error" in done.stdout
    assert "receipt: explained at least" in done.stdout
