"""Memories of every released format version open for ever.

A golden memory is made once per format version by ``python tests/store/test_golden.py DIR`` and never again.
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

if __name__ == "__main__":
    make(Path(sys.argv[1]))
    print(dualhook.load(sys.argv[1]).weight("2", step=2).flatten().tolist())
