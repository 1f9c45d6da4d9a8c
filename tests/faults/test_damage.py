"""A flipped bit, a file cut short, missing, in another's place or of another memory: named, and lived without."""

from __future__ import annotations

import json
import os
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from faults import loop

import dualhook
from dualhook.cli import main
from dualhook.errors import StoreError
from dualhook.store import Layout, Manifest, inspected

FLIPS = 4000 if int(os.environ.get("DUALHOOK_KILLS", "24")) >= 200 else 250
SEGMENT = "segments/{:08d}.safetensors"
GOLDEN = Path(__file__).parent.parent / "store" / "golden"
QUERIES = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6)


def recorded(path: Path, make=torch.optim.AdamW, model=None, **settings) -> loop.Net:
    """Five segments of three steps each, a second origin, snapshots if the optimiser has any, two columns."""
    model = model or loop.network()
    recorder = dualhook.instrument(model, path, verbose=False)
    optimizer = make(model.parameters(), **({"lr": 0.05} | settings))

    def after_step(step: int) -> None:
        if step % 3 == 0:
            recorder.flush()

    loop.train(model, optimizer, recorder, range(1, 16), after_step)
    memory = recorder.close()
    memory.add_column("label", [k % 3 for k in range(100)])
    memory.add_column("other", [k % 2 for k in range(100)])
    assert len(memory._store.segments) == 5
    return model


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "memory"
    recorded(path)
    return path


@pytest.fixture
def path(original, tmp_path):
    return shutil.copytree(original, tmp_path / "memory")


def damage(path: Path) -> list[str]:
    """What is wrong, each as a line that begins with the file's name."""
    layout = Layout(path)
    try:
        manifest = Manifest.read(layout)
    except StoreError as error:
        return [str(error).removeprefix(f"{path}/")]
    return [str(one) for one in inspected(layout, manifest, deep=True).damage]


def files_named(path: Path) -> set[str]:
    return {line.partition(" ")[0] for line in damage(path)}


# ---- named ---------------------------------------------------------------------------------------------------


def test_nothing_is_wrong_with_a_memory_as_it_was_written(path):
    assert damage(path) == []
    report = dualhook.load(path).verify(deep=True)
    assert report.damage == ()
    assert report["exact"].all()


def test_every_flipped_bit_is_named(path):
    draw = random.Random(0)
    files = sorted(one for one in path.rglob("*") if one.is_file())
    sizes = [one.stat().st_size for one in files]
    for number in range(FLIPS):
        # the small files and the headers are as likely as the rows
        file = draw.choice(files) if number % 2 else draw.choices(files, sizes)[0]
        data = file.read_bytes()
        at = draw.randrange(min(len(data), 1500) if number % 4 < 2 else len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :])
        assert files_named(path) == {file.relative_to(path).as_posix()}, (file, at)
        file.write_bytes(data)
    assert damage(path) == []


def test_a_flipped_bit_in_the_word_checksum_is_named(path):
    for file in sorted(one for one in path.rglob("*") if one.is_file()):
        data = file.read_bytes()
        at = data.index(b"checksum") + 4
        file.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
        assert files_named(path) == {file.relative_to(path).as_posix()}
        file.write_bytes(data)


def test_a_flipped_bit_is_named_with_its_tensor_and_steps(path):
    flip(path, SEGMENT.format(2), "rows/head/output_grad")
    name = SEGMENT.format(2)
    assert damage(path) == [f"{name} is not as it was written: rows/head/output_grad (step 7 to 9)"]
    report = dualhook.load(path).verify(deep=True)  # opening does not look at every bit
    assert [str(one) for one in report.damage] == damage(path)
    assert len(report) == 0
    assert name in str(report)


def flip(path: Path, name: str, tensor: str) -> None:
    data = bytearray((path / name).read_bytes())
    size = int.from_bytes(data[:8], "little")
    data[8 + size + json.loads(data[8 : 8 + size])[tensor]["data_offsets"][0] + 3] ^= 16
    (path / name).write_bytes(data)


@pytest.mark.parametrize("number", range(5))
def test_a_missing_segment_is_named(path, number):
    (path / SEGMENT.format(number)).unlink()
    expected = f"{SEGMENT.format(number)} is missing (step {3 * number + 1} to {3 * number + 3})"
    assert damage(path) == [expected]
    with pytest.raises(StoreError, match="is damaged: .* is missing .*on_damage='skip'"):
        dualhook.load(path)


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_named(path, kept):
    for file in sorted(one for one in path.rglob("*") if one.is_file()):
        data = file.read_bytes()
        file.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
        assert files_named(path) == {file.relative_to(path).as_posix()}
        file.write_bytes(data)


def test_files_in_each_others_place_are_named(path):
    for folder in ("segments", "origin", "snapshots", "columns"):
        files = sorted((path / folder).iterdir())
        for one, other in pairwise(files):
            swap(one, other)
            assert files_named(path) == {file.relative_to(path).as_posix() for file in (one, other)}
            swap(one, other)
        shutil.copy(files[0], path / "kept")
        shutil.copy(files[1], files[0])  # twice there
        assert files_named(path) == {files[0].relative_to(path).as_posix()}
        shutil.copy(path / "kept", files[0])


def swap(one: Path, other: Path) -> None:
    one.rename(one.with_suffix(".away"))
    other.rename(one)
    one.with_suffix(".away").rename(other)


def test_files_of_another_memory_are_named(path, tmp_path):
    recorded(tmp_path / "twin", lr=0.04)  # the same steps of the same layers
    for folder in ("segments", "origin", "snapshots", "columns", ""):
        file = max((path / folder).glob("*.safetensors"))
        name = file.relative_to(path).as_posix()
        own = file.read_bytes()
        shutil.copy(tmp_path / "twin" / name, file)
        assert damage(path) == [line for line in damage(path) if line.startswith(f"{name} belongs to another memory")]
        assert files_named(path) == {name}
        file.write_bytes(own)


def test_a_missing_origin_is_named(path):
    (path / "origin" / "00000001.safetensors").unlink()
    assert damage(path) == ["origin/ lacks the file that holds 'late.bias', 'late.weight'"]
    with pytest.raises(StoreError, match="is damaged: no file in origin/ holds 'late"):
        dualhook.load(path).info()


def test_a_segment_of_an_earlier_time_is_named(path):
    """The memory was cut and went on in segments of two steps; somebody brings a file back from before."""
    old = (path / SEGMENT.format(3)).read_bytes()
    model = loop.network()
    model.load_state_dict(dualhook.load(path).state_dict(6))
    optimizer = torch.optim.AdamW(model.parameters())
    recorder = dualhook.instrument(model, path, resume_at=6, verbose=False)
    loop.train(model, optimizer, recorder, range(7, 13), lambda step: recorder.flush() if step % 2 == 0 else None)
    recorder.close()
    assert damage(path) == []
    (path / SEGMENT.format(3)).write_bytes(old)
    assert damage(path) == [f"{SEGMENT.format(3)} begins with step 10: expected 9 (step 9 to 10)"]


def test_memories_without_checksums_are_read_and_said_to_have_none(tmp_path, capsys):
    path = shutil.copytree(GOLDEN / "v1", tmp_path / "v1")
    assert damage(path) == []
    assert dualhook.load(path).verify(deep=True)["exact"].all()
    assert main(["verify", str(path), "--deep"]) == 0
    assert "5 files hold no checksums" in capsys.readouterr().err


def test_the_command_line_names_what_is_damaged(path, capsys):
    assert main(["verify", str(path), "--deep"]) == 0
    capsys.readouterr()
    (path / SEGMENT.format(1)).unlink()
    flip(path, SEGMENT.format(3), "ledger/measured")
    assert main(["verify", str(path), "--deep"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert sorted(out[:2]) == [
        f"{SEGMENT.format(1)} is missing (step 4 to 6)",
        f"{SEGMENT.format(3)} is not as it was written: ledger/measured (step 10 to 12)",
    ]
    assert out[2].startswith("FAILED: 2 damaged")
    assert main(["verify", str(path), "--deep", "--json"]) == 1
    assert sorted(json.loads(capsys.readouterr().out)["damage"]) == sorted(out[:2])


# ---- lived without -------------------------------------------------------------------------------------------


def contributions(memory: dualhook.DualMemory, model: loop.Net, layer: str) -> dict[tuple, float]:
    """Of every pattern for the first query, by its step and sample."""
    table = memory.attend(model, QUERIES, target=0, layers=layer).top(1000).where(query=0)
    return {(row["step"], row["sample"]): row["contribution"] for row in table}


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("what", ["key", "keys", "segment", "ledger", "last"])
def test_the_healthy_rest_is_usable_and_says_what_is_missing(tmp_path, make, what):
    path = tmp_path / "memory"
    settings = {"momentum": 0.9} if make is torch.optim.SGD and what in ("key", "keys") else {}
    model = recorded(path, make, **settings)
    expected = {layer: contributions(dualhook.load(path), model, layer) for layer in ("one", "other", "head")}
    number = 4 if what == "last" else 2
    name, lost = SEGMENT.format(number), range(3 * number + 1, 3 * number + 4)
    if what == "key":
        flip(path, name, "rows/other/key_row")  # which 'one' reads too
    elif what == "keys":  # the inputs of step 4, which come again in 8 and 12
        name, lost = "segments/keys-00000001.safetensors", range(4, 13)
        flip(path, name, "rows/other/key")
    elif what == "ledger":
        flip(path, name, "ledger/hyper")
    else:
        (path / name).unlink()
    memory = dualhook.load(path, on_damage="skip")
    assert memory.steps == (12 if what == "last" else 15)
    attention = memory.attend(model, QUERIES, target=0)
    for table in (attention.receipt, attention.top(3), attention.sum_by("sample"), memory.info(), memory.verify(model)):
        assert name in table.footer
        assert f"step {lost[0]} to {lost[-1]}" in table.footer
    intact = ["late", "head"] if what in ("key", "keys") else []
    report = memory.verify(model, step=memory.steps)
    if what == "last":
        assert (report["error"] > 1e-3).all()  # the model is further than the memory
    else:
        assert [layer for layer in memory.layers if report.where(layer=layer)["exact"][0]] == intact
        assert [n for n, steps in zip(report["layer"], report["inexact_steps"], strict=True) if not steps] == intact
    for layer, found in expected.items():
        left = contributions(memory, model, layer)
        kept = {place: value for place, value in found.items() if layer in intact or place[0] not in lost}
        assert left.keys() == kept.keys()
        if make is torch.optim.SGD or layer in intact:
            assert list(left.values()) == pytest.approx([kept[place] for place in left], rel=1e-9)
    explained = {row["layer"]: row["explained"] for row in attention.receipt.where(query=0)}
    assert all((explained[layer] > 1 - 1e-9) == (layer in intact) for layer in expected)


@pytest.mark.parametrize("name", ["latest.safetensors", "columns/label.safetensors", "snapshots/00000001.safetensors"])
def test_what_is_not_needed_is_left_out(path, name):
    model = loop.network()
    (path / name).write_bytes(b"gone")
    memory = dualhook.load(path, on_damage="skip")
    assert name in memory.info().footer
    assert memory.columns == [
        "step", "sample", "position", *(["label"] if "label" not in name else []), "other",
    ]  # fmt: skip
    model.load_state_dict(memory.state_dict())
    assert memory.verify(model)["exact"].all()
    assert (memory._store.latest() is None) == name.startswith("latest")
    assert name.startswith("latest") or memory.verify()["exact"].all()


def test_a_damaged_origin_takes_its_layers_with_it(path):
    flip(path, "origin/00000001.safetensors", "late.weight//value")
    memory = dualhook.load(path, on_damage="skip")
    assert memory.layers == ["one", "other", "head"]
    assert memory.verify()["exact"].all()
    assert "origin/00000001.safetensors" in memory.info().footer
    flip(path, "origin/00000000.safetensors", "one.weight//value")
    with pytest.raises(StoreError, match="Bring the files back from a copy$"):
        dualhook.load(path, on_damage="skip")


def test_settings_are_checked(path):
    with pytest.raises(dualhook.DualHookError, match="on_damage='ignore': expected 'raise' or 'skip'"):
        dualhook.load(path, on_damage="ignore")
