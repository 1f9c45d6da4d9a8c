"""Heads: output gradients as wide as a vocabulary are not written, and everything adds up as if they were."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dualhook
from dualhook.errors import StoreError
from dualhook.store import Layout, Manifest
from dualhook.store.layout import open_tensors, tensor_names

WORDS, WIDTH, BATCH = 600, 12, 64
LAYERS = ("embedding", "inner", "head")


class Words(nn.Module):
    """Predicts a word from the one before; ``tied``: one matrix looks words up and predicts them."""

    def __init__(self, *, tied: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embedding(words))))


def batch(seed: int, size: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, WORDS, (size,), generator=generator), torch.randint(0, WORDS, (size,), generator=generator)


def losses(model: nn.Module, seed: int, *, size: int = BATCH) -> Tensor:
    words, after = batch(seed, size)
    after[:5] = -100
    return F.cross_entropy(model(words), after, ignore_index=-100)


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
    return torch.optim.Adam(model.parameters(), lr=3e-2)


def model_of(**settings: bool) -> Words:
    torch.manual_seed(0)
    return Words(**settings).double()


def begun(path, optimizer: str, **shape: bool) -> tuple[Words, torch.optim.Optimizer, dualhook.Recorder]:
    """A model, an optimiser and a recording of all layers, before the first step."""
    model = model_of(**shape)
    return model, optimizer_of(optimizer, model), dualhook.instrument(model, path, layers="all", verbose=False)


def trained(
    path, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6, size: int = BATCH, **settings
) -> dualhook.Recorder:
    recorder = dualhook.instrument(model, path, layers="all", verbose=False, overwrite=True, **settings)
    for step in range(steps):
        optimizer.zero_grad()
        losses(model, step, size=size).backward()
        optimizer.step()
    return recorder


def note(recorder: dualhook.Recorder) -> str:
    return str(recorder.coverage.where(layer="head")["note"][0])


def stored(path, layer: str = "head") -> list[set[str]]:
    """The names of the layer's tensors in every segment."""
    prefix = f"rows/{layer}/"
    names = [tensor_names(open_tensors(segment)) for segment in Layout(path).segments()]
    return [{name.removeprefix(prefix) for name in own if name.startswith(prefix)} for own in names]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("shape", [{}, {"tied": True}, {"bias": True}], ids=["plain", "tied", "bias"])
def test_a_computed_head_answers_as_a_whole_one(tmp_path, optimizer, shape):
    found, weights = {}, {}
    for form in ("dense", "computed"):
        model = model_of(**shape)
        recorder = trained(tmp_path / form, model, optimizer_of(optimizer, model), head_grads=form)
        assert ("computed again" in note(recorder)) == (form == "computed")
        memory = recorder.close()
        assert memory.verify()["exact"].all()
        assert memory.verify().max_error < 1e-10
        words, after = batch(99, 4)
        attention = memory.attend(model, words, target=after)
        found[form] = attention.top(8, by="abs_contribution"), attention.sum_by("step"), attention.receipt
        weights[form] = model.head.weight.detach()
    assert torch.equal(weights["dense"], weights["computed"])
    for whole, computed in zip(found["dense"], found["computed"], strict=True):
        for name in whole.columns:
            if whole[name].dtype.kind == "f":  # of patterns with the same word either may come first
                np.testing.assert_allclose(whole[name], computed[name], rtol=1e-7, atol=1e-12)


def test_the_bytes_are_those_of_keys_and_weights(tmp_path):
    sizes = {}
    for form in ("dense", "computed"):
        model = model_of()
        recorder = dualhook.instrument(model, tmp_path / form, layers="head", verbose=False, head_grads=form)
        optimizer = optimizer_of("sgd", model)
        for step in range(4):
            optimizer.zero_grad()
            losses(model, step, size=256).backward()
            optimizer.step()
        recorder.close()
        (segment,) = Layout(tmp_path / form).segments()
        sizes[form] = segment.stat().st_size
    rows, index = 4 * 251, 3 * 8
    rest = range(16_000)  # a header, and padding behind some tensors
    assert sizes["dense"] - rows * 8 * (WORDS + WIDTH) - rows * index in rest
    weights = 4 * (8 * WORDS * WIDTH + 8)
    assert sizes["computed"] - rows * (8 * WIDTH + 8 + 8 + 4) - rows * index - weights in rest


def test_a_step_without_a_row_leaves_nothing_behind(tmp_path):
    model, optimizer, recorder = begun(tmp_path / "m", "sgd")
    for step in range(5):
        optimizer.zero_grad()
        words, after = batch(step)
        after[:] = after if step != 2 else -100
        F.cross_entropy(model(words), after, reduction="sum").div(BATCH).backward()
        optimizer.step()
    assert "computed again" in note(recorder)
    report = recorder.close().verify()
    assert report["exact"].all()
    assert report.max_error < 1e-12


def test_step_sizes_that_change_do_not_cut_segments(tmp_path):
    model, optimizer, recorder = begun(tmp_path / "m", "sgd")
    for step in range(30):
        optimizer.zero_grad()
        losses(model, step, size=(64, 10, 10, 10, 10)[step % 5]).backward()
        optimizer.step()
    assert recorder.close().verify().max_error < 1e-12
    assert len(stored(tmp_path / "m")) == 1


def test_a_batch_of_no_numbers_is_no_verdict(tmp_path):
    model, optimizer, recorder = begun(tmp_path / "m", "sgd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dualhook.InexactWarning)
        for step in range(4):
            optimizer.zero_grad()
            loss = losses(model, step)
            (loss * float("nan") if step == 1 else loss).backward()
            if step == 1:
                assert "whole" not in note(recorder) or "softmax" not in note(recorder)
                continue
            optimizer.step()
    assert "computed again" in note(recorder)
    assert recorder.close().verify().max_error < 1e-12


@pytest.mark.parametrize("width", [64, 256])
def test_large_logits_raise_no_alarm(tmp_path, width):
    """A layer norm before a head that is tied to an embedding as torch begins it: logits of 50 and more."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = nn.Embedding(2000, width), nn.LayerNorm(width)
            self.head = nn.Linear(width, 2000, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, words: Tensor) -> Tensor:
            return self.head(self.norm(self.embedding(words)))

    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = dualhook.instrument(model, tmp_path / "m", layers="all", verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", dualhook.InexactWarning)
        for step in range(3):
            words = torch.randint(0, 2000, (600,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            F.cross_entropy(model(words), (words + 7) % 2000).backward()
            optimizer.step()
    assert "computed again" in note(recorder)
    report = recorder.close().verify()
    assert report["exact"].all()
    assert report.max_error < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_weights_in_its_own_dtype(tmp_path, dtype):
    model = model_of().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    recorder = dualhook.instrument(model, tmp_path / "m", layers="all", verbose=False)
    for step in range(4):
        optimizer.zero_grad()
        words, after = batch(step, 256)
        with torch.autocast("cpu", dtype):
            logits = model(words)
        F.cross_entropy(logits.float(), after).backward()
        optimizer.step()
    assert "computed again" in note(recorder)
    memory = recorder.close()
    (segment,) = Layout(tmp_path / "m").segments()
    assert open_tensors(segment).get_tensor("rows/head/weight").dtype == dtype
    assert memory.verify().where(layer="head")["error"][0] < 1e-3


def test_few_rows_a_step_are_kept_whole(tmp_path):
    model, optimizer, recorder = begun(tmp_path / "m", "sgd")
    for step, size in enumerate((20, 20, 64, 20, 64)):  # 26 are enough, and so are those of the step before
        optimizer.zero_grad()
        losses(model, step, size=size).backward()
        optimizer.step()
    memory = recorder.close()
    assert memory.verify().max_error < 1e-12
    forms = ["softmax/target" in names for names in stored(tmp_path / "m")]
    assert forms == [False, True]


def test_accumulated_batches_share_the_step_s_weights(tmp_path):
    model, optimizer, recorder = begun(tmp_path / "m", "adam", tied=True)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(4):
            losses(model, 10 * step + part).backward()
        optimizer.step()
    memory = recorder.close()
    assert memory.verify().max_error < 1e-12
    (segment,) = Layout(tmp_path / "m").segments()
    assert open_tensors(segment).get_tensor("rows/head/weight").shape == (3, WORDS, WIDTH)


@pytest.mark.parametrize("where", [0, 1])
def test_another_loss_on_the_way_is_kept_whole_from_there_on(tmp_path, where):
    """In the first or in the second of a step's two batches."""
    model, optimizer, recorder = begun(tmp_path / "m", "sgd")
    for step in range(5):
        optimizer.zero_grad()
        for part in range(2):
            loss = losses(model, 10 * step + part)
            if step == 2 and part == where:
                loss = loss + model(batch(5)[0]).square().mean()
            loss.backward()
        optimizer.step()
        if step == 1:
            assert "computed again" in note(recorder)
    assert "no softmax" in note(recorder)
    memory = recorder.close()
    assert memory.verify()["exact"].all()
    assert memory.verify().max_error < 1e-12
    assert ["softmax/target" in names for names in stored(tmp_path / "m")] == [True, False]


@pytest.mark.parametrize("by_data", [False, True])
def test_weights_that_move_within_a_step_are_told(tmp_path, by_data):
    """Sharpness-aware minimisation steps from where the weights were, with gradients from elsewhere."""
    model, optimizer, recorder = begun(tmp_path / "m", "sgd")
    for step in range(3):
        optimizer.zero_grad()
        losses(model, step).backward()
        moved = [0.05 * p.grad / p.grad.norm() for p in model.parameters()]
        with torch.no_grad():
            for p, by in zip(model.parameters(), moved, strict=True):
                (p.data if by_data else p).add_(by)
        losses(model, step + 50).backward()  # both gradients are stepped on
        with torch.no_grad():
            for p, by in zip(model.parameters(), moved, strict=True):
                (p.data if by_data else p).sub_(by)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dualhook.InexactWarning)
            optimizer.step()
    assert "weights change within a step" in note(recorder)
    memory = recorder.close()
    rows = memory._store.blocks("head", last_step=3, block_rows=10**6)
    assert (next(rows).output_grad != 0).any()
    ledger = memory._store.histories["head.weight"]
    assert float(ledger.residual.max()) < 1e-12  # the rows rebuild what the optimiser saw


def test_gradients_in_a_closure(tmp_path):
    model, optimizer, recorder = begun(tmp_path / "m", "sgd")
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = losses(model, step)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert "computed again" in note(recorder)
    memory = recorder.close()
    assert memory.verify().max_error < 1e-12


def test_zeroed_gradients_take_their_rows_with_them(tmp_path):
    model, optimizer, recorder = begun(tmp_path / "m", "sgd")
    for step in range(4):
        losses(model, step + 70).backward()
        optimizer.zero_grad()
        losses(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    memory = recorder.close()
    assert memory._store.count("head") == 4 * 59
    assert memory.verify().max_error < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_it_is_computed_from_are_not_rounded(tmp_path, dtype):
    model = model_of()
    recorder = trained(tmp_path / "m", model, optimizer_of("sgd", model), size=256, dtype=dtype)
    assert "computed again" in note(recorder)
    memory = recorder.close()
    head = memory.verify().where(layer="head")
    assert head["error"][0] < 1e-12  # the others are as near as their dtype
    assert memory.verify().where(layer="inner")["error"][0] > 1e-9


def test_the_largest_lose_the_rest_and_the_receipt_says_so(tmp_path):
    explained = {}
    for kept in (40, 400):
        model = model_of()
        optimizer = optimizer_of("sgd", model)
        recorder = dualhook.instrument(model, tmp_path / f"{kept}", layers="all", verbose=False, head_grads=kept)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", dualhook.InexactWarning)
            for step in range(4):
                optimizer.zero_grad()
                model(batch(step)[0]).square().mean().backward()
                optimizer.step()
        assert any("head" in str(one.message) for one in caught)
        assert f"the {kept} largest" in note(recorder)
        memory = recorder.close()
        assert not memory.verify().where(layer="head")["exact"].any()
        words, after = batch(99, 4)
        receipt = memory.attend(model, words, target=after, layers="head").receipt
        explained[kept] = min(receipt["explained"])
    assert explained[40] < explained[400] < 1


def test_folded_cut_and_resumed(tmp_path):
    def run(path, steps, model, optimizer, start=0, **settings):
        recorder = dualhook.instrument(model, path, layers="all", verbose=False, **settings)
        for step in range(start, steps):
            optimizer.zero_grad()
            losses(model, step).backward()
            optimizer.step()
            if step == 2:
                saved.update(model=copy.deepcopy(model.state_dict()), optimizer=copy.deepcopy(optimizer.state_dict()))
        return recorder.close()

    saved: dict = {}
    model = model_of()
    whole = run(tmp_path / "whole", 6, model, optimizer_of("adam", model))
    patterns = [whole._store.count(layer) for layer in LAYERS]
    again = model_of()
    optimizer = optimizer_of("adam", again)
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    resumed = run(tmp_path / "whole", 6, again, optimizer, start=3, resume_at=3)
    assert torch.equal(again.head.weight, model.head.weight)
    cut, _ = (open_tensors(segment) for segment in Layout(tmp_path / "whole").segments())
    assert len(cut.get_tensor("rows/head/weight")) == len(cut.get_tensor("rows/head/weight_step")) == 3
    assert [resumed._store.count(layer) for layer in LAYERS] == patterns
    assert resumed.verify().max_error < 1e-12
    model = model_of()
    folded = run(tmp_path / "folded", 6, model, optimizer_of("adam", model), max_bytes=300_000)
    assert folded._store.first_step > 0
    assert folded.verify().max_error < 1e-10


def test_what_older_versions_cannot_read_says_so(tmp_path, monkeypatch):
    model = model_of()
    trained(tmp_path / "m", model, optimizer_of("sgd", model)).close()
    assert Manifest.read(Layout(tmp_path / "m")).needs == 4
    monkeypatch.setattr("dualhook.store.layout.FORMAT_VERSION", 3)
    with pytest.raises(StoreError, match="format version 4, this dualhook reads up to 3"):
        dualhook.load(tmp_path / "m")


@pytest.mark.parametrize("bad", ["sparse", 0, True, 1.5])
def test_another_choice_is_refused(bad):
    with pytest.raises(dualhook.DualHookError, match="head_grads"):
        dualhook.instrument(model_of(), head_grads=bad)


def test_training_is_bit_identical(tmp_path):
    weights = []
    for form in (None, "computed", 7):
        model = model_of(tied=True, bias=True).float()
        optimizer = optimizer_of("adam", model)
        if form is not None:
            dualhook.instrument(model, tmp_path / f"{form}", layers="all", verbose=False, head_grads=form)
        for step in range(5):
            optimizer.zero_grad()
            losses(model, step).backward()
            optimizer.step()
        weights.append(model.state_dict())
    for one, other in pairwise(weights):
        assert all(torch.equal(one[name], other[name]) for name in one)
