"""Memories of every released format version open for ever.

A golden memory is made once by ``python tests/store/test_golden.py VERSION DIR`` and never again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dualhook

GOLDEN = Path(__file__).parent / "golden"


def make(path: Path) -> None:
    """Two layers, a momentum optimiser taken over in the middle of its run, a frozen bias, columns of all kinds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    model[2].bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    def step(samples: list[int]) -> None:
        optimizer.zero_grad()
        inputs = torch.arange(len(samples) * 4.0).reshape(-1, 4) / 10 + samples[0]
        model(inputs).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    step([0])
    recorder = dualhook.instrument(model, path, verbose=False)
    for k in range(4):
        recorder.batch(samples=[k, k + 1], task=k // 2)
        step([k, k + 1])
        if k == 1:
            recorder.flush()  # a second segment
    memory = recorder.close()
    memory.add_column("label", ["a", "b", "a", "b", "c"])


def inputs_of(samples: list[int]) -> torch.Tensor:
    """Inputs [n, 96] with some zeros, the same for a sample in every epoch."""
    places = torch.arange(96.0)
    return torch.stack([((places * (sample + 3)) % 7 - 3).clamp(min=0) / 4 for sample in samples])


def make_8(path: Path) -> None:
    """Two epochs behind a ReLU: keys in files of their own, rows without their zeros, others in 8 bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 24), nn.ReLU(), nn.Linear(24, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = dualhook.instrument(model, path, sparse=True, dtype={"2": torch.int8}, verbose=False)
    for samples in ORDER:
        recorder.batch(samples=samples)
        optimizer.zero_grad()
        model(inputs_of(samples)).square().mean().backward()
        optimizer.step()
        recorder.flush()
    recorder.close()


ORDER = [[0, 1, 2, 3], [4, 5, 6, 7], [5, 2, 7, 0], [3, 6, 1, 4]]


@pytest.mark.parametrize("version", [1])
def test_golden_memory_opens_and_adds_up(version):
    memory = dualhook.load(GOLDEN / f"v{version}")
    assert memory.layers == ["0", "2"]
    assert memory.steps == 4
    assert memory.samples.tolist() == [0, 1, 2, 3, 4]
    assert memory.columns == ["step", "sample", "position", "task", "label"]
    assert memory.verify()["exact"].all()
    assert memory.verify().max_error < 1e-6
    assert memory.weight("2", step=2).flatten().tolist() == pytest.approx(EXPECTED, abs=1e-6)


def check_8(path: Path) -> list[float]:
    """A memory of version 8 holds what has been recorded; some of its weights."""
    memory = dualhook.load(path)
    assert memory.steps == len(ORDER)
    assert memory._store.manifest.needs == 8
    headers = [segment.header["rows"] for segment in memory._store.segments]
    assert all("key_files" in rows["0"] and "sparse" in rows["0"] and "eight_bit" in rows["2"] for rows in headers)
    assert len(list((path / "segments").glob("keys-*"))) == 2  # one for each step of the first epoch
    for samples, segment in zip(ORDER, memory._store.segments, strict=True):
        stored = segment.stored(memory._store.layers[0])
        assert torch.equal(stored.rows(0, 4).key, inputs_of(samples))
    report = memory.verify()
    assert report.where(layer="0")["exact"].all()
    assert report.max_error < 1e-2
    return memory.weight("0").flatten()[:6].tolist() + memory.weight("2").flatten()[:6].tolist()


def test_a_golden_memory_of_version_8_opens_and_adds_up():
    assert check_8(GOLDEN / "v8") == pytest.approx(EXPECTED_8, abs=1e-6)


def test_what_is_written_today_is_read_as_version_8_too(tmp_path):
    make_8(tmp_path / "memory")
    assert check_8(tmp_path / "memory") == pytest.approx(EXPECTED_8, abs=1e-2)  # a rounding may fall otherwise


def test_writing_today_gives_the_golden_files(tmp_path):
    make(tmp_path / "memory")
    golden = GOLDEN / "v1"  # what one process writes has not changed since
    names = sorted(path.relative_to(golden) for path in golden.rglob("*") if path.is_file())
    assert names == sorted(p.relative_to(tmp_path / "memory") for p in (tmp_path / "memory").rglob("*") if p.is_file())
    for name in names:
        old, new = (golden / name).read_bytes(), (tmp_path / "memory" / name).read_bytes()
        if name.suffix == ".json":
            continue  # names the versions that wrote it
        (was, numbers), (now, others) = _parts(old), _parts(new)
        own, added = json.loads(was.pop("__metadata__")["dualhook"]), json.loads(now.pop("__metadata__")["dualhook"])
        assert now == was
        assert {key: value for key, value in added.items() if key not in ADDED.get(own["kind"], ()) + ALWAYS} == own
        # the numbers may differ in their last bits between processors
        assert np.allclose(numbers, others, rtol=1e-5, atol=1e-6, equal_nan=True), name


ALWAYS = ("checksums", "memory")  # came later, and readers of before do not ask for them
ADDED = {"origin": ("number",), "column": ("name",)}


def _parts(data: bytes) -> tuple[dict, np.ndarray]:
    """A file's header, and its numbers."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return header, _numbers(header, data[8 + size :])


def _numbers(header: dict, data: bytes) -> np.ndarray:
    kinds = {"F32": np.float32, "F64": np.float64, "I64": np.int64}
    parts = [
        np.frombuffer(data[slice(*entry["data_offsets"])], kinds[entry["dtype"]]).astype(np.float64)
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    return np.concatenate(parts)


EXPECTED = [0.13393164, 0.24907146, 0.39783734, -0.35780129, -0.24283631, 0.22314881]  # printed when v1 was made

EXPECTED_8 = [
    -0.00076412, 0.05522278, -0.08400170, -0.07473212, -0.03888582, 0.02807899,
    0.00668204, 0.05943086, 0.05421911, -0.11446685, -0.12508950, -0.18177894,
]  # fmt: skip

if __name__ == "__main__":
    version, target = int(sys.argv[1]), Path(sys.argv[2])
    if version == 8:
        make_8(target)
        print(check_8(target))
    else:
        make(target)
        print(dualhook.load(target).weight("2", step=2).flatten().tolist())
