"""A compacted memory is the one that it was, in other files; what it lacks it says."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from store.test_lanes import SPEC, writers
from store.test_store import bits, entry
from store.test_store import rows as lane_rows
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.errors import DualHookError, StoreError
from dualhook.store import Store, inspected, reader

LINEAR = "(model)"  # the name of a layer that is the model
FIELDS = ("key", "output_grad", "step", "sample", "position")


class Net(nn.Module):
    """Layers with shared keys, a convolution of maps of two sizes, and a wide head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 2)
        self.one, self.other, self.late = (nn.Linear(3, 8) for _ in range(3))
        self.head = nn.Linear(8, 600)

    def forward(self, x):
        x = torch.tanh(self.conv(x)).transpose(1, 2)
        return self.head(torch.tanh(self.one(x) + self.other(x) + self.late(x)))


def recorded(path: Path, make=torch.optim.SGD, steps: int = 12, **options) -> nn.Module:
    """A segment a step."""
    torch.manual_seed(0)
    model = Net().double()
    model.late.requires_grad_(False)
    recorder = dualhook.instrument(model, path, layers="all", verbose=False, **options)
    optimizer = make(model.parameters(), lr=0.01)
    for step in range(steps):
        model.late.requires_grad_(step >= 4)
        optimizer.zero_grad()
        columns = {"task": step} if step % 3 else {}
        with recorder.batch(samples=torch.arange(64) + step, **columns):
            x = torch.randn(64, 2, 6 + step % 2, dtype=torch.float64)
            loss = F.cross_entropy(model(x).flatten(0, 1), torch.randint(0, 600, (64 * (5 + step % 2),)))
            loss.backward()
            optimizer.step()
        recorder.flush()
    memory = recorder.close()
    memory.add_column("label", [k % 3 for k in range(80)])
    return model


def rows(memory: dualhook.DualMemory, layer: str):
    blocks = list(memory._store.blocks(layer, last_step=memory.steps, block_rows=10**6))
    return blocks[0].joined(*blocks[1:])


def same_rows(one: dualhook.DualMemory, other: dualhook.DualMemory) -> None:
    assert one.layers == other.layers
    for layer in one.layers:
        left, right = rows(one, layer), rows(other, layer)
        assert left.first == right.first
        for name in FIELDS:
            assert torch.equal(bits(getattr(left, name)), bits(getattr(right, name))), (layer, name)
        assert left.columns.keys() == right.columns.keys()
        for name, values in left.columns.items():
            assert torch.equal(values.nan_to_num(-1), right.columns[name].nan_to_num(-1))
    for name, history in one._store.histories.items():
        found = other._store.histories[name]
        assert history.optimizer == found.optimizer
        for what in ("step", "scale", "residual", "mark"):
            assert torch.equal(getattr(history, what), getattr(found, what))
        for kind in ("hyper", "state"):
            assert {n: v.nan_to_num(-1).tolist() for n, v in getattr(history, kind).items()} == {
                n: v.nan_to_num(-1).tolist() for n, v in getattr(found, kind).items()
            }


def answers(memory: dualhook.DualMemory, model: nn.Module) -> list:
    attention = memory.attend(model, torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 2, 6))
    return [attention.top(5), attention.sum_by("label"), attention.receipt, memory.verify()]


def same_answers(found: list, expected: list) -> None:
    for one, other in zip(found, expected, strict=True):
        for name in other.columns:
            values, true = np.asarray(one[name]), np.asarray(other[name])
            if values.dtype.kind == "f":  # sums over other blocks
                np.testing.assert_allclose(values, true, rtol=1e-9, atol=1e-12)
            else:
                assert (values == true).all(), name


@pytest.fixture(scope="module", params=["sgd", "adam"])
def original(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "memory"
    return path, recorded(path, {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[request.param])


@pytest.fixture
def run(original, tmp_path):
    path, model = original
    return shutil.copytree(path, tmp_path / "memory"), copy.deepcopy(model)


@pytest.mark.parametrize("segment_bytes", [1, 300_000, 10**9])
def test_nothing_changes_without_a_loss(run, original, segment_bytes):
    path, model = run
    before = dualhook.load(original[0])
    memory = dualhook.compact(path, segment_bytes=segment_bytes)
    assert len(memory._store.segments) == {1: 12, 10**9: 1}.get(segment_bytes, len(memory._store.segments))
    assert not inspected(memory._store.layout, memory._store.manifest, deep=True).damage
    assert memory.verify()["exact"].all()
    same_rows(before, memory)
    same_answers(answers(memory, model), answers(before, model))
    assert sorted(one.name for one in path.iterdir() if one.is_dir()) == [
        "columns", "origin", "segments-0001", "snapshots"
    ]  # fmt: skip
    again = dualhook.compact(path)
    same_rows(before, again)
    assert (path / "segments-0002").is_dir()
    assert not (path / "segments-0001").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_dtype_is_the_one_that_recording_would_have_written(run, original, tmp_path, dtype):
    path, model = run
    make = torch.optim.Adam if dualhook.load(path).info()["optimizer"][0] == "Adam" else torch.optim.SGD
    recorded(tmp_path / "narrow", make, dtype=dtype)
    before, memory, expected = (
        dualhook.load(original[0]),
        dualhook.compact(path, dtype=dtype),
        dualhook.load(tmp_path / "narrow"),
    )
    for layer in memory.layers:
        for name in FIELDS:
            assert torch.equal(getattr(rows(memory, layer), name), getattr(rows(expected, layer), name)), (layer, name)
    assert memory.nbytes < before.nbytes
    off, rounding = (one.verify(model)["error"].max() for one in (memory, before))
    assert off > 1e4 * rounding  # of a run in float64
    lost, least = (answers(one, model)[2]["explained"].min() for one in (memory, before))
    assert 0.5 < lost < least - 1e-9


def test_keys_that_float16_cannot_hold_are_refused_and_nothing_has_changed(tmp_path):
    model = nn.Linear(3, 2)
    recorder = dualhook.instrument(model, tmp_path / "m", verbose=False)
    model(torch.full((2, 3), 1e5)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-9).step()
    recorder.close()
    files = sorted((tmp_path / "m").rglob("*"))
    with pytest.raises(StoreError, match="keys up to 1e\\+05, too large for float16: try bfloat16"):
        dualhook.compact(tmp_path / "m", dtype=torch.float16)
    assert sorted((tmp_path / "m").rglob("*")) == files
    assert dualhook.compact(tmp_path / "m", dtype=torch.bfloat16).patterns(LINEAR) == 2


def test_dropped_rows_are_missing_and_every_table_says_so(tmp_path):
    torch.manual_seed(0)
    model, path = nn.Linear(4, 3).double(), tmp_path / "m"
    recorder = dualhook.instrument(model, path, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(5):
        optimizer.zero_grad()
        weight = torch.ones(10, 1, dtype=torch.float64)
        weight[:step] = 1e-3  # the first rows of later steps hardly count
        (weight * model(torch.randn(10, 4, dtype=torch.float64)).square()).sum().backward()
        optimizer.step()
    whole = rows(recorder.close(), LINEAR)
    memory = dualhook.compact(path, min_share=0.01)
    size = whole.output_grad.norm(dim=1) * (whole.key.square().sum(1) + 1).sqrt()
    total = torch.zeros(6, dtype=torch.float64).index_add_(0, whole.step, size)
    kept = size >= 0.01 * total[whole.step]
    lost = (~kept).sum()
    assert lost > 0
    assert torch.equal(rows(memory, memory.layers[0]).key, whole.key[kept])
    assert torch.equal(rows(memory, memory.layers[0]).step, whole.step[kept])
    # the oracle: what the rows that are gone have put into the weights
    report = memory.verify()
    assert 1e-9 < report.max_error < 0.1
    assert not report["exact"].any()
    assert report["inexact_steps"][0] == len(set(whole.step[~kept].tolist()))
    attention = memory.attend(model, torch.randn(2, 4, dtype=torch.float64), target=0)
    assert 0.5 < attention.explained["explained"].min() < 1 - 1e-9
    residual = attention.parts.to_pandas().set_index(["query", "part"])["contribution"].unstack()["residual"]
    left = dualhook.load(path).weight(LINEAR) - model.weight
    assert residual.abs().max() > 1e-9
    assert float(left.detach().abs().max()) > 1e-9
    note = f"dropped by compacting: rows {lost} of "
    assert note in str(attention.top(3))
    assert note in str(memory.info())
    assert dualhook.compact(path).verify()["inexact_steps"][0] == report["inexact_steps"][0]
    assert note in str(dualhook.load(path).info())


def test_a_share_of_zero_drops_nothing_and_a_whole_one_is_refused(tmp_path):
    recorded(tmp_path / "m", steps=2)
    assert "dropped" not in str(dualhook.compact(tmp_path / "m", min_share=0.0).info())
    for wrong in ({"min_share": 1.0}, {"min_share": -0.1}, {"dtype": torch.int16}, {"segment_bytes": 0}):
        with pytest.raises(DualHookError, match=next(iter(wrong))):
            dualhook.compact(tmp_path / "m", **wrong)


def test_compacting_is_refused_while_somebody_writes_and_writing_while_compacting(tmp_path, monkeypatch):
    model = nn.Linear(3, 2)
    recorder = dualhook.instrument(model, tmp_path / "m", verbose=False)
    model(torch.randn(2, 3)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    recorder.flush()
    with pytest.raises(StoreError, match="is being written"):
        dualhook.compact(tmp_path / "m")
    recorder.close()

    def meanwhile(count):
        with pytest.raises(StoreError, match="is being written"):
            dualhook.instrument(model, tmp_path / "m", resume=True, verbose=False)
        with pytest.raises(StoreError, match="is being written"):
            dualhook.instrument(model, tmp_path / "m", overwrite=True, verbose=False)

    assert dualhook.compact(tmp_path / "m", on_bytes=meanwhile).steps == 1
    dualhook.instrument(model, tmp_path / "m", resume=True, verbose=False).close()


def test_what_is_damaged_is_not_compacted(run):
    path, _ = run
    segment = sorted((path / "segments").iterdir())[3]
    data = bytearray(segment.read_bytes())
    data[-5] ^= 1
    segment.write_bytes(data)
    with pytest.raises(StoreError, match="00000003.safetensors is not as it was written"):
        dualhook.compact(path)
    assert not (path / "segments-0001").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, partial(OSError, 28, "No space left on device")])
def test_interrupted_the_old_memory_is_there_and_nothing_else(run, original, monkeypatch, error):
    path, _ = run
    files = {one: one.stat().st_mtime_ns for one in path.rglob("*") if one.is_file()}

    def stop(count):
        raise error()

    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else StoreError):
        dualhook.compact(path, segment_bytes=1, on_bytes=stop)
    assert {one: one.stat().st_mtime_ns for one in path.rglob("*") if one.is_file()} == files
    assert not (path / "segments-0001").exists()
    same_rows(dualhook.load(original[0]), dualhook.load(path))


def test_recording_goes_on_in_a_compacted_memory(tmp_path):
    model = recorded(tmp_path / "m", steps=6)
    dualhook.compact(tmp_path / "m", segment_bytes=10**9)
    (tmp_path / "m" / "segments").mkdir()  # what a kill has left
    recorder = dualhook.instrument(model, tmp_path / "m", layers="all", resume_at=6, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.zero_grad()
    model(torch.randn(3, 2, 6, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    memory = recorder.close()
    assert memory.steps == 7
    assert memory.verify()["exact"].all()
    assert not (tmp_path / "m" / "segments").exists()
    names = sorted(one.name for one in (tmp_path / "m" / "segments-0001").iterdir())
    assert names == ["00000000.safetensors", "00000001.safetensors"]


def test_folded_patterns_keep_their_numbers(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    recorder = dualhook.instrument(model, tmp_path, max_bytes=6000, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    before = recorder.close()
    first = rows(before, before.layers[0]).first
    assert first > 0
    expected = rows(before, before.layers[0]).key.clone()
    after = dualhook.compact(tmp_path)
    assert rows(after, after.layers[0]).first == first
    assert torch.equal(rows(after, after.layers[0]).key, expected)
    assert after.verify()["exact"].all()


def test_a_reader_in_the_middle_of_opening_finds_the_old_or_the_new_one(run, monkeypatch):
    path, _ = run
    expected = dualhook.load(path).steps
    original, calls = reader.inspected, []

    def slow(layout, manifest, **options):
        if not calls:
            calls.append(1)
            dualhook.compact(path)
        return original(layout, manifest, **options)

    monkeypatch.setattr(reader, "inspected", slow)
    assert dualhook.load(path).steps == expected


def test_older_versions_refuse_a_compacted_memory(tmp_path, monkeypatch):
    recorded(tmp_path / "m", steps=2)
    dualhook.compact(tmp_path / "m")
    monkeypatch.setattr("dualhook.store.layout.FORMAT_VERSION", 4)
    with pytest.raises(StoreError, match="format version 5"):
        dualhook.load(tmp_path / "m")


def test_every_process_keeps_its_own_segments(tmp_path):
    first, second = writers(tmp_path / "m")
    for step in range(1, 6):
        for rank, writer in enumerate((first, second)):
            part = replace(lane_rows(4, start=step * 10 + rank), key=torch.randn(4, 3), output_grad=torch.randn(4, 2))
            writer.builder.append(SPEC.name, part)
            writer.builder.commit(SPEC.name, step)
            writer.builder.add(step, [] if rank else [entry(step), entry(step, SPEC.bias)])
            writer.seal()
    first.close()
    second.close()
    before = Store(tmp_path / "m")
    expected = [rows.sample for rows in before.blocks(SPEC.name, last_step=5, block_rows=100)]
    expected = torch.cat(expected).clone()
    dualhook.compact(tmp_path / "m")
    after = Store(tmp_path / "m")
    found = torch.cat([rows.sample for rows in after.blocks(SPEC.name, last_step=5, block_rows=100)])
    assert torch.equal(found, expected)
    assert [segment.path.stem for segment in after.segments] == ["00000000", "r0001-00000000"]
    dualhook.compact(tmp_path / "m", min_share=0.2)
    dropping = Store(tmp_path / "m")
    assert 0 < dropping.count(SPEC.name) < after.count(SPEC.name)
    assert dropping.inexact_steps(SPEC.weight, 5) > 0  # the first one's ledger knows what both have dropped
