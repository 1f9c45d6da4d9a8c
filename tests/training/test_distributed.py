"""Models that several processes train together: one memory, from which the trained weights come out again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from processes import (
    BATCH,
    IGNORED,
    SAMPLES,
    SCENARIOS,
    WORLD,
    batches,
    data,
    every_scenario,
    loader_of,
    network,
    together,
)
from processes import plain as plain_run

import dualhook

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
every = pytest.mark.parametrize("name", SCENARIOS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every scenario once, in one pair of processes."""
    found = tmp_path_factory.mktemp("together")
    together(found, every_scenario)
    return found


def left(folder: Path, name: str, rank: int) -> dict[str, dict]:
    return torch.load(folder / f"{name}-{rank}.pt")


@every
@pytest.mark.parametrize("rank", range(WORLD))
def test_training_is_bit_identical_with_and_without_the_recorder(folder, name, rank):
    found = left(folder, name, rank)
    for weight, value in found["plain"]["weights"].items():
        assert torch.equal(found["recorded"]["weights"][weight], value), weight
    assert torch.equal(found["plain"]["losses"], found["recorded"]["losses"])
    assert torch.equal(found["plain"]["random"], found["recorded"]["random"])


@every
def test_the_scenario_is_what_one_process_makes_of_all_batches(folder, name):
    """The oracle of the others: what was trained is what the tests think was trained."""
    expected = plain_run(SCENARIOS[name])
    for rank in range(WORLD):
        for weight, value in left(folder, name, rank)["recorded"]["weights"].items():
            scale = expected[weight].norm()
            assert (value - expected[weight]).norm() <= 100 * TOLERANCE[SCENARIOS[name].dtype] * scale, weight


@every
def test_the_trained_weights_are_rebuilt_from_the_patterns_of_all_processes(folder, name):
    memory = dualhook.load(folder / name)
    assert memory.layers == ["0", "2", "4", "6"]
    assert memory.steps == SCENARIOS[name].amount * SAMPLES // (WORLD * BATCH * SCENARIOS[name].micro)
    tolerance = TOLERANCE[SCENARIOS[name].dtype]
    trained = left(folder, name, 0)["recorded"]["weights"]
    for weight, value in memory.state_dict().items():
        assert (value - trained[weight]).norm() <= tolerance * trained[weight].norm(), weight
    report = memory.verify()
    assert report.max_error <= tolerance
    assert all(report["exact"])


@every
def test_every_pattern_knows_its_sample_and_its_process(folder, name):
    scenario = SCENARIOS[name]
    store = dualhook.load(folder / name)._store
    (rows,) = store.blocks("0", last_step=10**9, block_rows=10**9)
    inputs = data(scenario.dtype).tensors[0]
    assert torch.equal(rows.key, inputs[rows.sample])
    for rank in range(WORLD):
        loader = loader_of(rank, scenario.dtype)
        drawn = []
        for epoch in range(scenario.amount):
            loader.sampler.set_epoch(epoch)
            drawn += list(loader.sampler)
        labels = torch.cat([labels for _, labels in batches(scenario, rank, loader)])
        expected = [sample for sample, label in zip(drawn, labels.tolist(), strict=True) if label != IGNORED]
        assert rows.sample[rows.columns["rank"] == rank].tolist() == expected


@every
def test_the_scale_of_a_step_is_the_average_over_processes(folder, name):
    scenario = SCENARIOS[name]
    for history in dualhook.load(folder / name)._store.histories.values():
        if scenario.clip is None:
            assert history.scale.tolist() == pytest.approx([1 / WORLD] * len(history), rel=1e-5)
        else:
            assert bool((history.scale < 1 / WORLD).any())


@pytest.mark.parametrize("name", ["ddp", "ddp-adam", "fsdp-adamw"])
def test_questions_add_up_over_processes(folder, name):
    memory = dualhook.load(folder / name)
    model = network(torch.float64)
    model.load_state_dict(left(folder, name, 0)["recorded"]["weights"])
    attention = memory.attend(model, data(torch.float64).tensors[0][:2])
    assert min(attention.explained["explained"]) > 1 - 1e-6
    by_rank, by_step = attention.sum_by("rank"), attention.sum_by("step")
    assert set(by_rank["rank"]) == {0, 1}
    assert np.sum(by_rank["contribution"]) == pytest.approx(np.sum(by_step["contribution"]))


def test_only_process_0_writes_the_ledger(folder):
    names = ["00000000.safetensors", "r0001-00000000.safetensors"]
    keys = [f"keys-{name}" for name in names]  # the inputs of the first epoch, of each process its own
    assert sorted(path.name for path in (folder / "ddp" / "segments").iterdir()) == sorted(names + keys)
