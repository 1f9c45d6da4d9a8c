"""What a file claims is compared with what is there: found by fuzzing, each a plain error that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import dualhook
from dualhook.errors import DualHookError, StoreError
from dualhook.store import Layout, Manifest, inspected
from dualhook.store.layout import open_tensors, read_header, tensor_names, write_tensors

GOLDEN = Path(__file__).parent / "golden" / "v1"
SEGMENT, ORIGIN = "segments/00000000.safetensors", "origin/00000000.safetensors"


@pytest.fixture
def path(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / "memory")


def rewritten(file: Path, change) -> None:
    opened = open_tensors(file)
    header, tensors = read_header(file, opened), {name: opened.get_tensor(name) for name in tensor_names(opened)}
    tensors = {name: values.clone() for name, values in tensors.items()}
    change(header, tensors)
    write_tensors(file, tensors, header)


def everything(path: Path) -> None:
    memory = dualhook.load(path)
    memory.info()
    memory.verify()
    memory.attend(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.ones(1, 4)).top(2)


def refused(path: Path, file: str) -> None:
    with pytest.raises(StoreError, match=file):
        everything(path)
    layout = Layout(path)
    assert all(isinstance(str(one), str) for one in inspected(layout, Manifest.read(layout), deep=True).damage)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"format": "dualhook", "version": 1e999, "layers": []}', '{"format": "dualhook", "version": 0}',
     '{"format": "dualhook", "version": true, "layers": [], "written_by": {}}', "\\ud800", "null"],
)  # fmt: skip
def test_texts_that_are_no_manifest(path, text):
    (path / "dualhook.json").write_text(text)
    with pytest.raises(StoreError, match="no manifest of a memory"):
        dualhook.load(path)


@pytest.mark.parametrize(
    "change",
    [{"in_features": 3}, {"in_features": 10**15}, {"out_features": -1}, {"weight": None}, {"kind": "spline"},
     {"kind": "conv"}, {"slots": 0}, {"slots": 3}, {"bias": "elsewhere"}, {"options": None}, {"name": 1}],
)  # fmt: skip
def test_layers_that_do_not_fit_their_files(path, change):
    manifest = json.loads((path / "dualhook.json").read_text())
    manifest["layers"][0] |= change
    (path / "dualhook.json").write_text(json.dumps(manifest))
    with pytest.raises(DualHookError):
        everything(path)


@pytest.mark.parametrize(
    "change",
    [lambda h, t: h.update(steps=[1, 10**15]), lambda h, t: h.update(steps=[2, 1]), lambda h, t: h.update(steps="12"),
     lambda h, t: h["rows"]["0"].update(count=10**15), lambda h, t: h["rows"]["0"].update(key_of="2"),
     lambda h, t: h.update(parameters=[1]), lambda h, t: h.pop("rows"),
     lambda h, t: t["ledger/entry"][:, 1].fill_(99), lambda h, t: t["ledger/entry"][:, 3].fill_(-1),
     lambda h, t: t["ledger/entry"][:, 0].fill_(10**15), lambda h, t: t.pop("ledger/hyper"),
     lambda h, t: t["rows/0/step"].fill_(-5), lambda h, t: t.update({"rows/0/key": torch.ones(4, 9)}),
     lambda h, t: t.update({"rows/0/output_grad": t["rows/0/output_grad"].long()})],
)  # fmt: skip
def test_segments_that_make_no_sense(path, change):
    rewritten(path / SEGMENT, change)
    refused(path, SEGMENT.rpartition("/")[2])


@pytest.mark.parametrize(
    "change",
    [lambda h, t: h.update(step=-1), lambda h, t: h.update(folded=10**12),
     lambda h, t: h["dtypes"].update({"0.weight": "load"}),
     lambda h, t: h.update(parameters=[]), lambda h, t: t.update({"0.weight//value": torch.ones(7)}),
     lambda h, t: t.pop("0.weight//value")],
)  # fmt: skip
def test_origins_that_make_no_sense(path, change):
    rewritten(path / ORIGIN, change)
    refused(path, "origin")


def test_a_damaged_span_of_any_length_is_counted_at_once(path):
    rewritten(path / SEGMENT, lambda h, t: (h.update(steps=[1, 2**26]), t["ledger/entry"][:, 1].fill_(99)))
    memory = dualhook.load(path, on_damage="skip")
    assert memory.damage if hasattr(memory, "damage") else memory._store.damage
