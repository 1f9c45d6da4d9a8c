"""Long replays are announced, short ones are not, and both can be silenced."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import dualhook


def test_a_long_replay_is_announced_once_and_can_be_silenced(tmp_path, capsys, monkeypatch):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with dualhook.instrument(model, tmp_path / "run", verbose=False) as recorder:
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(4, 6)), torch.randint(0, 3, (4,))).backward()
            optimizer.step()
    memory = recorder.close()
    x = torch.randn(3, 6)
    memory.verify()
    assert capsys.readouterr().err == ""  # it is short
    monkeypatch.setattr("dualhook.progress.LONG", 0.0)
    for ask in (memory.verify, memory.state_dict, memory.attend(model, x, layers="0").top):
        ask()
        told = capsys.readouterr().err
        assert told.startswith("dualhook: replaying the optimiser over ")
        assert told.count("\n") == 1
    for told in (1, 0):  # with a cache once too, and not at all when it is asked again
        memory.attend(model, x, layers="0", cache=True).top()
        assert capsys.readouterr().err.count("\n") == told
    memory.verbose = False
    memory.verify()
    memory.attend(model, x).top(5)
    assert capsys.readouterr().err == ""
