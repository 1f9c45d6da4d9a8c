"""Files of keys read like one tensor, here and elsewhere; one that is damaged or missing is named."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from store.test_compacting import same_rows
from store.test_pool import (
    BATCH,
    SPEC,
    SPECIAL,
    all_keys,
    damage,
    images,
    key_files,
    recorded,
)
from store.test_store import bits

import dualhook
from dualhook.errors import StoreError
from dualhook.store import Layout, Manifest, inspected
from dualhook.store.keyfiles import PooledKeys, keys_in
from dualhook.store.layout import open_tensors, read_header, tensor_names, write_tensors
from dualhook.store.pool import KeyPool
from dualhook.store.remote import RangedFile


def missing(path: Path) -> str:
    path.unlink()
    return "is missing: those of one, other, some"


def flipped(path: Path) -> str:
    data = bytearray(path.read_bytes())
    data[4096 + 100] ^= 1
    path.write_bytes(data)
    return "is not as it was written"


def cut_short(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-7])
    return "cannot be read"


def of_another_place(path: Path) -> str:
    shutil.copy(path.with_name(path.name.replace("1", "0")), path)
    return "is in the place of another file"


def shorter(path: Path) -> str:
    file = open_tensors(path)
    header = read_header(path, file)
    header["rows"]["other"]["count"] -= 1
    write_tensors(path, {name: file.get_tensor(name)[:-1].clone() for name in tensor_names(file)}, header)
    return "lacks keys that segments refer to"


@pytest.mark.parametrize("change", [missing, flipped, cut_short, of_another_place, shorter])
def test_a_file_of_keys_that_is_not_there_is_named_and_the_rest_is_answered(tmp_path, change):
    model, memory = recorded(tmp_path / "run", epochs=3)
    expected = memory.attend(model, images()[:2], layers="head").top(3)
    what = change(Layout(tmp_path / "run").key_file(1))
    (one,) = inspected(Layout(tmp_path / "run"), Manifest.read(Layout(tmp_path / "run")), deep=True).damage
    assert (one.file, one.what.startswith(what)) == ("segments/keys-00000001.safetensors", True)
    assert (one.steps, one.layers) == ((2, 9), {"one", "other", "some"})
    if change is not flipped:  # bits are looked at in deep inspections only
        with pytest.raises(StoreError, match=r"damaged: segments/keys-00000001.safetensors .* \(step 2 to 9\)"):
            dualhook.load(tmp_path / "run")
    rest = dualhook.load(tmp_path / "run", on_damage="skip")
    assert "keys-00000001" in str(rest.info())
    found = rest.attend(model, images()[:2], layers="head").top(3)
    assert (found["pattern"] == expected["pattern"]).all()
    assert rest.patterns("one") == 2 * BATCH  # of the steps that do not refer to it
    table = {row["layer"]: row["exact"] for row in rows_of(rest.verify())}
    assert (table["head"], table["one"]) == (True, False)
    with pytest.raises(StoreError, match="damaged"):
        dualhook.compact(tmp_path / "run")


def rows_of(table) -> list[dict]:
    return [dict(zip(("layer", "exact"), one, strict=True)) for one in zip(table["layer"], table["exact"], strict=True)]


def test_a_file_that_no_segment_refers_to_does_not_matter(tmp_path):
    _, memory = recorded(tmp_path / "run", epochs=2)
    left = Layout(tmp_path / "run").key_file(9)
    shutil.copy(Layout(tmp_path / "run").key_file(0), left)  # and it is in another one's place
    assert damage(tmp_path / "run") == []
    assert dualhook.load(tmp_path / "run").nbytes == memory.nbytes


@pytest.mark.parametrize(
    "change",
    [
        lambda own: own.update(key_files=[]),
        lambda own: own.update(key_files=[[0, 8], [0, 8]]),
        lambda own: own.update(key_files=[[0, -8]]),
        lambda own: own.update(key_files=[["0", 8]]),
        lambda own: own.update(key_files=[[0]]),
        lambda own: own.update(key_files=7),
        lambda own: own.update(key_files=[[0, 2**40]]),
        lambda own: own.update(key_files=[[4, 8]]),
        lambda own: own.pop("key_files"),
    ],
)
def test_headers_that_make_no_sense_are_refused(tmp_path, change):
    recorded(tmp_path / "run", epochs=1)
    path = Layout(tmp_path / "run").segment(0)
    file = open_tensors(path)
    header = read_header(path, file)
    change(header["rows"]["other"])
    write_tensors(path, {name: file.get_tensor(name).clone() for name in tensor_names(file)}, header)
    assert damage(tmp_path / "run")
    with pytest.raises(StoreError):
        list(dualhook.load(tmp_path / "run")._store.blocks("other", last_step=3, block_rows=8))


def test_rows_beyond_the_files_are_refused(tmp_path):
    recorded(tmp_path / "run", epochs=1)
    path = Layout(tmp_path / "run").segment(0)
    file = open_tensors(path)
    tensors = {name: file.get_tensor(name).clone() for name in tensor_names(file)}
    tensors["rows/other/key_row"][3] = 8
    write_tensors(path, tensors, read_header(path, file))
    with pytest.raises(StoreError, match="make no sense"):
        all_keys(dualhook.load(tmp_path / "run"))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_memory_in_object_storage_reads_the_same(tmp_path, sparse):
    model, memory = recorded(tmp_path / "run", epochs=3, sparse=sparse)
    files = fsspec.filesystem("memory")
    if files.exists("/pool"):
        files.rm("/pool", recursive=True)
    files.put(str(tmp_path / "run"), "/pool", recursive=True)
    remote = dualhook.load("memory://pool")
    same_rows(memory, remote)
    assert remote.nbytes == memory.nbytes
    assert str(remote.verify(model)) == str(memory.verify(model))
    assert not remote._store.damage


def test_keys_in_object_storage_are_fetched_once(tmp_path, monkeypatch):
    recorded(tmp_path / "run", epochs=6)
    files = fsspec.filesystem("memory")
    if files.exists("/once"):
        files.rm("/once", recursive=True)
    files.put(str(tmp_path / "run"), "/once", recursive=True)
    remote, fetched, read = dualhook.load("memory://once"), [], RangedFile.get_tensors
    monkeypatch.setattr(RangedFile, "get_tensors", lambda file, names: fetched.extend(names) or read(file, names))
    assert torch.equal(all_keys(remote), all_keys(dualhook.load(tmp_path / "run")))
    assert fetched.count("rows/other/key") == len(key_files(tmp_path / "run")) == 3


def test_pieces_travel_to_other_processes(tmp_path):
    _, memory = recorded(tmp_path / "run", epochs=2, every=2)
    for piece in memory._store.pieces("some", last_step=6):
        there = pickle.loads(pickle.dumps(piece))
        for one, other in zip(piece.blocks(5), there.blocks(5), strict=True):
            assert torch.equal(bits(one.key), bits(other.key))


@given(data=st.data(), counts=st.lists(st.integers(1, 5), min_size=1, max_size=5), sparse=st.booleans())
def test_keys_of_several_files_read_like_one_tensor(tmp_path_factory, data, counts, sparse):
    root = tmp_path_factory.mktemp("run") / "memory"
    Layout(root).create(overwrite=False)
    Manifest((SPEC,), {}).write(Layout(root))
    truth, files, layout = [], [], Layout(root)
    for number, count in enumerate(counts):
        key = SPECIAL[torch.randint(0, 8, (count, 8), generator=torch.Generator().manual_seed(number))]
        truth.append(key.clone())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dualhook.store.sparse.WORTH", 100.0)
            new = KeyPool(layout, sparse=sparse).segment(number)
            new._keys["fc"] = key
            new.write({})
        files.append((layout.key_file(number), count))
    whole, read = torch.cat(truth), PooledKeys(files, "fc")
    assert (read.shape, read.dtype, len(read), read.dim()) == (whole.shape, whole.dtype, len(whole), 2)
    index = data.draw(st.one_of(
        st.lists(st.integers(0, len(whole) - 1)),
        st.integers(0, len(whole) - 1).map(lambda begin: list(range(begin, len(whole)))),
    ))  # fmt: skip
    found = read.index_select(0, torch.tensor(index, dtype=torch.int32))
    assert torch.equal(bits(found), bits(whole[index]))
    with pytest.raises(StoreError, match="make no sense"):
        keys_in(files[0][0], "fc", counts[0] + 1)


def test_older_versions_refuse_keys_in_files_of_their_own(tmp_path, monkeypatch):
    recorded(tmp_path / "run", epochs=1)
    monkeypatch.setattr("dualhook.store.layout.FORMAT_VERSION", 7)
    with pytest.raises(StoreError, match="format version 8, this dualhook reads up to 7: install a newer"):
        dualhook.load(tmp_path / "run")
