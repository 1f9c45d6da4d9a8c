"""Two processes, each with a Trainer, as ``torchrun`` starts them: one memory of both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainers import ROWS, WAYS, Sentences, raw_rows

import dualhook

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("trainers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script, path = str(TESTS / "trainer_process.py"), {"PYTHONPATH": str(TESTS)}
    commands = [[sys.executable, script, str(rank), str(port), str(found)] for rank in range(2)]
    both = [subprocess.Popen(one, env=os.environ | path, stderr=subprocess.PIPE, text=True) for one in commands]
    errors = [process.communicate(timeout=150)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(errors)
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama-sgd"])
def test_two_trainers_make_one_memory(folder, name):
    states = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)]
    for bare, recorded in states:
        assert all(torch.equal(bare[key], recorded[key]) for key in bare)
    memory = dualhook.load(folder / name)
    model = WAYS[name].model()
    model.load_state_dict(states[1][1])
    assert memory.verify(model)["exact"].all()
    layer = "transformer.wte" if name == "gpt2" else "model.embed_tokens"
    ids, seen = Sentences().ids, set()
    for rows in raw_rows(memory, layer):
        assert torch.equal(rows["slot"].long(), ids[rows["sample"], rows["position"]])
        seen |= {
            (rank, sample) for rank, sample in zip(rows["column/rank"].tolist(), rows["sample"].tolist(), strict=True)
        }
    assert {rank for rank, _ in seen} == {0, 1}
    assert {sample for _, sample in seen} == set(range(ROWS))
