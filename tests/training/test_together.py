"""What several processes agree on, what they refuse, and that one of them alone never waits for the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from process_cases import every_case
from processes import BATCH, WORLD, together

import dualhook
from dualhook.records import Mark


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("cases")
    together(found, every_case)
    return found


@pytest.fixture(params=range(WORLD))
def found(folder, request) -> dict:
    return json.loads((folder / f"found-{request.param}.json").read_text())


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("fold", "on_full='fold' with 2 processes"),
        ("taken", "exists and is not empty, but holds no memory"),
        ("elsewhere", "is not the same directory for all processes"),
        ("join", "model.join(): processes that run out of data take no steps"),
        ("zero", "ZeroRedundancyOptimizer steps on other parameters in every process"),
        ("late", "sharded after instrument(): call fully_shard first"),
    ],
)
def test_what_cannot_be_recorded_is_refused_by_every_process(found, case, expected):
    assert expected in found["refusals"][case]


def test_an_initialised_process_group_alone_changes_nothing(found):
    assert found["by_itself"]["error"] < 1e-9
    assert found["by_itself"]["columns"] == ["step", "sample", "position"]
    assert found["by_itself"]["ranks"] is None


def test_a_recorder_that_is_open_when_its_process_ends_has_lost_nothing(folder):
    for rank in range(WORLD):
        memory = dualhook.load(folder / f"open-{rank}")
        assert (memory.steps, memory.patterns("0")) == (3, 3 * BATCH)
        assert memory.verify().max_error < 1e-9


def test_a_memory_without_a_path_is_one_and_goes_with_process_0(folder, found):
    paths = {json.loads((folder / f"found-{rank}.json").read_text())["temporary"]["path"] for rank in range(WORLD)}
    assert len(paths) == 1
    assert not Path(paths.pop()).exists()
    assert found["temporary"]["error"] < 1e-9
    assert found["temporary"]["kept"] == 3 * 3 * WORLD


def test_the_budget_is_that_of_all_and_ends_at_one_step(folder, found):
    other = json.loads((folder / "found-0.json").read_text())["stopped"]
    assert found["stopped"] == other
    assert 1 <= other["steps"] < 8
    assert other["patterns"] == other["steps"] * 3 * WORLD
    assert other["error"] < 1e-9
    assert len(other["texts"]) == 1


def test_a_mistake_of_ours_in_one_process_stops_all_recorders_and_no_training(folder, found):
    first, second = (json.loads((folder / f"found-{rank}.json").read_text())["broken"] for rank in range(WORLD))
    for case in (first, second):
        assert case["stopped"]
        assert case["on_disk"] == 2  # the step whose rows one of them has lost counts for none
        assert case["alike"]
        assert len(case["told"]) == 1
    assert first["recorded"] == second["recorded"]
    assert (first["error"], second["error"]) == ("StoreError", "ZeroDivisionError")


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_process_that_leaves_by_an_exception_waits_for_nobody(found, name):
    assert found[f"crashed-{name}"]["seconds"] < 1.5
    assert found[f"crashed-{name}"]["steps"] == 2
    assert found[f"crashed-{name}"]["error"] < 1e-9


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_flush_in_between_shows_every_process_the_same_steps(found, name):
    case = found[f"flushed-{name}"]
    assert (case["steps"], case["later"]) == (2, 4)
    assert case["early"] < 1e-9
    assert case["error"] < 1e-9


def test_a_change_in_one_shard_is_marked(found):
    first, second = found["changed"]["marks"]
    assert not first & Mark.CHANGED
    assert second & Mark.CHANGED


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_what_a_tap_of_any_process_does_not_see_is_recorded_by_none(found, name):
    case = found[f"audited-{name}"]
    assert case["layers"] == ["head"]
    for layer in ("first", "second"):
        assert case["notes"][f"{layer}.weight"] == "used in Mm, which no tap sees"
    assert case["error"] < 1e-9


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_all_go_on_from_a_checkpoint(found, name):
    case = found[f"resumed-{name}"]
    assert "off by" in case["far"]
    assert "after step 2" in case["far"]
    assert (case["steps"], case["patterns"]) == (4, 4 * BATCH * WORLD)
    assert case["exact"]
    assert case["error"] < 1e-9
    assert [mark & Mark.FRESH for mark in case["marks"]] == [Mark.FRESH, 0, 0, 0]
