"""One writer at a time, and none that has died stands in the way."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dualhook
from dualhook.errors import StoreError

WRITER = textwrap.dedent("""
    import sys, torch, dualhook
    model = torch.nn.Linear(3, 2)
    recorder = dualhook.instrument(model, sys.argv[1], verbose=False)
    model(torch.ones(2, 3)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    recorder.flush()
    torch.save(model.state_dict(), sys.argv[1] + ".pt")
    print("ready", flush=True)
    sys.stdin.read()
""")


def test_a_second_writer_is_refused_until_the_first_one_has_died(tmp_path):
    path = tmp_path / "m"
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    first = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=settings,
    )  # fmt: skip
    with first:
        assert first.stdout.readline() == "ready\n"
        model = nn.Linear(3, 2)
        model.load_state_dict(torch.load(f"{path}.pt"))
        files = sorted(path.rglob("*"))
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(StoreError, match="m is being written: close"):
                dualhook.instrument(model, path, verbose=False, **options)
        assert sorted(path.rglob("*")) == files
        assert dualhook.load(path).steps == 1  # readers come and go
        first.kill()
    with dualhook.instrument(model, path, resume=True, verbose=False) as recorder:
        assert recorder.steps == 1


def test_the_lock_goes_with_the_recorder_whatever_ends_it(tmp_path):
    model = nn.Linear(3, 2)
    for end in ("close", "discard", "close_alone"):
        recorder = dualhook.instrument(model, tmp_path / end, verbose=False)
        with pytest.raises(StoreError, match="is being written"):
            dualhook.compact(tmp_path / end)
        getattr(recorder, end)()
        dualhook.compact(tmp_path / end)
    with pytest.raises(StoreError, match="cannot go on"):  # a recording that does not begin holds nothing
        dualhook.instrument(model, tmp_path / "close", resume=True, verbose=False)
    dualhook.compact(tmp_path / "close")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")
def test_forked_workers_hold_no_lock(tmp_path):
    model = nn.Linear(3, 2)
    recorder = dualhook.instrument(model, tmp_path / "m", verbose=False)
    loader = DataLoader(
        TensorDataset(torch.randn(4, 3)), num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    )
    batches = iter(loader)
    next(batches)
    with pytest.raises(StoreError, match="is being written"):
        dualhook.compact(tmp_path / "m")
    recorder.close()
    dualhook.compact(tmp_path / "m")  # the worker lives
    assert batches._workers[0].is_alive()
    batches._shutdown_workers()
