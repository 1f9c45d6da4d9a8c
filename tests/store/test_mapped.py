"""A mapped file against safetensors' own reader."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualhook.errors import StoreError
from dualhook.store.direct import NAMES
from dualhook.store.layout import glance, open_tensors, read_header, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    held = {str(dtype): torch.arange(-3, 9).reshape(3, 4).to(dtype) for dtype in NAMES}
    return held | {"empty": torch.zeros(0, 5), "scalar": torch.tensor(2.5), "wide": torch.randn(700, 900)}


def same(path, expected: dict[str, torch.Tensor]) -> None:
    file = open_tensors(path)
    assert sorted(file.keys()) == sorted(expected)
    for name, values in expected.items():
        found = file.get_tensor(name)
        assert (found.dtype, found.shape) == (values.dtype, values.shape)
        assert found.equal(values)


def test_it_reads_what_either_writer_wrote(tmp_path):
    save_file(tensors(), tmp_path / "theirs.safetensors", metadata={"dualhook": "{}"})
    write_tensors(tmp_path / "ours.safetensors", tensors(), {"kind": "x"})
    for path in tmp_path.iterdir():
        same(path, load_file(path))
        assert set(open_tensors(path).metadata()) == {"dualhook"}


def test_tensors_outlive_the_file_and_never_change_it(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors(), {})
    before = path.read_bytes()
    wide = open_tensors(path).get_tensor("wide")
    wide += 1
    assert path.read_bytes() == before
    kept = load_file(path)["wide"].clone()
    path.unlink()
    assert wide.equal(kept + 1)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors(), {})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(StoreError, match="cannot be read"):
        open_tensors(path)


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"x": {}}', b'{"x": {"data_offsets": [0, 9]}}', b"\xff"])
def test_a_file_that_is_none_is_refused(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(StoreError, match="cannot be read"):
        open_tensors(path)


def test_texts_that_only_python_takes_for_json_are_read_back(tmp_path):
    path, header = tmp_path / "a.safetensors", {"categories": ["\ud800", "é"], "far": float("inf"), "large": 2**70}
    write_tensors(path, {"x": torch.ones(2)}, header)
    read, names = glance(path)
    assert names == ["x"]
    assert read == read_header(path, open_tensors(path))
    assert {name: read[name] for name in header} == header
