"""One replay serves several questions: in an Attention, and beside the memory when asked to."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.query import replay

I, O = 6, 3


def trained(path, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(I, 8), nn.ReLU(), nn.Linear(8, O)).double()
    with dualhook.instrument(model, path, verbose=False, overwrite=True) as recorder:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01)
        for step in range(15):
            recorder.batch(torch.arange(4) + 4 * (step % 3))
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(4, I).double()), torch.randint(0, O, (4,))).backward()
            optimizer.step()
    return model, recorder.close()


@pytest.fixture
def replays(monkeypatch):
    """The layers that are replayed, as it happens."""
    seen = []
    backward = replay.Replay.backward

    def counting(self, *args, **kwargs):
        seen.append(self._layer)
        yield from backward(self, *args, **kwargs)

    monkeypatch.setattr(replay.Replay, "backward", counting)
    return seen


def everything(attention):
    return [str(table) for table in (attention.top(5), attention.sum_by("sample"), attention.parts, attention.receipt)]


def test_several_questions_share_one_replay(tmp_path, replays):
    model, memory = trained(tmp_path / "run")
    x = torch.randn(3, I).double()
    attention = memory.attend(model, x)
    shared = everything(attention)
    assert replays == ["0", "2"]
    apart = [everything(memory.attend(model, x))[k] for k in range(4)]
    assert shared == apart
    assert not (tmp_path / "run" / "answers").exists()


def test_without_room_every_question_replays_to_the_same_answer(tmp_path, replays):
    model, memory = trained(tmp_path / "run")
    x = torch.randn(3, I).double()
    whole = everything(memory.attend(model, x))
    memory = dualhook.load(tmp_path / "run")
    memory.replay_bytes = 1
    replays.clear()
    assert everything(memory.attend(model, x)) == whole
    assert len(replays) > 2


def test_a_kept_answer_needs_no_replay(tmp_path, replays):
    model, memory = trained(tmp_path / "run")
    x = torch.randn(3, I).double()
    whole = everything(memory.attend(model, x, keep=True))
    replays.clear()
    again = dualhook.load(tmp_path / "run")
    assert everything(again.attend(model, x, keep=True)) == whole
    assert replays == []
    assert everything(again.attend(model, x)) == whole  # not asked to look
    assert replays == ["0", "2"]


def test_an_interrupted_question_goes_on_with_the_layers_that_are_missing(tmp_path, replays, monkeypatch):
    model, memory = trained(tmp_path / "run")
    x = torch.randn(3, I).double()
    whole = everything(memory.attend(model, x))

    def interrupted(self, *args, **kwargs):
        if self._layer == "2":
            raise KeyboardInterrupt
        yield from counting(self, *args, **kwargs)

    counting = replay.Replay.backward
    monkeypatch.setattr(replay.Replay, "backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memory.attend(model, x, keep=True).top(5)
    monkeypatch.setattr(replay.Replay, "backward", counting)
    replays.clear()
    assert everything(dualhook.load(tmp_path / "run").attend(model, x, keep=True)) == whole
    assert replays == ["2"]


def test_answers_to_other_questions_or_of_other_runs_are_not_taken(tmp_path, replays):
    model, memory = trained(tmp_path / "run")
    x = torch.randn(3, I).double()
    memory.attend(model, x, keep=True).top(5)
    for ask in (
        lambda: memory.attend(model, x + 1e-9, keep=True),
        lambda: memory.attend(model, x, target=0, keep=True),
        lambda: memory.averaged("swa").attend(model, x, keep=True),
        lambda: memory.attend(model, x, step=9, keep=True),
    ):
        replays.clear()
        ask().top(5)
        assert "0" in replays
    kept = (tmp_path / "run" / "answers").rename(tmp_path / "answers")
    model, memory = trained(tmp_path / "run", seed=1)
    assert not (tmp_path / "run" / "answers").exists()
    kept.rename(tmp_path / "run" / "answers")
    replays.clear()
    memory.attend(model, x, keep=True).top(5)
    assert replays == ["0", "2"]


def test_a_damaged_answer_is_not_taken(tmp_path, replays):
    model, memory = trained(tmp_path / "run")
    x = torch.randn(3, I).double()
    whole = everything(memory.attend(model, x, keep=True))
    for path in (tmp_path / "run" / "answers").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    replays.clear()
    assert everything(memory.attend(model, x, keep=True)) == whole
    assert replays == ["0", "2"]


def test_overwriting_a_memory_removes_its_answers(tmp_path):
    model, memory = trained(tmp_path / "run")
    memory.attend(model, torch.randn(3, I).double(), keep=True).top(5)
    assert (tmp_path / "run" / "answers").exists()
    dualhook.instrument(model, tmp_path / "run", verbose=False, overwrite=True).close()
    assert not (tmp_path / "run" / "answers").exists()


def test_a_long_replay_is_announced_once_and_can_be_silenced(tmp_path, capsys, monkeypatch):
    model, memory = trained(tmp_path / "run")
    x = torch.randn(3, I).double()
    memory.verify()
    assert capsys.readouterr().err == ""  # it is short
    monkeypatch.setattr("dualhook.progress.LONG", 0.0)
    memory.verify()
    told = capsys.readouterr().err
    assert told.startswith("dualhook: replaying the optimiser over 2 layers, about 0 s; attend(method='preview')")
    assert told.count("\n") == 1
    memory.verbose = False
    memory.verify()
    memory.attend(model, x).top(5)
    assert capsys.readouterr().err == ""
