"""Several processes write one memory: its rows come back in the order of the steps, each under one number for ever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from store.test_store import SPEC, entry, everything, rows

from dualhook.errors import StoreError
from dualhook.records import Rows
from dualhook.store import Layout, Manifest, Store, Writer

STEPS = st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=1, max_size=7)
SEALS = st.sets(st.integers(1, 7))


def writers(root: Path, ranks: int = 2) -> list[Writer]:
    layout = Layout(root)
    layout.create(overwrite=False)
    Manifest((SPEC,), {"dualhook": "test"}, ranks).write(layout)
    found = [Writer(layout, rank=rank) for rank in range(ranks)]
    for writer in found:
        values = {name: {"value": torch.ones(2, 3)} for name in SPEC.parameters}
        writer.write_origin(0, values, dict.fromkeys(values, torch.float32))
        writer.write_latest(0, {SPEC.weight: torch.ones(2, 3)})
    return found


def step(writer: Writer, number: int, part: Rows) -> None:
    writer.builder.append(SPEC.name, part)
    writer.builder.commit(SPEC.name, number)
    writer.builder.add(number, [] if writer.rank else [entry(number)])


@given(sizes=STEPS, seals=st.tuples(SEALS, SEALS), block_rows=st.integers(1, 9))
def test_rows_of_all_ranks_come_in_the_order_of_steps_in_any_layout(tmp_path_factory, sizes, seals, block_rows):
    both = writers(tmp_path_factory.mktemp("run") / "memory")
    truth, count = [], 0
    for number, own in enumerate(sizes, start=1):
        for rank, size in enumerate(own):
            part = rows(size, start=count)
            truth += [(number, sample) for sample in part.sample.tolist()]
            count += size
            step(both[rank], number, part)
            if number in seals[rank]:
                both[rank].seal()
    for writer in both:
        writer.close()
    store = Store(both[0].layout.root)
    assert store.last_step == len(sizes)
    assert store.count(SPEC.name) == count
    assert store.histories[SPEC.weight].step.tolist() == list(range(1, len(sizes) + 1))
    if not count:
        return
    found = everything(store, SPEC.name, block_rows)  # numbered from 0 without gaps
    assert list(zip(found.step.tolist(), found.sample.tolist(), strict=True)) == truth
    assert sorted(torch.cat(list(store.coordinates(SPEC.name, "sample"))).tolist()) == list(range(count))
    for first in range(1, len(sizes) + 2):  # from any step on every row keeps its number
        for block in store.blocks(SPEC.name, first_step=first, last_step=len(sizes), block_rows=block_rows):
            numbers = range(block.first, block.first + len(block))
            assert [truth[number] for number in numbers] == list(
                zip(block.step.tolist(), block.sample.tolist(), strict=True)
            )


def test_a_step_counts_once_every_process_has_it_on_disk(tmp_path):
    first, second = writers(tmp_path / "run")
    for number in (1, 2, 3):
        for writer in (first, second):
            step(writer, number, rows(2, start=10 * number + 5 * writer.rank))
        if number == 2:
            second.flush()
    first.close()
    second.close(discard=True)  # killed before its third step was on disk
    store = Store(tmp_path / "run")
    assert store.last_step == 2
    assert store.count(SPEC.name) == 8
    assert store.histories[SPEC.weight].step.tolist() == [1, 2]
    assert everything(store, SPEC.name).sample.tolist() == [10, 11, 15, 16, 20, 21, 25, 26]
    assert sorted(torch.cat(list(store.coordinates(SPEC.name, "sample"))).tolist()) == [10, 11, 15, 16, 20, 21, 25, 26]


def test_a_process_that_has_nothing_on_disk_leaves_no_step(tmp_path):
    first, second = writers(tmp_path / "run")
    step(first, 1, rows(2))
    first.close()
    second.close(discard=True)
    assert Store(tmp_path / "run").last_step == 0
    assert list(Store(tmp_path / "run").blocks(SPEC.name, last_step=9, block_rows=9)) == []


def test_a_column_that_one_process_has_is_absent_in_the_rows_of_the_others(tmp_path):
    first, second = writers(tmp_path / "run")
    step(first, 1, rows(2, task=torch.tensor([7, 8])))
    step(second, 1, rows(1, start=2, loss=torch.tensor([0.5], dtype=torch.float64)))
    for writer in (first, second):
        writer.close()
    found = everything(Store(tmp_path / "run"), SPEC.name)
    assert found.columns["task"].tolist() == [7, 8, -1]
    assert found.columns["loss"].isnan().tolist() == [True, True, False]


def test_only_rank_0_writes_what_a_memory_has_once(tmp_path):
    for writer in writers(tmp_path / "run"):
        step(writer, 1, rows(1))
        writer.close()
    names = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert names == {
        "dualhook.json",
        "latest.safetensors",
        "origin/00000000.safetensors",
        "segments/00000000.safetensors",
        "segments/r0001-00000000.safetensors",
    }
    assert json.loads((tmp_path / "run" / "dualhook.json").read_text())["version"] == 2


def test_a_reader_of_version_1_refuses_what_it_would_misread(tmp_path, monkeypatch):
    for writer in writers(tmp_path / "run"):
        writer.close()
    monkeypatch.setattr("dualhook.store.layout.FORMAT_VERSION", 1)
    with pytest.raises(StoreError, match="install a newer dualhook"):
        Store(tmp_path / "run")
