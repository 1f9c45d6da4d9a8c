"""Rows in 8 bits: rounded by chance, so themselves on average; a quarter of the bytes, and the same bits ever after."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from store.test_compacting import rows as rows_of
from store.test_compacting import same_rows
from store.test_sparse import damaged, headers, names_of, recorded, version
from store.test_store import bits
from torch import Tensor, nn
from torch.nn import functional as F

import dualhook
from dualhook.errors import StoreError
from dualhook.store import Layout, Manifest, Store, eight_bit_bytes, inspected
from dualhook.store.eightbit import EightBitRows, in_eight_bits, with_eight_bits
from dualhook.store.layout import open_tensors, tensor_names

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FINITE = [0.0, -0.0, 5e-324, 1e-45, -1e-40, 1e-30, -1.5, 2.0, 0.3, 6e4, -1e38, 3.4e38, 1.7e308]


def packed(values: Tensor, seed: str = "seed", known: Tensor | None = None) -> EightBitRows | None:
    """The same through its tensors, as they come from a file."""
    found = in_eight_bits(values, seed, known)
    if found is None:
        return None
    own = {f"key/{name}": getattr(found, name) for name in EightBitRows.FIELDS}
    assert sum(part.nbytes for part in own.values()) == len(values) * eight_bit_bytes(values.shape[1], values.dtype)
    (read,) = with_eight_bits(own, {"key": str(values.dtype).removeprefix("torch.")}).values()
    read.check()
    return read


@given(
    count=st.integers(0, 30), width=st.integers(1, 40), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**20),
    special=st.sampled_from([None, float("nan"), float("inf"), -float("inf")]),
    cut=st.tuples(st.integers(0, 30), st.integers(0, 30)), at_once=st.sampled_from([1, 64, 2**17]),
)  # fmt: skip
def test_numbers_come_back_within_a_step_and_zeros_as_zeros(count, width, dtype, seed, special, cut, at_once):
    generator = np.random.default_rng(seed)
    numbers = generator.choice(FINITE, (count, width)) * generator.choice([1.0, generator.random()], (count, width))
    values = torch.from_numpy(numbers).to(dtype)
    values = torch.where(values.isfinite(), values, 1)  # of a narrower dtype
    if special is not None and values.numel():
        values.view(-1)[int(generator.integers(values.numel()))] = special
    truth = values.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualhook.store.eightbit.AT_ONCE", at_once)
        read, again = packed(values), packed(values)
    assert torch.equal(bits(values), bits(truth))
    if special is not None or not count or eight_bit_bytes(width, dtype) == width * dtype.itemsize:
        assert read is None
        return
    whole, scale = read[:], read.scale.double()[:, None]
    assert (tuple(read.shape), read.dtype, len(read), read.dim()) == (tuple(truth.shape), dtype, count, 2)
    assert read.is_floating_point()
    assert whole.dtype == dtype
    assert whole.isfinite().all()
    rounding = torch.finfo(torch.promote_types(dtype, torch.float32)).eps * 127
    off_by = (read.code * scale - truth.double()).abs()
    assert (off_by <= scale * (1 + rounding)).all()
    assert torch.equal(bits(whole), bits((read.code * read.scale[:, None]).to(dtype)))
    assert (whole[truth == 0] == 0).all()
    largest = truth.double().abs().amax(1)
    assert torch.equal(read.scale == 0, largest == 0)
    assert (read.scale <= largest * (1 + rounding) / 127 + torch.finfo(read.scale.dtype).tiny).all()
    assert torch.equal(again.code, read.code)
    index = torch.from_numpy(generator.integers(0, count, 9))
    assert torch.equal(bits(read[cut[0] : cut[1]]), bits(whole[cut[0] : cut[1]]))
    assert torch.equal(bits(read.index_select(0, index.int())), bits(whole[index]))
    # those that have been in 8 bits are not rounded again, whatever the chances
    same = packed(whole, "others", read.scale)
    assert torch.equal(bits(same[:]), bits(whole))
    assert torch.equal(same.scale, read.scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.97, -0.3, 1e-3])
def test_a_number_is_itself_on_average(dtype, share):
    """One large number, and many that are a share of a step: the nearest step would be off by it in all of them."""
    values = torch.full((200, 1001), share / 127, dtype=dtype)
    values[:, 0] = 1
    found = packed(values)[:].double() * 127
    assert torch.equal(found[:, 0].round(), torch.full((200,), 127.0, dtype=torch.float64))
    parts = found[:, 1:]
    assert parts.unique().numel() == 2
    deviation = (abs(share) * (1 - abs(share)) / parts.numel()) ** 0.5
    assert abs(float(parts.mean()) - share) < 4 * deviation
    for of_rows_or_columns in (parts.mean(0), parts.mean(1)):  # nor do neighbours share their chances
        expected = deviation * of_rows_or_columns.numel() ** 0.5
        assert 0.85 * expected < float(of_rows_or_columns.std()) < 1.15 * expected
    assert not torch.equal(packed(values, "one").code, packed(values, "other").code)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_and_the_smallest_numbers_there_are(dtype):
    limits = torch.finfo(dtype)
    least = torch.tensor([limits.smallest_normal], dtype=dtype) * limits.eps
    values = torch.zeros(6, 12, dtype=dtype)
    values[0], values[1, 3] = limits.max, -limits.max
    values[2], values[3, ::2], values[4], values[5, 5] = least, 150 * least, -limits.smallest_normal, limits.min
    read = packed(values)
    whole, step = read[:].double(), read.scale.double()[:, None]
    assert read[:].isfinite().all()
    assert ((whole - values.double()).abs() <= step).all()
    assert (step <= values.double().abs().amax(1, keepdim=True) / 126 + torch.finfo(read.scale.dtype).tiny).all()
    assert (whole[values == 0] == 0).all()


def test_what_is_narrow_stays_whole():
    assert in_eight_bits(torch.ones(8, 1), "") is None
    assert in_eight_bits(torch.ones(8, 2), "") is not None
    assert in_eight_bits(torch.ones(8, 4).half(), "") is None
    assert in_eight_bits(torch.ones(8, 0), "") is None
    assert in_eight_bits(torch.ones(8), "") is None


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_training_is_the_same_and_the_memory_a_quarter(tmp_path, make):
    def trained(path, dtype):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
        recorder = path and dualhook.instrument(model, path, dtype=dtype, verbose=False)
        optimizer = make(model.parameters(), lr=0.01)
        for _ in range(12):
            optimizer.zero_grad()
            F.mse_loss(model(torch.randn(32, 256)), torch.randn(32, 256)).backward()
            optimizer.step()
            if path:
                recorder.flush()
        state = torch.get_rng_state(), np.random.get_state()[1].tolist()
        return model, path and recorder.close(), state

    np.random.seed(0)
    bare, _, expected = trained(None, None)
    _, whole, _ = trained(tmp_path / "whole", None)
    model, memory, state = trained(tmp_path / "run", torch.int8)
    assert torch.equal(state[0], expected[0])
    assert state[1] == expected[1]
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), bare.parameters(), strict=True))
    sizes = [
        sum(values.nbytes for path in one._store.layout.segments() for values in rows_in(path).values())
        for one in (memory, whole)
    ]
    assert sizes[0] / sizes[1] == pytest.approx(0.25, abs=0.02)
    assert "segments of rows in 8 bits;" in str(memory)
    assert "8 bits" not in str(whole)
    assert (version(tmp_path / "run"), version(tmp_path / "whole")) == (7, 1)
    assert not memory.verify()["inexact_steps"].any()
    least = min(memory.attend(model, torch.randn(20, 256)).receipt["explained"])
    assert (0.97 if make is torch.optim.SGD else 0.9) <= least < 0.999  # Adam makes much of what is small
    for layer in memory.layers:  # no row is off by much, nor by the same as others
        off_by = rows_of(memory, layer).key - rows_of(whole, layer).key
        assert 0 < float(off_by.abs().max()) <= float(rows_of(whole, layer).key.abs().max()) / 127
        assert abs(float(off_by.mean())) < 0.01 * float(off_by.abs().max())


def rows_in(path: Path) -> dict[str, Tensor]:
    file = open_tensors(path)
    return {name: file.get_tensor(name) for name in tensor_names(file) if name.startswith("rows/")}


def test_the_same_training_gives_the_same_files_and_another_segment_other_chances(tmp_path):
    files = []
    for run in ("one", "other"):
        _, memory = recorded(tmp_path / run, dtype=torch.int8)
        files.append([rows_in(path) for path in memory._store.layout.segments()])
    for one, other in zip(*files, strict=True):
        assert all(torch.equal(values, other[name]) for name, values in one.items())

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

        def forward(self, x):
            return self.a(x) + self.b(x + 1e-6)

    torch.manual_seed(0)
    model = Same()
    recorder = dualhook.instrument(model, tmp_path / "same", dtype=torch.int8, verbose=False)
    x = torch.randn(8, 64)
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        recorder.flush()
    first, second = (rows_in(path) for path in recorder.close()._store.layout.segments())
    both = [(first["rows/a/key/code"], second["rows/a/key/code"]), (first["rows/a/key/code"], first["rows/b/key/code"])]
    assert all(float((one == other).float().mean()) < 0.9 for one, other in both)


def test_every_layer_its_own_dtype_though_they_read_the_same(tmp_path):
    """Of layers that share keys those that are lossless keep theirs, whoever has more rows."""
    _, whole = recorded(tmp_path / "whole")
    _, memory = recorded(tmp_path / "run", dtype={"all": torch.int8, "one": None, "head": torch.float16})
    for layer in ("one", "head", "deeper", "other"):
        own, expected = rows_of(memory, layer), rows_of(whole, layer)
        assert torch.equal(own.key, expected.key) == (layer == "one")
        assert torch.equal(own.output_grad, expected.output_grad) == (layer == "one")
    (header, *_) = headers(memory)
    assert ["eight_bit" in header[layer] for layer in ("conv", "deeper", "other", "one", "head")] == [
        True, True, True, False, False
    ]  # fmt: skip
    assert not any("key_of" in own for own in header.values())
    _, both = recorded(tmp_path / "both", dtype=torch.int8)
    shared = [own for header in headers(both) for own in header.values() if "key_of" in own]
    assert shared
    assert all(own["eight_bit"]["key"] == "float32" for own in shared)
    assert torch.equal(rows_of(both, "one").key, rows_of(both, "other").key)


def test_what_is_no_number_is_kept_whole(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    recorder = dualhook.instrument(model, tmp_path / "run", dtype=torch.int8, verbose=False)
    x = torch.randn(6, 8)
    x[2, 3] = float("inf")
    with pytest.warns(UserWarning, match="NaN or infinity"):
        model(torch.randn(6, 8)).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.01).step()
        recorder.flush()
        model.zero_grad()
        model[0](x).nan_to_num().square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.01).step()
    memory = recorder.close()
    first, second = headers(memory)
    assert set(first["0"]["eight_bit"]) == {"key", "output_grad"}
    assert "key" not in second["0"].get("eight_bit", {})
    assert torch.equal(rows_of(memory, "0").key[6:], x)
    before = rows_of(memory, "0").key.clone()
    assert torch.equal(bits(rows_of(dualhook.compact(tmp_path / "run"), "0").key), bits(before))


def test_keys_that_output_gradients_are_computed_from_stay_whole(tmp_path):
    memories = []
    for dtype in (None, torch.int8):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 600))
        recorder = dualhook.instrument(model, tmp_path / str(dtype), verbose=False, dtype=dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(800, 6)), torch.randint(0, 600, (800,))).backward()
            optimizer.step()
        memories.append(recorder.close())
    assert any(name.startswith("rows/2/softmax/") for name in names_of(memories[1]))
    assert ["eight_bit" in headers(memories[1])[0][layer] for layer in ("0", "2")] == [True, False]
    same, coarse = (
        [torch.equal(getattr(rows_of(one, layer), name), getattr(rows_of(other, layer), name)) for name in FLOATS]
        for one, other, layer in ((*memories, "2"), (*memories, "0"))
    )
    assert (same, coarse) == ([True, True], [False, False])
    before = rows_of(memories[0], "2").key.clone()
    assert torch.equal(rows_of(dualhook.compact(tmp_path / "None", dtype=torch.int8), "2").key, before)


FLOATS = ("key", "output_grad")


def test_the_largest_of_a_row_stay_what_they_are(tmp_path):
    memories = []
    for dtype in (None, torch.int8):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 600, bias=False))
        recorder = dualhook.instrument(model, tmp_path / str(dtype), dtype=dtype, head_grads=3, verbose=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dualhook.InexactWarning)
            model(torch.randn(5, 32)).square().sum().backward()
            torch.optim.SGD(model.parameters(), lr=1e-3).step()
        memories.append(rows_of(recorder.close(), "0"))
    assert torch.equal(memories[0].output_grad, memories[1].output_grad)
    assert not torch.equal(memories[0].key, memories[1].key)


def codes(memory: dualhook.DualMemory) -> dict[str, Tensor]:
    """Everything of all rows that is in 8 bits, whichever segments it lies in."""
    found: dict[str, list[Tensor]] = {}
    for path in memory._store.layout.segments():
        for name, values in rows_in(path).items():
            if name.endswith(("/code", "/scale")):
                found.setdefault(name, []).append(values)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("sparse", [False, True])
def test_going_on_from_an_earlier_step_keeps_every_bit_before_it(tmp_path, sparse):
    _, three = recorded(tmp_path / "three", steps=3)
    model, whole = recorded(tmp_path / "run", steps=6, dtype=torch.int8, sparse=sparse)
    before = {name: values.clone() for name, values in codes(whole).items()}
    model.load_state_dict(three.state_dict())
    recorder = dualhook.instrument(
        model, tmp_path / "run", layers="all", verbose=False, resume_at=3, dtype=torch.int8, sparse=sparse
    )
    cut = dualhook.load(tmp_path / "run")
    assert cut.steps == 3
    for name, values in codes(cut).items():
        assert len(values) == 3 * 8
        assert torch.equal(values, before[name][: len(values)])
    assert not inspected(cut._store.layout, cut._store.manifest, deep=True).damage
    model.zero_grad()
    F.cross_entropy(model(torch.rand(8, 1, 8, 8)), torch.arange(8) % 5).backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    memory = recorder.close()
    assert memory.steps == 4
    assert "eight_bit" in headers(memory)[-1]["one"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_what_rows_in_fewer_bits_leave_open_is_no_other_model(tmp_path, dtype):
    torch.manual_seed(0)
    model = nn.Linear(64, 8)
    recorder = dualhook.instrument(model, tmp_path / "run", dtype=dtype, verbose=False)
    optimizer, states = torch.optim.SGD(model.parameters(), lr=1.0), []
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(32, 64)), torch.arange(32) % 8).backward()
        optimizer.step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    recorder.close()
    model.load_state_dict(states[0])
    with pytest.raises(StoreError, match="of this model is off by"):
        dualhook.instrument(model, tmp_path / "run", dtype=dtype, verbose=False, resume_at=3)
    model.load_state_dict(states[2])
    dualhook.instrument(model, tmp_path / "run", dtype=dtype, verbose=False, resume_at=3).close()


@pytest.mark.parametrize("dtype", [None, torch.int8])
@pytest.mark.parametrize("segment_bytes", [1, 10**9])
def test_compacting_does_not_round_a_second_time(tmp_path, dtype, segment_bytes):
    _, memory = recorded(tmp_path / "run", dtype=torch.int8)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    again = dualhook.compact(tmp_path / "copy", dtype=dtype, segment_bytes=segment_bytes)
    assert len(again._store.segments) == (6 if segment_bytes == 1 else 1)
    assert version(tmp_path / "copy") == 7
    same_rows(memory, again)
    expected = codes(memory)
    assert codes(again).keys() == expected.keys()
    for name, values in codes(again).items():
        assert torch.equal(bits(values) if values.is_floating_point() else values, bits_or_codes(expected[name])), name
    assert str(memory.verify()) == str(again.verify())


def bits_or_codes(values: Tensor) -> Tensor:
    return bits(values) if values.is_floating_point() else values


def test_keys_of_which_another_layer_has_some_keep_their_scales(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.all, self.some = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            chosen = (torch.arange(len(x)) % 3 == 1)[:, None]
            return self.all(x) * torch.where(chosen, 1e-3, 1) + self.some(x) * chosen

    torch.manual_seed(0)
    model = Two().bfloat16()  # of which products of code and scale are rounded
    recorder = dualhook.instrument(model, tmp_path / "run", dtype=torch.int8, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(9, 32).bfloat16()).square().sum().backward()
        optimizer.step()
        recorder.flush()
    memory = recorder.close()
    assert all(own["some"]["key_of"] == "all" for own in headers(memory))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for dtype in (None, torch.int8):
        again = dualhook.compact(tmp_path / "copy", dtype=dtype)
        assert headers(again)[0]["some"]["key_of"] == "all"
        same_rows(memory, again)
        assert all(torch.equal(values, codes(memory)[name]) for name, values in codes(again).items())
    keys, found = rows_of(memory, "some").key.clone(), codes(memory)
    alone = dualhook.compact(tmp_path / "copy", min_share=0.02)  # those that both have do not count in the first
    assert alone._store.manifest.dropped == {"all": 9}
    assert "key_of" not in headers(alone)[0]["some"]
    assert torch.equal(rows_of(alone, "some").key, keys)
    for part in EightBitRows.FIELDS:
        assert torch.equal(codes(alone)[f"rows/some/key/{part}"], found[f"rows/all/key/{part}"][1::3])


def test_compacting_puts_rows_in_8_bits_and_makes_them_whole_again(tmp_path):
    _, whole = recorded(tmp_path / "run")
    size = whole._store.nbytes
    model, half = recorded(tmp_path / "half", dtype=torch.float16)
    assert any("/scaled/" in name for name in names_of(half))
    for path in (tmp_path / "run", tmp_path / "half"):
        memory = dualhook.compact(path, dtype=torch.int8)
        assert version(path) == 7
        assert all("eight_bit" in rows for rows in headers(memory)[0].values())
        assert memory._store.nbytes < 0.6 * size
        assert 0.97 <= min(memory.attend(model, torch.rand(3, 1, 8, 8)).receipt["explained"]) < 1
        seen = {layer: rows_of(memory, layer) for layer in memory.layers}
        seen = {layer: (rows.key.clone(), rows.output_grad.clone()) for layer, rows in seen.items()}
        back = dualhook.compact(path, dtype=torch.float32)
        assert version(path) < 7
        for layer, (key, output_grad) in seen.items():
            assert torch.equal(rows_of(back, layer).key, key)
            assert torch.equal(rows_of(back, layer).output_grad, output_grad)


def test_rows_that_were_lossless_stay_so_beside_those_in_8_bits(tmp_path):
    model, first = recorded(tmp_path / "run", steps=4, dtype=torch.int8)
    recorder = dualhook.instrument(model, tmp_path / "run", layers="all", resume=True, verbose=False)
    model.zero_grad()
    F.cross_entropy(model(torch.rand(8, 1, 8, 8)), torch.arange(8) % 5).backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    memory = recorder.close()
    assert len(headers(memory)) == len(first._store.segments) + 1
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    again = dualhook.compact(tmp_path / "copy")
    same_rows(memory, again)
    assert [{"eight_bit" in rows for rows in own.values()} for own in headers(again)] == [{True}, {False}]
    expected = {layer: rows_of(memory, layer) for layer in memory.layers}
    narrow = dualhook.compact(tmp_path / "run", dtype=torch.int8)
    for layer, before in expected.items():  # what was in 8 bits is what it was, the rest is rounded now
        own, early = rows_of(narrow, layer), before.step <= 4
        for name in FLOATS:
            values, truth = getattr(own, name), getattr(before, name)
            assert torch.equal(bits(values[early]), bits(truth[early]))
            assert not torch.equal(values[~early], truth[~early])


def test_few_rows_are_left_and_the_rest_keep_their_codes(tmp_path):
    _, memory = recorded(tmp_path / "run", dtype=torch.int8)
    before = {layer: rows_of(memory, layer).key.clone() for layer in memory.layers}
    fewer = dualhook.compact(tmp_path / "run", min_share=0.1)
    assert any(fewer._store.manifest.dropped.values())
    for layer in memory.layers:
        keys = {tuple(row) for row in before[layer].tolist()}
        assert {tuple(row) for row in rows_of(fewer, layer).key.tolist()} <= keys


def test_folding_takes_in_rows_in_8_bits(tmp_path):
    model, memory = recorded(tmp_path / "run", steps=12, dtype=torch.int8, max_bytes=100_000, on_full="fold")
    assert memory._store.first_step > 0
    assert memory._store.nbytes <= 100_000
    for name, value in memory.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-2, atol=1e-3)


def test_what_is_not_in_8_bits_may_be_sparse(tmp_path):
    _, memory = recorded(tmp_path / "run", dtype={"all": torch.int8, "head": None}, sparse=True)
    (header, *_) = headers(memory)
    assert "key" in header["head"]["sparse"]
    assert set(header["one"]["eight_bit"]) == {"key", "output_grad"}
    assert "sparse" not in header["one"]
    assert "segments of sparse rows and rows in 8 bits;" in str(memory)
    assert version(tmp_path / "run") == 7


def no_scale(tensors, header):
    tensors["rows/head/key/scale"][1] = float("nan")


def endless(tensors, header):
    tensors["rows/head/key/scale"][1] = float("inf")


def negative(tensors, header):
    tensors["rows/head/key/scale"][1] = -1


def one_scale_less(tensors, header):
    tensors["rows/head/key/scale"] = tensors["rows/head/key/scale"][:-1]


def wider_codes(tensors, header):
    tensors["rows/head/key/code"] = tensors["rows/head/key/code"].short()


def wider_scales(tensors, header):
    tensors["rows/head/key/scale"] = tensors["rows/head/key/scale"].double()


def fewer_columns(tensors, header):
    tensors["rows/head/key/code"] = tensors["rows/head/key/code"][:, 1:].contiguous()


def without_codes(tensors, header):
    del tensors["rows/head/key/code"]


def of_another_dtype(tensors, header):
    header["rows"]["head"]["eight_bit"]["key"] = "int8"


def of_no_dtype(tensors, header):
    header["rows"]["head"]["eight_bit"]["key"] = ["float32"]


def of_two_dtypes(tensors, header):
    header["rows"]["head"]["eight_bit"]["key"] = "bfloat16"


def of_no_such_rows(tensors, header):
    header["rows"]["head"]["eight_bit"]["slot"] = "float32"


def sparse_too(tensors, header):
    header["rows"]["head"]["sparse"] = {"key": 32}


def no_object(tensors, header):
    header["rows"]["head"]["eight_bit"] = ["key"]


@pytest.mark.parametrize(
    "change",
    [
        no_scale, endless, negative, one_scale_less, wider_codes, wider_scales, fewer_columns, without_codes,
        of_another_dtype, of_no_dtype, of_two_dtypes, of_no_such_rows, sparse_too, no_object,
    ],
)  # fmt: skip
def test_rows_in_8_bits_that_make_no_sense_are_refused(tmp_path, change):
    path = damaged(tmp_path, change, dtype=torch.int8)
    with pytest.raises(StoreError, match=r"make no sense|makes no sense|is damaged"):
        rows_of(dualhook.load(path), "head")
    found = inspected(Layout(path), Manifest.read(Layout(path)), deep=True).damage
    assert found[0].file == "segments/00000000.safetensors"


def test_a_code_that_nothing_is_rounded_to_is_found(tmp_path):
    def lowest(tensors, header):
        tensors["rows/head/key/code"][0, 0] = -128

    path = damaged(tmp_path, lowest, dtype=torch.int8)
    found = inspected(Layout(path), Manifest.read(Layout(path)), deep=True).damage
    assert "codes below -127" in str(found[0])


@pytest.mark.parametrize("name", ["rows/head/key/code", "rows/head/output_grad/scale"])
def test_a_flipped_bit_is_found(tmp_path, name):
    _, memory = recorded(tmp_path / "run", steps=2, dtype=torch.int8)
    (path,) = memory._store.layout.segments()
    data = bytearray(path.read_bytes())
    data[data.index(open_tensors(path).get_tensor(name).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    found = inspected(memory._store.layout, memory._store.manifest, deep=True).damage
    assert name in str(found[0])
    assert "head" in str(Store(tmp_path / "run", on_damage="skip").note_of_loss)


def test_older_versions_refuse_rows_in_8_bits(tmp_path, monkeypatch):
    recorded(tmp_path / "run", steps=2, dtype=torch.int8)
    assert json.loads((tmp_path / "run" / "dualhook.json").read_text())["version"] == 7
    monkeypatch.setattr("dualhook.store.layout.FORMAT_VERSION", 6)
    with pytest.raises(StoreError, match="format version 7"):
        dualhook.load(tmp_path / "run")
