"""The store: what goes in comes out bit for bit, whatever the layout of the segments."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dualhook.errors import StoreError
from dualhook.records import LayerSpec, LedgerEntry, Mark, Rows
from dualhook.store import FORMAT_VERSION, Layout, Manifest, SegmentBuilder, Store, Writer, durable
from dualhook.store.checksums import mismatches
from dualhook.store.direct import DirectFile, empty_in_blocks
from dualhook.store.layout import open_tensors, read_header, write_tensors

SPEC = LayerSpec("body.fc", 3, 2, "body.fc.weight", "body.fc.bias")
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-42, -1e-310, 1.5]


def rows(count: int, dtype: torch.dtype = torch.float32, start: int = 0, **columns: Tensor) -> Rows:
    generator = torch.Generator().manual_seed(start)
    pick = torch.randint(0, len(SPECIAL), (count, 5), generator=generator)
    values = torch.tensor(SPECIAL, dtype=torch.float64)[pick].to(dtype)
    numbers = torch.arange(start, start + count)
    return Rows(values[:, :3], values[:, 3:], torch.zeros_like(numbers), numbers, numbers % 4, columns)


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize])


def entry(step: int, parameter: str = SPEC.weight, **changed) -> LedgerEntry:
    plain = {"optimizer": "torch.optim.sgd.SGD", "hyper": {"lr": 0.1 * step}, "state": {}, "scale": 1.0,
             "residual": 0.0, "mark": Mark(0)}  # fmt: skip
    return LedgerEntry(step=step, parameter=parameter, **(plain | changed))


def written(root: Path, layers: tuple[LayerSpec, ...] = (SPEC,), segment_bytes: int = 10**9, **options) -> Writer:
    layout = Layout(root)
    layout.create(overwrite=False)
    Manifest(layers, {"dualhook": "test"}).write(layout)
    writer = Writer(layout, segment_bytes=segment_bytes, **options)
    values = {name: {"value": torch.ones(2, 3)} for spec in layers for name in spec.parameters}
    writer.write_origin(0, values, dict.fromkeys(values, torch.float32))
    return writer


def everything(store: Store, layer: str, block_rows: int = 7) -> Rows:
    blocks = list(store.blocks(layer, last_step=10**9, block_rows=block_rows))
    assert [block.first for block in blocks] == [sum(map(len, blocks[:k])) for k in range(len(blocks))]
    assert all(len(block) <= block_rows for block in blocks)
    join = {
        name: torch.cat([getattr(b, name) for b in blocks])
        for name in ("key", "output_grad", "step", "sample", "position")
    }
    columns = {name: torch.cat([b.columns[name] for b in blocks]) for name in (blocks[0].columns if blocks else ())}
    return Rows(**join, columns=columns)


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    seals=st.sets(st.integers(0, 7)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    block_rows=st.integers(1, 12),
)
def test_rows_come_back_bit_for_bit_in_any_layout(tmp_path_factory, sizes, seals, dtype, block_rows):
    writer = written(tmp_path_factory.mktemp("run") / "memory")
    given_rows, count = [], 0
    for step, size in enumerate(sizes, start=1):
        part = rows(size, dtype, count)
        count += size
        writer.builder.append(SPEC.name, part)
        writer.builder.commit(SPEC.name, step)
        writer.builder.add(step, [entry(step)])
        given_rows.append(part)
        if step in seals:
            writer.seal()
    writer.close()
    store = Store(writer.layout.root)
    assert store.last_step == len(sizes)
    assert store.count(SPEC.name) == count
    assert store.histories[SPEC.weight].step.tolist() == list(range(1, len(sizes) + 1))
    assert store.histories[SPEC.weight].hyper["lr"].tolist() == [0.1 * step for step in range(1, len(sizes) + 1)]
    if count:
        found = everything(store, SPEC.name, block_rows)
        for name in ("key", "output_grad", "sample", "position"):
            true = torch.cat([getattr(part, name) for part in given_rows])
            assert torch.equal(bits(getattr(found, name)), bits(true))
        assert found.step.tolist() == [s for s, size in enumerate(sizes, start=1) for _ in range(size)]


@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=8), last=st.integers(0, 9), seals=st.sets(st.integers(0, 7))
)
def test_blocks_up_to_a_step(tmp_path_factory, sizes, last, seals):
    writer = written(tmp_path_factory.mktemp("run") / "memory")
    for step, size in enumerate(sizes, start=1):
        writer.builder.append(SPEC.name, rows(size))
        writer.builder.commit(SPEC.name, step)
        writer.builder.add(step, [entry(step)])
        if step in seals:
            writer.seal()
    writer.close()
    blocks = Store(writer.layout.root).blocks(SPEC.name, last_step=last, block_rows=3)
    assert sum(map(len, blocks)) == sum(sizes[:last])


def test_pending_rows_are_carried_over_a_seal_and_can_still_be_dropped(tmp_path):
    writer = written(tmp_path / "run")
    writer.builder.append(SPEC.name, rows(3))
    writer.builder.commit(SPEC.name, 1)
    writer.builder.add(1, [entry(1)])
    writer.builder.append(SPEC.name, rows(2, start=10))
    writer.seal()
    assert writer.builder.pending(SPEC.name).sample.tolist() == [10, 11]
    writer.builder.rewind(SPEC.name)
    assert writer.builder.pending(SPEC.name) is None
    writer.builder.append(SPEC.name, rows(4, start=20))
    writer.seal()  # nothing is committed
    assert writer.builder.pending(SPEC.name).sample.tolist() == [20, 21, 22, 23]
    writer.builder.commit(SPEC.name, 2)
    writer.builder.add(2, [entry(2)])
    writer.close()
    store = Store(tmp_path / "run")
    assert everything(store, SPEC.name).sample.tolist() == [0, 1, 2, 20, 21, 22, 23]
    assert len(store.segments) == 2


def test_rows_of_a_wider_dtype_widen_what_is_held():
    builder = SegmentBuilder()
    builder.append(SPEC.name, rows(2, torch.bfloat16))
    builder.append(SPEC.name, rows(2, torch.float32, 2))
    pending = builder.pending(SPEC.name)
    assert pending.key.dtype == torch.float32
    assert torch.equal(bits(pending.key[:2]), bits(rows(2, torch.bfloat16).key.float()))
    assert torch.equal(bits(pending.key[2:]), bits(rows(2, torch.float32, 2).key))


def test_columns_that_come_and_go(tmp_path):
    writer = written(tmp_path / "run")
    for step, columns in enumerate(
        ({}, {"task": torch.tensor([5, 6])}, {"score": torch.tensor([0.5, 0.25]).double()}), start=1
    ):
        writer.builder.append(SPEC.name, rows(2, start=2 * step, **columns))
        writer.builder.commit(SPEC.name, step)
        writer.builder.add(step, [entry(step)])
    writer.close()
    found = everything(Store(tmp_path / "run"), SPEC.name)
    assert found.columns["task"].tolist() == [-1, -1, 5, 6, -1, -1]
    assert found.columns["score"][:4].isnan().all()
    assert found.columns["score"][4:].tolist() == [0.5, 0.25]


def test_ledger_of_different_optimisers_and_parameters(tmp_path):
    writer = written(tmp_path / "run")
    other = {"hyper": {"lr": 7.0, "lambd": 1.0}, "optimizer": "torch.optim.asgd.ASGD", "state": {"eta": 3.0}}
    writer.builder.add(1, [entry(1), entry(1, SPEC.bias, mark=Mark.FRESH | Mark.UNEXPLAINED, **other)])
    writer.seal()
    writer.builder.add(2, [entry(2, scale=0.5, residual=0.25)])
    writer.close()
    histories = Store(tmp_path / "run").histories
    weight, bias = histories[SPEC.weight], histories[SPEC.bias]
    assert weight.scale.tolist() == [1.0, 0.5]
    assert weight.residual.tolist() == [0.0, 0.25]
    assert weight.hyper["lr"].tolist() == [0.1, 0.2]
    assert weight.column("lambd").tolist() == [0.0, 0.0]
    assert bias.step.tolist() == [1]
    assert bias.hyper["lr"].tolist() == [7.0]
    assert bias.state["eta"].tolist() == [3.0]
    assert bias.optimizer == ("torch.optim.asgd.ASGD",)
    assert bias.marked(Mark.FRESH).all()
    assert not bias.marked(Mark.CHANGED).any()


def test_steps_that_stepped_on_nothing_recorded_still_count(tmp_path):
    writer = written(tmp_path / "run")
    for step in (1, 2):
        writer.builder.add(step, [])
    writer.close()
    store = Store(tmp_path / "run")
    assert store.last_step == 2
    assert store.histories == {}


def test_nothing_but_safetensors_and_json(tmp_path):
    writer = written(tmp_path / "run")
    writer.builder.append(SPEC.name, rows(3))
    writer.builder.commit(SPEC.name, 1)
    writer.builder.add(1, [entry(1)])
    writer.write_latest(0, {SPEC.weight: torch.ones(2, 3)})
    writer.close()
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert "kind" in json.loads(file.metadata()["dualhook"])
        elif path.is_file():
            assert json.loads(path.read_text())["version"] == 1  # 2 only where an older reader would miss rows


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("count", [0, 1, 511, 70_000])
def test_direct_files_are_safetensors_files(tmp_path, monkeypatch, direct, count):
    monkeypatch.setattr("dualhook.store.direct.BUFFER_BYTES", 64 * 4096)
    file = DirectFile()
    if not direct:
        file._direct = 0
    given_tensors = {
        "blocks": empty_in_blocks((count, 3), torch.float32).fill_(1.5), "a/key": torch.randn(count, 3),
        "b": torch.arange(count), "c": torch.randn(count, 1).bfloat16(),
        "d": torch.randn(2, 5).double(), "e": torch.randn(count, 3).half(),
    }  # fmt: skip
    for _ in range(2):  # the buffer is used again
        file.write(tmp_path / "x.safetensors", given_tensors, {"dualhook": "{}"})
        found = load_file(tmp_path / "x.safetensors")
        assert found.keys() == given_tensors.keys()
        assert all(torch.equal(found[name], value) for name, value in given_tensors.items())
        assert all(found[name].dtype == value.dtype for name, value in given_tensors.items())
        with safe_open(tmp_path / "x.safetensors", "pt") as opened:
            assert opened.metadata() == {"dualhook": "{}"}


@pytest.mark.parametrize("count", [1, 4096, 70_000])
def test_what_lies_in_blocks_is_written_without_a_copy(tmp_path, monkeypatch, count):
    copied, calls, write_all = [], [], durable.write_all

    def writing(handle: int, parts: Sequence[memoryview]) -> None:
        copied.extend(len(part) for part in parts if part.obj is file._view.obj)
        calls.append(len(parts))
        write_all(handle, parts)

    monkeypatch.setattr("dualhook.store.direct.write_all", writing)
    file = DirectFile()
    tensors = {"a": empty_in_blocks((count, 3), torch.float32), "b": torch.arange(5), "c": torch.rand(count).bfloat16()}
    tensors |= {"d": empty_in_blocks((count,), torch.bfloat16)[: count - 1]}
    for name in "ad":
        tensors[name].copy_(torch.rand(tensors[name].shape))
    write_tensors(tmp_path / "x.safetensors", tensors, {"kind": "segment"}, file)
    found = load_file(tmp_path / "x.safetensors")
    assert {name for name in found if not name.startswith("padding/")} == tensors.keys()
    opened = open_tensors(tmp_path / "x.safetensors")
    for name, value in tensors.items():
        assert torch.equal(found[name], value), name
        assert torch.equal(opened.get_tensor(name), value), name
    assert list(mismatches(opened, read_header(tmp_path / "x.safetensors", opened))) == []
    assert sum(copied) < tensors["c"].nbytes + 6 * 4096  # the header, what is left of blocks, and the small ones
    assert len(calls) == 1  # each wakes the writing thread up again, and training waits for it


@pytest.mark.parametrize("at_most", [1, 3, 4096, 10_000])
def test_a_system_that_writes_less_than_it_was_given(tmp_path, monkeypatch, at_most):
    calls = []

    def some(handle: int, parts: Sequence[memoryview]) -> int:
        calls.append(len(parts))
        return os.write(handle, b"".join(parts)[:at_most])

    monkeypatch.setattr(os, "writev", some)
    monkeypatch.setattr(durable, "AT_ONCE", 3)
    parts = [memoryview(bytes([number]) * size) for number, size in enumerate([5, 0, 1, 4096, 7, 0, 2])]
    with (tmp_path / "x").open("wb") as file:
        durable.write_all(file.fileno(), parts)
    assert (tmp_path / "x").read_bytes() == b"".join(parts)
    assert max(calls) == 3


def test_a_system_that_takes_one_buffer_at_a_time(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "writev")
    with (tmp_path / "x").open("wb") as file:
        durable.write_all(file.fileno(), [memoryview(b"one"), memoryview(b""), memoryview(b"two")])
    assert (tmp_path / "x").read_bytes() == b"onetwo"


def test_file_systems_without_direct_writing(tmp_path, monkeypatch):
    refused = []
    writev = os.writev

    def refusing(handle: int, parts: Sequence[memoryview]) -> int:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0):
            refused.append(handle)
            raise OSError(errno.EINVAL, "Invalid argument")
        return writev(handle, parts)

    monkeypatch.setattr(os, "writev", refusing)
    file = DirectFile()
    for _ in range(2):
        file.write(tmp_path / "x.safetensors", {"a": torch.arange(5)}, {})
        assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2, 3, 4]
    assert len(refused) <= 1  # it does not try again


def test_directories_that_are_no_memory(tmp_path):
    with pytest.raises(StoreError, match=r"holds no memory, there is no file dualhook\.json: expected the path"):
        Store(tmp_path)
    written(tmp_path / "run").close()
    with pytest.raises(StoreError, match=rf"did you mean {tmp_path / 'run'}\?"):
        Store(tmp_path)
    (tmp_path / "dualhook.json").write_text("{")
    with pytest.raises(StoreError, match="is no manifest of a memory"):
        Store(tmp_path)
    (tmp_path / "dualhook.json").write_text('{"format": "tarball", "version": 1, "layers": [], "written_by": {}}')
    with pytest.raises(StoreError, match="is no manifest of a memory: format 'tarball'"):
        Store(tmp_path)
    (tmp_path / "dualhook.json").write_text('{"format": "dualhook", "version": 99}')
    with pytest.raises(StoreError, match=f"99, this dualhook reads up to {FORMAT_VERSION}: install a newer"):
        Store(tmp_path)


def test_files_that_are_no_segments(tmp_path):
    written(tmp_path / "run").close()
    path = tmp_path / "run" / "segments" / "00000000.safetensors"
    path.write_bytes(b"not a segment at all")
    with pytest.raises(StoreError, match="00000000.safetensors cannot be read"):
        Store(tmp_path / "run")
    path.unlink()
    (tmp_path / "run" / "segments" / "00000000.partial").write_bytes(b"half written")
    assert Store(tmp_path / "run").last_step == 0  # never part of the memory


@pytest.mark.parametrize("name", ["", "../label", "a b", "1st", "x" * 65])
def test_column_names_stay_inside_the_directory(tmp_path, name):
    with pytest.raises(StoreError, match="expected letters, digits and underscores"):
        Layout(tmp_path).column(name)
