"""A recording that goes on from a checkpoint is the one that an uninterrupted run leaves."""

from __future__ import annotations

import contextlib
import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import dualhook
from dualhook.errors import DualHookError, LayerError, StoreError
from dualhook.records import Mark

STEPS, CHECKPOINT, CRASH = 10, 4, 7
OPTIMIZERS = {
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "no-rule": partial(torch.optim.Rprop, lr=0.01),
}


class Net(nn.Module):
    """A tied embedding, a convolution, two layers with the same keys (stored once), a late starter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.late = nn.Embedding(7, 4), nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 4)
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2).tanh()
        return self.head(self.late(h) + self.one(h) * self.other(h))


def network() -> Net:
    torch.manual_seed(0)
    model = Net().double()
    model.late.requires_grad_(False)
    return model


def train(model: Net, optimizer: torch.optim.Optimizer, recorder, first: int, last: int, flush_at: int | None = None):
    """Steps ``first`` to ``last``; the checkpoint of step 4, if that is among them."""
    checkpoint = None
    for step in range(first, last + 1):
        model.late.requires_grad_(step > 5)
        torch.manual_seed(step)
        recorder.batch(samples=10 * step + torch.arange(3))
        optimizer.zero_grad()
        ids = torch.randint(0, 7, (3, 5))
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(1, 1).flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if step == flush_at:
            recorder.flush()
        if step == CHECKPOINT:
            checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    return checkpoint


def whole_run(path, make, **settings):
    model = network()
    recorder = dualhook.instrument(model, path, layers="all", verbose=False, **settings)
    train(model, make(model.parameters()), recorder, 1, STEPS)
    return model, recorder.close()


def crashed_run(path, make, *, flush_at: int | None, **settings):
    """Cut off after step 7; what is left of it is the checkpoint of step 4."""
    model = network()
    recorder = dualhook.instrument(model, path, layers="all", verbose=False, **settings)
    checkpoint = train(model, make(model.parameters()), recorder, 1, CRASH, flush_at)
    recorder.flush()
    recorder.discard()
    return checkpoint


def resumed_run(path, make, checkpoint, **settings):
    model = network()
    optimizer = make(model.parameters())
    model.load_state_dict(checkpoint[0])
    recorder = dualhook.instrument(model, path, layers="all", resume_at=CHECKPOINT, verbose=False, **settings)
    optimizer.load_state_dict(checkpoint[1])
    assert recorder.steps == CHECKPOINT
    train(model, optimizer, recorder, CHECKPOINT + 1, STEPS)
    return model, recorder.close()


def rows_of(memory, layer):
    blocks = list(memory._store.blocks(layer, last_step=STEPS, block_rows=10**6))
    assert [rows.first for rows in blocks] == [sum(map(len, blocks[:k])) for k in range(len(blocks))]
    return blocks[0].joined(*blocks[1:])  # blocks end where segments do


@pytest.mark.parametrize("flush_at", [CHECKPOINT, 2, None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_memory_is_that_of_an_uninterrupted_run(tmp_path, optimizer, flush_at):
    make = OPTIMIZERS[optimizer]
    model, expected = whole_run(tmp_path / "whole", make)
    checkpoint = crashed_run(tmp_path / "cut", make, flush_at=flush_at)
    resumed, memory = resumed_run(tmp_path / "cut", make, checkpoint)
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert memory.layers == expected.layers == ["conv", "late", "one", "other", "head"]
    assert any("key_of" in own for segment in memory._store.segments for own in segment.header["rows"].values())
    for layer in memory.layers:
        found, wanted = rows_of(memory, layer), rows_of(expected, layer)
        for name in ("key", "output_grad", "step", "sample", "position"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), (layer, name)
    for name, history in expected._store.histories.items():
        own = memory._store.histories[name]
        assert own.optimizer == history.optimizer
        for field in ("step", "scale", "mark"):
            assert torch.equal(getattr(own, field), getattr(history, field)), (name, field)
    assert memory._store.origin_steps == expected._store.origin_steps
    report, wanted = memory.verify(resumed), expected.verify()
    assert list(report["inexact_steps"]) == list(wanted["inexact_steps"])
    if optimizer != "no-rule":
        assert report["exact"].all()
        assert report.max_error < 1e-9
        ids = torch.tensor([[1, 2, 3, 4, 5]])
        pair = [m.attend(resumed, ids, target=lambda y: y[:, -1, 1]).receipt for m in (memory, expected)]
        assert pair[0]["explained"].min() > 1 - 1e-6
        assert pair[0]["explained"].tolist() == pytest.approx(pair[1]["explained"].tolist(), abs=1e-9)


def test_it_goes_on_from_the_last_step_unless_told_otherwise(tmp_path):
    make = OPTIMIZERS["momentum"]
    model = network()
    optimizer = make(model.parameters())
    train(model, optimizer, recorder := dualhook.instrument(model, tmp_path / "m", layers="all", verbose=False), 1, 6)
    recorder.close()
    recorder = dualhook.instrument(model, tmp_path / "m", layers="all", resume=True, verbose=False)
    train(model, optimizer, recorder, 7, STEPS)
    memory = recorder.close()
    assert memory.steps == STEPS
    assert memory.verify()["exact"].all()


def test_a_budget_folds_before_and_after(tmp_path):
    make = OPTIMIZERS["momentum"]
    checkpoint = crashed_run(tmp_path / "cut", make, flush_at=CHECKPOINT, max_bytes=60_000)
    model, memory = resumed_run(tmp_path / "cut", make, checkpoint, max_bytes=20_000)
    assert memory._store.first_step > CHECKPOINT
    assert memory.verify(model)["exact"].all()
    with pytest.raises(StoreError, match="have been folded into the origin"):
        dualhook.instrument(model, tmp_path / "cut", layers="all", resume_at=2, verbose=False)


def test_an_optimiser_that_starts_afresh_is_told(tmp_path):
    make = OPTIMIZERS["momentum"]
    checkpoint = crashed_run(tmp_path / "cut", make, flush_at=None)
    fresh = make(network().parameters()).state_dict()
    _, memory = resumed_run(tmp_path / "cut", make, (checkpoint[0], fresh))
    marks = memory._store.histories["conv.weight"].mark
    assert [bool(mark & int(Mark.FRESH)) for mark in marks] == [k in (0, CHECKPOINT) for k in range(STEPS)]
    assert memory.verify()["exact"].all()


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path):
        self.checkpoint = crashed_run(tmp_path / "run", OPTIMIZERS["momentum"], flush_at=CHECKPOINT)
        return tmp_path / "run"

    def resume(self, path, model=None, **settings):
        model = network() if model is None else model
        return dualhook.instrument(
            model, path, verbose=False, **({"layers": "all", "resume_at": CHECKPOINT} | settings)
        )

    def test_a_model_at_another_step(self, path):
        with pytest.raises(StoreError, match=r"off by .* of its norm from what the memory has after step 4"):
            self.resume(path)
        assert dualhook.load(path).steps == CRASH  # and nothing was cut

    def test_a_step_that_is_not_there(self, path):
        with pytest.raises(StoreError, match="is whole up to step 7 and cannot go on from step 9"):
            self.resume(path, resume_at=9)

    def test_other_layers(self, path):
        with pytest.raises(LayerError, match=r"records layer 'embed' \(embedding, 7 to 4\).* does not record it"):
            self.resume(path, layers=["conv"])
        model = network()
        model.conv = nn.Conv1d(4, 4, 5, padding=2).double()
        with pytest.raises(LayerError, match="this model with this layers= has it as conv, 20 to 4"):
            self.resume(path, model)

    def test_no_memory(self, tmp_path):
        with pytest.raises(StoreError, match="holds no memory"):
            self.resume(tmp_path / "nothing")
        with pytest.raises(DualHookError, match="expected a path, and no overwrite=True"):
            dualhook.instrument(network(), resume=True)


def test_steps_that_are_marked_inexact_do_not_speak_against_the_checkpoint(tmp_path):
    """What they have left is not rebuilt; the weights of a flush that was not the last are not kept."""
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = dualhook.instrument(model, tmp_path / "m", verbose=False)
    for step in range(4):
        optimizer.zero_grad()
        (model(torch.randn(5, 8)) - 1).square().sum().backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.3)
        with pytest.warns(dualhook.InexactWarning) if not step else contextlib.nullcontext():
            optimizer.step()
        if step == 1:
            recorder.flush()
            checkpoint = copy.deepcopy(model.state_dict())
    recorder.close()
    resumed = nn.Linear(8, 3)
    resumed.load_state_dict(checkpoint)
    recorder = dualhook.instrument(resumed, tmp_path / "m", resume_at=2, verbose=False)
    assert recorder.steps == 2
    recorder.discard()
