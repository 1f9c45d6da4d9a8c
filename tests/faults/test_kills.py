"""Killed at any moment: what was promised is there, what is there is right, and going on ends as if nothing had been.

``DUALHOOK_KILLS=200`` kills so often; the gate does it a few times.
"""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from faults import loop
from torch import Tensor

import dualhook
from dualhook.store import inspected

KILLS = int(os.environ.get("DUALHOOK_KILLS", "24"))
SECONDS = 0.7  # what a run takes, about
FIELDS = ("key", "output_grad", "step", "sample", "position")


class Warm:
    """The process that has everything imported, and runs and kills."""

    def __init__(self) -> None:
        settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, loop.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings
        )
        assert self._process.stdout.readline() == "warm\n"

    def run(self, scenario: str, folder: Path, seconds: float) -> dict:
        order = {"scenario": scenario, "folder": str(folder), "seconds": seconds}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        told = json.loads(self._process.stdout.readline())
        assert not told["failed"], told["failed"]
        return told

    def close(self) -> None:
        with self._process as process:  # closes its pipes and waits
            process.stdin.close()


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    process = Warm()
    yield process
    process.close()


@lru_cache
def reference(scenario: str) -> tuple[list[dict[str, Tensor]], dualhook.DualMemory]:
    """The weights after every step of a run that nothing records, and the memory of one with room for all of it."""
    model = loop.network()
    weights = [copy.deepcopy(model.state_dict())]
    optimizer = loop.SCENARIOS[scenario].optimizer(model.parameters())
    steps = range(1, loop.STEPS + 1)
    loop.train(model, optimizer, None, steps, lambda step: weights.append(copy.deepcopy(model.state_dict())))
    model = loop.network()
    recorder = dualhook.instrument(model, verbose=False)
    loop.train(model, loop.SCENARIOS[scenario].optimizer(model.parameters()), recorder, steps)
    return weights, recorder.close()


def check(path: Path, scenario: str, kept: int, draw: random.Random) -> int:
    """Everything that a memory which was cut off has to be; how far it reaches."""
    if not kept and not (path / "dualhook.json").exists():
        return 0  # killed before there was a memory
    weights, whole = reference(scenario)
    files = sorted(path.rglob("*"))
    memory = dualhook.load(path)
    first, last = memory._store.first_step, memory.steps
    assert not inspected(memory._store.layout, memory._store.manifest, deep=True).damage
    assert last >= kept, "a step was lost that flush() had put on disk"
    for layer in memory.layers:
        there, expected = (
            list(one._store.blocks(layer, first_step=first + 1, last_step=last, block_rows=10**6))
            for one in (memory, whole)
        )
        assert bool(there) == bool(expected)
        if there:
            one, other = (rows[0].joined(*rows[1:]) for rows in (there, expected))
            assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS), layer
    for step in {last, draw.randint(first, last)}:
        for name, value in memory.state_dict(step).items():
            torch.testing.assert_close(value, weights[step][name], rtol=1e-9, atol=1e-12)
    latest = memory._store.latest()
    if latest is not None:
        assert latest[0] <= last
        assert all(torch.equal(value, weights[latest[0]][name]) for name, value in latest[1].items())
    assert sorted(path.rglob("*")) == files, "reading has changed the directory"
    return last


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize("scenario", loop.SCENARIOS)
def test_nothing_is_lost_and_nothing_wrong_however_often_it_is_killed(tmp_path, warm, scenario):
    draw = random.Random(scenario)
    kills = runs = 0
    while kills < KILLS // len(loop.SCENARIOS):
        folder = tmp_path / str(runs)
        folder.mkdir()
        seconds = SECONDS
        while not (told := warm.run(scenario, folder, draw.uniform(0, seconds)))["done"]:
            kills += told["killed"]
            seconds *= 1.2  # a machine that is busy gets to the end as well
            check(folder / "memory", scenario, told["kept"], draw)
        kills += told["killed"]  # after its last word
        runs += 1
        weights, whole = reference(scenario)
        assert check(folder / "memory", scenario, loop.STEPS, draw) == loop.STEPS
        memory = dualhook.load(folder / "memory")
        assert memory.verify()["exact"].all()
        assert memory.columns == [*whole.columns, "label"]
        for name, history in whole._store.histories.items():
            found, origin = memory._store.histories[name], memory._store.origin_steps[name]
            assert torch.equal(found.scale, history.scale[history.step > origin])
            assert torch.equal(found.mark, history.mark[history.step > origin])
        latest = memory._store.latest()
        assert latest[0] == loop.STEPS
        assert all(torch.equal(value, weights[-1][name]) for name, value in latest[1].items())
        assert not list(folder.rglob("*.partial"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")
@pytest.mark.parametrize("scenario", loop.SCENARIOS)
def test_a_memory_that_is_being_compacted_is_the_old_or_the_new_one_when_it_is_killed(tmp_path, warm, scenario):
    draw = random.Random(scenario)
    loop.whole_run(scenario, tmp_path, lambda text: None)
    path, interrupted = tmp_path / "memory", 0
    for _ in range(KILLS // len(loop.SCENARIOS)):
        assert warm.run("", tmp_path, draw.uniform(0.05, 0.5 * SECONDS))["killed"]
        interrupted += len(list(path.glob("segments*"))) > 1
        assert check(path, scenario, loop.STEPS, draw) == loop.STEPS
    assert interrupted
    memory = dualhook.compact(path)
    assert check(path, scenario, loop.STEPS, draw) == loop.STEPS
    assert memory.verify()["exact"].all()
    assert len(list(path.glob("segments*"))) == 1
    assert not list(path.rglob("*.partial"))
