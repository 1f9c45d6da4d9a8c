"""Rows that are mostly zeros take less room, and come back bit for bit, however they are read."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from store.test_compacting import rows as rows_of
from store.test_compacting import same_rows
from store.test_store import bits
from torch import Tensor, nn
from torch.nn import functional as F

import dualhook
from dualhook.errors import DualHookError, StoreError
from dualhook.records import Rows
from dualhook.store import Layout, Manifest, Store, inspected
from dualhook.store.layout import open_tensors, read_header, tensor_names, write_tensors
from dualhook.store.sparse import SparseRows, packed_in_place, with_sparse

SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 5e-324, 1e-45, -1.5, 2.0]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Net(nn.Module):
    """Convolutions and linear layers behind ReLUs, two of which read the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.deeper = nn.Conv2d(4, 4, 3)
        self.one, self.other = nn.Linear(64, 32), nn.Linear(64, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.deeper(F.relu(self.conv(x)))).flatten(1)
        return self.head(F.relu(self.one(x) + self.other(x) - 0.1))


def recorded(path: Path | None, steps: int = 6, make=torch.optim.SGD, **options) -> tuple[Net, dualhook.DualMemory]:
    """A segment every other step."""
    torch.manual_seed(0)
    model = Net()
    recorder = dualhook.instrument(model, path, layers="all", verbose=False, **options)
    optimizer = make(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        with recorder.batch(samples=torch.arange(8) + step):
            F.cross_entropy(model(torch.rand(8, 1, 8, 8).sub(0.7).relu()), torch.arange(8) % 5).backward()
        optimizer.step()
        if step % 2:
            recorder.flush()
    return model, recorder.close()


def headers(memory: dualhook.DualMemory) -> list[dict]:
    return [read_header(path, open_tensors(path))["rows"] for path in memory._store.layout.segments()]


def version(path: Path) -> int:
    return json.loads((path / "dualhook.json").read_text())["version"]


@given(
    share=st.sampled_from([0.0, 0.1, 0.4, 0.7, 1.0]),
    count=st.integers(0, 40),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 100),
    cut=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    at_once=st.sampled_from([1, 64, 2**17]),
)
def test_rows_come_back_bit_for_bit(share, count, width, dtype, seed, cut, at_once):
    generator = np.random.default_rng(seed)
    numbers = generator.choice(SPECIAL, (count, width)) * 1.0
    numbers[generator.random((count, width)) >= share] = 0
    values = torch.from_numpy(numbers).to(dtype)
    truth, index = values.clone(), torch.from_numpy(generator.integers(0, max(1, count), 9 if count else 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualhook.store.sparse.AT_ONCE", at_once)
        found = packed_in_place(values)
        if found is None:
            assert torch.equal(bits(values), bits(truth))
            return
        own = {f"key/{name}": getattr(found, name) for name in SparseRows.FIELDS}
        (read,) = with_sparse(own, {"key": width}).values()
        assert sum(values.nbytes for values in own.values()) <= 0.75 * truth.nbytes
        assert (tuple(read.shape), read.dtype, len(read)) == (tuple(truth.shape), dtype, count)
        assert torch.equal(bits(read[cut[0] : cut[1]]), bits(truth[cut[0] : cut[1]]))
        assert torch.equal(bits(read.index_select(0, index)), bits(truth[index]))


def test_what_is_sparse_enough_is_told_by_its_bits():
    assert packed_in_place(torch.zeros(8, 64)) is not None
    assert packed_in_place(-torch.zeros(8, 64)) is None
    assert packed_in_place(torch.ones(8, 64)) is None
    assert packed_in_place(torch.zeros(8, 0)) is None
    assert packed_in_place(torch.zeros(0, 64)) is None
    assert packed_in_place(torch.zeros(8, 1)) is None  # an index of the rows would take more


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, {"head": torch.float64}])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_sparse_memory_is_the_whole_one_in_fewer_bytes(tmp_path, dtype, make):
    model, whole = recorded(tmp_path / "whole", make=make, dtype=dtype)
    twin, sparse = recorded(tmp_path / "sparse", make=make, dtype=dtype, sparse=True)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), twin.parameters(), strict=True))
    same_rows(whole, sparse)
    own = [part for header in headers(sparse) for rows in header.values() for part in rows.get("sparse", ())]
    assert {"key", "scaled/value" if dtype == torch.float16 else "output_grad"} <= set(own)
    assert not any("sparse" in rows for header in headers(whole) for rows in header.values())
    assert (version(tmp_path / "sparse"), version(tmp_path / "whole") < 6) == (6, True)
    assert sparse._store.nbytes < whole._store.nbytes
    assert ("segments of sparse rows;" in str(sparse), "sparse rows" in str(whole)) == (True, False)
    queries = torch.rand(3, 1, 8, 8)
    for layer in ("conv", "one", "other", "head"):
        answers = [memory.attend(net, queries, layers=layer) for net, memory in ((model, whole), (twin, sparse))]
        tables = [[str(a.top(5)), str(a.top(5, by="contribution")), str(a.receipt)] for a in answers]
        assert tables[0] == tables[1]
    assert str(whole.verify()) == str(sparse.verify())


def test_keys_that_another_layer_holds_may_be_sparse(tmp_path):
    _, memory = recorded(tmp_path / "run", sparse=True)
    shared = [rows for header in headers(memory) for rows in header.values() if "key_of" in rows]
    assert shared
    assert all("key" in rows["sparse"] for rows in shared)


def test_what_was_recorded_is_counted_as_it_is_written(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 8))
    counted = []
    for sparse in (False, True):
        recorder = dualhook.instrument(model, tmp_path / str(sparse), layers="all", verbose=False, sparse=sparse)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.rand(64, 512).sub(0.8).relu()).square().mean().backward()
            optimizer.step()
        recorder.flush()
        counted.append(recorder.nbytes)
        memory = recorder.close()
        assert counted[-1] == pytest.approx(memory._store.nbytes, rel=0.05)
    assert counted[1] < 0.6 * counted[0]


@pytest.mark.parametrize("sparse", [False, True])
def test_going_on_from_an_earlier_step_cuts_what_lies_after_it(tmp_path, sparse):
    _, whole = recorded(tmp_path / "whole", steps=3)
    model, _ = recorded(tmp_path / "run", steps=6, sparse=sparse)
    model.load_state_dict(whole.state_dict())
    dualhook.instrument(model, tmp_path / "run", layers="all", verbose=False, resume_at=3).close()
    cut = dualhook.load(tmp_path / "run")
    assert cut.steps == 3
    same_rows(whole, cut)
    assert not inspected(cut._store.layout, cut._store.manifest, deep=True).damage


def test_what_is_left_after_a_cut_may_have_no_number(tmp_path):
    """Behind a unit that is dead at first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 4))
    twin = copy.deepcopy(model)

    def train(recorder, steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in steps:
            optimizer.zero_grad()
            F.cross_entropy(model(torch.ones(16, 16) * (step > 2)), torch.arange(16) % 4).backward()
            optimizer.step()
        return recorder.close()

    options = {"layers": "all", "verbose": False, "sparse": True}
    train(dualhook.instrument(model, tmp_path / "run", **options), range(1, 5))
    model.load_state_dict(dualhook.load(tmp_path / "run").state_dict(step=2))
    memory = train(dualhook.instrument(model, tmp_path / "run", resume_at=2, **options), range(3, 6))
    assert memory.patterns("2") == 5 * 16
    assert not inspected(memory._store.layout, memory._store.manifest, deep=True).damage
    for name, value in memory.state_dict().items():
        torch.testing.assert_close(value, dict(model.named_parameters())[name].detach())
    assert any(not torch.equal(own, other) for own, other in zip(model.parameters(), twin.parameters(), strict=True))


def test_compacting_makes_rows_sparse_or_whole_and_leaves_them_as_they_are(tmp_path):
    _, whole = recorded(tmp_path / "run")
    sparse = dualhook.compact(shutil.copytree(tmp_path / "run", tmp_path / "sparse"), sparse=True)
    same_rows(whole, sparse)
    (header,) = headers(sparse)
    assert "sparse" in header["one"]
    assert version(tmp_path / "sparse") == 6
    size = sparse._store.nbytes
    again = dualhook.compact(tmp_path / "sparse")
    same_rows(whole, again)
    assert again._store.nbytes == pytest.approx(size, rel=0.01)
    back = dualhook.compact(tmp_path / "sparse", sparse=False)
    same_rows(whole, back)
    assert "sparse" not in headers(back)[0]["one"]
    assert version(tmp_path / "sparse") == 5
    assert "sparse" not in headers(dualhook.compact(tmp_path / "run"))[0]["one"]
    with pytest.raises(DualHookError, match="sparse=1: expected True, False, or None"):
        dualhook.compact(tmp_path / "run", sparse=1)
    with pytest.raises(DualHookError, match="sparse=None: expected True or False"):
        dualhook.instrument(nn.Linear(2, 2), sparse=None)


def test_folding_takes_in_sparse_rows(tmp_path):
    model, memory = recorded(tmp_path / "run", steps=12, sparse=True, max_bytes=200_000, on_full="fold")
    assert memory._store.first_step > 0
    for name, value in memory.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-6)


def all_rows(path: Path) -> list[Rows]:
    memory = dualhook.load(path)
    return [rows_of(memory, layer) for layer in memory.layers]


def damaged(tmp_path: Path, change, **settings) -> Path:
    """A memory whose segment was written by somebody else: checksums are right, ``change`` what it holds."""
    _, memory = recorded(tmp_path / "run", steps=2, **settings)
    (path,) = memory._store.layout.segments()
    file = open_tensors(path)
    tensors = {name: file.get_tensor(name).clone() for name in tensor_names(file)}
    header = read_header(path, file)
    change(tensors, header)
    write_tensors(path, tensors, header)
    return tmp_path / "run"


def one_bit_more(tensors, header):
    mask = tensors["rows/head/key/mask"]
    row, byte = (mask != 255).nonzero()[0].tolist()
    mask[row, byte] |= 1 << next(bit for bit in range(8) if not mask[row, byte] >> bit & 1)


def ends_that_wrap_around(tensors, header):
    end = tensors["rows/head/key/end"]
    end[:4] = torch.tensor([2**38, 2**63 - 1, -(2**63), -(2**62)])


def more_numbers_than_places(tensors, header):
    tensors["rows/head/key/end"][:-1] = 0


def falling_end(tensors, header):
    tensors["rows/head/key/end"][0] = tensors["rows/head/key/end"][-1] + 1


def fewer_numbers(tensors, header):
    tensors["rows/head/key/value"] = tensors["rows/head/key/value"][:-1]


def wider(tensors, header):
    header["rows"]["head"]["sparse"]["key"] = 320


def endless(tensors, header):
    header["rows"]["head"]["sparse"]["key"] = 2**31


def wider_by_a_bit(tensors, header):
    header["rows"]["head"]["sparse"]["key"] = 31


def of_no_such_rows(tensors, header):
    header["rows"]["head"]["sparse"]["slot"] = 8


def no_number(tensors, header):
    header["rows"]["head"]["sparse"]["key"] = "32"


def without_mask(tensors, header):
    del tensors["rows/head/key/mask"]


@pytest.mark.parametrize(
    "change",
    [
        one_bit_more,
        falling_end,
        ends_that_wrap_around,
        more_numbers_than_places,
        fewer_numbers,
        wider,
        endless,
        wider_by_a_bit,
        of_no_such_rows,
        no_number,
        without_mask,
    ],
)
def test_sparse_rows_that_make_no_sense_are_refused(tmp_path, change):
    path = damaged(tmp_path, change, sparse=True)
    with pytest.raises(StoreError, match=r"make no sense|is damaged"):
        all_rows(path)
    found = inspected(Layout(path), Manifest.read(Layout(path)), deep=True).damage
    assert found[0].file == "segments/00000000.safetensors"


def test_a_flipped_bit_is_found(tmp_path):
    _, memory = recorded(tmp_path / "run", steps=2, sparse=True)
    (path,) = memory._store.layout.segments()
    data = bytearray(path.read_bytes())
    numbers = open_tensors(path).get_tensor("rows/head/key/value")
    at = data.index(numbers.numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    found = inspected(memory._store.layout, memory._store.manifest, deep=True).damage
    assert "rows/head/key/value" in str(found[0])
    healthy = Store(tmp_path / "run", on_damage="skip")
    assert "head" in str(healthy.note_of_loss)


def test_older_versions_refuse_sparse_rows(tmp_path, monkeypatch):
    recorded(tmp_path / "run", steps=2, sparse=True)
    monkeypatch.setattr("dualhook.store.layout.FORMAT_VERSION", 5)
    with pytest.raises(StoreError, match="format version 6"):
        dualhook.load(tmp_path / "run")


def test_a_computed_head_behind_sparse_keys(tmp_path):
    memories = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 600))
        recorder = dualhook.instrument(model, tmp_path / str(sparse), layers="all", verbose=False, sparse=sparse)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(200, 6) - 0.2), torch.randint(0, 600, (200,))).backward()
            optimizer.step()
        memories.append(recorder.close())
    (header,) = headers(memories[1])
    assert "key" in header["2"]["sparse"]
    assert any(name.startswith("rows/2/softmax/") for name in names_of(memories[1]))
    same_rows(*memories)


def names_of(memory: dualhook.DualMemory) -> list[str]:
    return [name for path in memory._store.layout.segments() for name in tensor_names(open_tensors(path))]
