"""Replays that are shared, kept and taken up again; and that nothing of it changes an answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.query.block import Block, Shelf
from dualhook.query.replay import Replay
from dualhook.store import AnswerFiles

STEPS = 24


@pytest.fixture
def run(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    train(model, tmp_path / "run")
    return model, tmp_path / "run"


def train(model, path, **options):
    with dualhook.instrument(model, path, verbose=False, **options) as recorder:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01)
        for step in range(STEPS):
            recorder.batch(torch.arange(4) + 4 * (step % 5))
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(4, 6)), torch.randint(0, 3, (4,))).backward()
            optimizer.step()


@pytest.fixture
def replays(monkeypatch):
    """The layers and steps of every way back."""
    seen = []
    through = Replay._through

    def counted(self, begin, end):
        seen.append((self._layer, begin, end))
        yield from through(self, begin, end)

    monkeypatch.setattr(Replay, "_through", counted)
    return seen


def same(one, other):
    assert one.columns == other.columns
    for name in one.columns:
        assert np.array_equal(one[name], other[name]), name


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_and_budget_change_no_bit_of_an_answer(run, monkeypatch, threads):
    monkeypatch.setattr("dualhook.query.replay.BLOCK_BYTES", 60)
    model, path = run
    x, found = torch.randn(5, 6), []
    for workers, budget in ((1, 2**30), (4, 2**30), (3, 3000), (1, 1)):
        threads(workers)
        memory = dualhook.load(path)
        memory.replay_bytes = budget
        attention = memory.attend(model, x)
        found.append((attention.top(7), attention.receipt, memory.state_dict()))
    for top, receipt, weights in found[1:]:
        same(top, found[0][0])
        same(receipt, found[0][1])
        assert all(torch.equal(weights[name], found[0][2][name]) for name in weights)


@pytest.mark.parametrize("workers", [1, 2])
def test_steps_kept_for_the_way_back_stay_within_half_the_budget(run, monkeypatch, threads, workers):
    monkeypatch.setattr("dualhook.query.replay.BLOCK_BYTES", 60)
    threads(workers)
    memory = dualhook.load(run[1])
    memory.replay_bytes = 20_000
    fresh = []
    take = Shelf.take

    def counted(self, shape, dtype):
        free = sum(map(len, self._free.values()))
        values = take(self, shape, dtype)
        if sum(map(len, self._free.values())) == free:  # nothing was there to be used again
            fresh.append(values.nbytes)
        return values

    monkeypatch.setattr(Shelf, "take", counted)
    memory.weight("0")
    assert 2_000 < sum(fresh) <= 10_000


def test_top_totals_and_receipt_are_one_replay(run, replays):
    model, path = run
    attention = dualhook.load(path).attend(model, torch.randn(3, 6))
    attention.top(3)
    assert sorted(layer for layer, _, _ in replays) == ["0", "2"]
    by_step, receipt = attention.sum_by("step"), attention.receipt
    attention.parts  # noqa: B018
    assert len(replays) == 2
    assert (receipt["explained"] > 1 - 1e-5).all()
    assert len(by_step) == 3 * 2 * STEPS


def test_a_kept_answer_is_the_replay_s_and_needs_none(run, replays):
    model, path = run
    x = torch.randn(3, 6)
    first = dualhook.load(path).attend(model, x, cache=True)
    answers = first.top(5), first.sum_by("sample"), first.receipt, first.parts
    replays.clear()
    again = dualhook.load(path)
    seen: list[int] = []
    again.on_progress(seen.append)
    attention = again.attend(model, x, cache=True)
    top = attention.top(5)
    assert sum(seen) == 2 * STEPS * 4  # one pass over the patterns
    for one, other in zip(answers, (top, attention.sum_by("sample"), attention.receipt, attention.parts), strict=True):
        same(one, other)
    assert replays == []
    again.attend(model, x).top(5)  # not asked for
    assert len(replays) == 2


def test_other_questions_and_damaged_files_are_no_answers(run, replays):
    model, path = run
    x = torch.randn(3, 6)
    memory = dualhook.load(path)
    truth = memory.attend(model, x, cache=True).top(5)
    for other in (
        lambda: memory.attend(model, x + 1, cache=True),
        lambda: memory.attend(model, x, cache=True, target=1),
        lambda: memory.attend(model, x, cache=True, step=STEPS - 1),
        lambda: memory.averaged("swa").attend(model, x, cache=True),
    ):
        replays.clear()
        other().top(5)
        assert replays
    files = sorted((path / "answers").iterdir())
    for file in files:
        file.write_bytes(file.read_bytes()[:-8])
    replays.clear()
    same(memory.attend(model, x, cache=True).top(5), truth)
    assert len(replays) == 2
    files[0].write_bytes(files[1].read_bytes())  # another question's under this name
    for file in files[1:]:
        file.unlink()
    same(memory.attend(model, x, cache=True).top(5), truth)


def test_overwriting_a_memory_removes_its_answers(run):
    model, path = run
    dualhook.load(path).attend(model, torch.randn(2, 6), cache=True).top(2)
    assert any((path / "answers").iterdir())
    train(model, path, overwrite=True)
    assert not (path / "answers").exists()


@pytest.mark.parametrize("after", [1, 5])
def test_an_interrupted_replay_goes_on_where_it_was(run, replays, monkeypatch, after):
    monkeypatch.setattr("dualhook.query.streaming.SAVE_SECONDS", 0.0)
    model, path = run
    x = torch.randn(3, 6)
    budget = 5_000  # a few steps a stretch
    reference = dualhook.load(path)
    reference.replay_bytes = budget
    truth = reference.attend(model, x)
    truth = truth.top(5), truth.sum_by("step"), truth.receipt
    whole = len(replays)
    assert whole > 8
    replays.clear()
    through = Block.through

    def interrupted(self, steps, shelf):
        if len(replays) > after:
            raise KeyboardInterrupt
        return through(self, steps, shelf)

    with monkeypatch.context() as patch:
        patch.setattr(Block, "through", interrupted)
        memory = dualhook.load(path)
        memory.replay_bytes = budget
        with pytest.raises(KeyboardInterrupt):
            memory.attend(model, x, cache=True).top(5)
    done = replays[:-1]
    replays.clear()
    memory = dualhook.load(path)
    memory.replay_bytes = budget
    attention = memory.attend(model, x, cache=True)
    found = attention.top(5), attention.sum_by("step"), attention.receipt
    for one, other in zip(truth, found, strict=True):
        same(one, other)
    assert not {(layer, end) for layer, _, end in done} & {(layer, end) for layer, _, end in replays}
    assert len(list((path / "answers").iterdir())) == 2  # nothing unfinished is left


def test_an_answer_file_of_another_key_is_ignored(tmp_path):
    files = AnswerFiles(tmp_path / "answers")
    assert files.get("a") is None
    files.put("a", {"contribution": torch.ones(1, 1)})
    assert torch.equal(files.get("a")["contribution"], torch.ones(1, 1))
    (tmp_path / "answers" / "a.safetensors").rename(tmp_path / "answers" / "b.safetensors")
    assert files.get("b") is None
    files.drop("b")
    assert list((tmp_path / "answers").iterdir()) == []
