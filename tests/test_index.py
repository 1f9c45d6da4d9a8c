"""An index of keys: what it finds is exact, what it says of itself is true, and it is refused where it is stale."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.errors import DualHookError, LayerError, StoreError
from dualhook.index import Tried

pytest.importorskip("faiss", reason="FAISS is not installed: pip install 'dualhook[faiss]'")

I, O, BATCH = 12, 4, 16
OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}
STORED = {
    "whole": {},
    "sparse": {"sparse": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "folded": {"max_bytes": 60_000, "on_full": "fold"},
}


def trained(path, *, steps=20, optimizer="momentum", make=None, first=0, resume=False, **settings):
    """A network of two layers whose second one reads what a ReLU lets through."""
    torch.manual_seed(0)
    model = make() if make else nn.Sequential(nn.Linear(6, I), nn.ReLU(), nn.Linear(I, O))
    if resume:
        model.load_state_dict(dualhook.load(path).state_dict())
    stepper = OPTIMIZERS[optimizer](model.parameters())
    torch.manual_seed(first + 1)
    more = {"resume": resume} if resume else {}
    with dualhook.instrument(model, path, verbose=False, **settings, **more) as recorder:
        for step in range(steps):
            with recorder.batch(samples=torch.arange(BATCH) + BATCH * step):
                stepper.zero_grad()
                F.cross_entropy(model(torch.randn(BATCH, 6)), torch.randint(O, (BATCH,))).backward()
                stepper.step()
            if step % 7 == 6:
                recorder.flush()
    return model, recorder.close()


def asked(memory, model, queries=5, **settings):
    torch.manual_seed(5)
    return memory.attend(model, torch.randn(queries, 6), layers="2", **settings)


def same(found, exact, *, but=()):
    assert found.columns == exact.columns
    for name in set(found.columns) - set(but):
        if name in ("weight", "contribution"):  # of a product of another shape
            assert found[name] == pytest.approx(exact[name], rel=1e-4, abs=1e-6)
        else:
            assert found[name].tolist() == exact[name].tolist(), name


@pytest.mark.parametrize("stored", STORED)
def test_with_all_lists_it_is_the_exact_ranking(tmp_path, stored):
    model, memory = trained(tmp_path / "run", **STORED[stored])
    attention, index = asked(memory, model), memory.index("2")
    assert index.patterns == memory.patterns("2") > 100
    assert (index.patterns < 20 * BATCH) == (stored == "folded")
    index.probes = index.lists
    for k in (1, 7, 1000):
        same(attention.top(k, by="weight", index=index), attention.top(k, by="weight"))
    assert "approximate" in attention.top(3, by="weight", index=index).footer
    assert "approximate" not in attention.top(3, by="weight").footer


def test_a_question_finds_at_least_what_it_asks_for(tmp_path):
    model, memory = trained(tmp_path / "run", steps=60)
    index = memory.index("2")
    assert index.lists > 20
    index.probes = 1  # a list or two hold fewer
    assert len(asked(memory, model).top(500, by="weight", index=index)) == 5 * 500


def test_recall_is_what_it_says(tmp_path):
    """Against all attention weights of the recorded keys that were tried, one list after another."""
    _, memory = trained(tmp_path / "run", steps=80)
    index = memory.index("2")
    keys = torch.cat([rows.key for rows in memory._store.blocks("2", last_step=memory.steps, block_rows=100)])
    torch.manual_seed(1)
    chosen = torch.randperm(len(keys))[:64]
    hits = {1: 0, index.probes: 0, index.lists: 0}
    for number in chosen.tolist():
        weights = keys @ keys[number]
        weights[number] = -torch.inf
        first = set(weights.topk(10).indices.tolist())
        for probes in hits:
            index.probes = probes
            hits[probes] += len(first & set(index.candidates(keys[number : number + 1], 10)[0].tolist()))
    told, (one, own, every) = index.recall, (found / 640 for found in hits.values())
    assert every == 1.0
    assert one < own
    assert told >= 0.95
    assert own == pytest.approx(told, abs=0.05)  # of other keys


def test_a_key_is_not_its_own_neighbour():
    tried = Tried(torch.eye(12).double(), torch.arange(12), torch.zeros(12, 0).double())
    for start in (0, 5):  # in two blocks
        stop = 5 if start == 0 else 12
        tried.see(torch.eye(12)[start:stop], torch.arange(start, stop))
    assert tried.largest.equal(torch.zeros(12, 10).double())


@pytest.mark.parametrize("layer", ["0", "2", "4", "5"])
def test_patterns_are_read_by_their_places(tmp_path, layer, monkeypatch):
    """Of a plain layer, of the maps of a convolution, and of a weight that two layers use."""
    monkeypatch.setattr("dualhook.store.spans.AT_ONCE", 7)
    embedding = nn.Embedding(O, I)
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, I), nn.ReLU(), nn.Linear(I, O, bias=False))
    model[4].weight = embedding.weight
    model.add_module("5", embedding)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with dualhook.instrument(model, tmp_path / "run", layers=["0", "2", "4"], verbose=False) as recorder:
        for step in range(12):
            optimizer.zero_grad()
            labels = torch.randint(O, (BATCH,))
            F.cross_entropy(model[:5](torch.randn(BATCH, 1, 6)) + embedding(labels).sum(1, True), labels).backward()
            optimizer.step()
            if step % 5 == 4:
                recorder.flush()
    store = recorder.close()._store
    pieces = list(store.pieces(layer, first_step=3, last_step=11))
    assert len(pieces) == 3
    for piece in pieces:
        first, *others = piece.blocks(7)
        whole, places = first.joined(*others), torch.arange(piece.count)[torch.rand(piece.count) < 0.3]
        found = piece.at(places)
        for name in ("key", "output_grad", "step", "position"):
            assert getattr(found, name).equal(getattr(whole, name)[places]), name


def test_equal_keys_are_as_good_as_each_other(tmp_path):
    """Behind frozen layers an image has the same key in every epoch."""

    def frozen():
        model = nn.Sequential(nn.Linear(6, I), nn.ReLU(), nn.Linear(I, O))
        model[0].requires_grad_(False)
        return model

    torch.manual_seed(0)
    model, data = frozen(), torch.randn(BATCH, 6)
    optimizer = OPTIMIZERS["momentum"](model[2].parameters())
    with dualhook.instrument(model, tmp_path / "run", verbose=False) as recorder:
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(data), torch.arange(BATCH) % O).backward()
            optimizer.step()
    index = recorder.close().index("2")
    assert index.recall == 1.0
    assert index.probes < index.lists


def with_large_keys(path, steps, size, dtype):
    """A memory with keys of that size in some of 8 steps; the weights stay as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, I), nn.ReLU(), nn.Linear(I, O)).to(dtype)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.0)
    with dualhook.instrument(model, path, layers="2", verbose=False) as recorder:
        for step in range(8):
            x = torch.randn(BATCH, 6, dtype=dtype) * (size if step in steps else 1.0)
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.randint(O, (BATCH,))).backward()
            optimizer.step()
    return model, recorder.close()


@pytest.mark.filterwarnings("ignore:.*NaN or infinity in the gradient")  # the sum of their squares
@pytest.mark.parametrize("steps", [(5,), (0, 1, 2, 3, 4, 6, 7), range(8)])
def test_keys_whose_length_is_no_number_are_left_out(tmp_path, steps, monkeypatch):
    monkeypatch.setattr("dualhook.index.BLOCK_ROWS", 4)
    model, memory = with_large_keys(tmp_path / "run", steps, 1e160, torch.float64)
    if len(steps) == 8:
        with pytest.raises(LayerError, match="'2' has no key whose length is a number"):
            memory.index("2")
        return
    index = memory.index("2")
    index.probes = index.lists
    question = memory.attend(model, torch.randn(3, 6, dtype=torch.float64), layers="2")
    found = question.top(1000, by="weight", index=index)
    keys = torch.cat([rows.key for rows in memory._store.blocks("2", last_step=8, block_rows=100)])
    there = keys.norm(dim=1).isfinite()
    assert 0 < (~there).sum() < len(keys)
    assert index.patterns == there.sum()
    assert sorted(set(found["pattern"])) == there.nonzero().flatten().tolist()


@pytest.mark.parametrize(("size", "asked_with"), [(1e25, 1.0), (1.0, 1e25), (1e30, 1e-30)])
def test_large_keys_and_queries_are_found(tmp_path, size, asked_with):
    model, memory = with_large_keys(tmp_path / "run", (5,), size, torch.float32)
    index = memory.index("2")
    index.probes = index.lists
    question = memory.attend(model, asked_with * torch.randn(3, 6), layers="2")
    found, exact = (question.top(5, by="weight", **more)["weight"] for more in ({"index": index}, {}))
    assert found == pytest.approx(exact, rel=1e-5)


def test_contributions_that_need_a_replay_stay_open(tmp_path):
    model, memory = trained(tmp_path / "run", optimizer="Adam")
    attention, index = asked(memory, model, cache=True), memory.index("2")
    index.probes = index.lists
    found = attention.top(5, by="weight", index=index)
    assert np.isnan(found["contribution"]).all()
    exact = attention.top(5, by="weight")
    same(found, exact, but=["contribution"])
    again = asked(memory, model, cache=True)
    again.top(5)  # now rows may be sealed
    same(again.top(5, by="weight", index=index), exact, but=["contribution"])


def test_sequences_are_asked_as_a_sum_over_their_positions(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = {"vocab_size": 50, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with dualhook.instrument(model, tmp_path / "run", layers=["transformer.h", "head"], verbose=False) as recorder:
        for _ in range(12):
            ids = torch.randint(50, (4, 8))
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    memory, layer = recorder.close(), "transformer.h.0.mlp.c_fc"
    index = memory.index(layer)
    index.probes = index.lists
    attention = memory.attend(model, input_ids=torch.randint(50, (3, 8)), layers=layer)
    same(attention.top(9, by="weight", index=index), attention.top(9, by="weight"))
    assert len(memory.uses("lm_head")) == 2
    with pytest.raises(
        LayerError, match="'lm_head' cannot be indexed: expected a linear layer with a weight of its own"
    ):
        memory.index("lm_head")


def test_it_is_made_once_and_opened_from_then_on(tmp_path, monkeypatch):
    model, memory = trained(tmp_path / "run")
    attention, first = asked(memory, model), memory.index("2").recall
    monkeypatch.setattr("dualhook.index._make", lambda *args: pytest.fail("made again"))
    again = dualhook.load(memory.path).index("2")
    assert (again.recall, again.layer) == (first, "2")
    same(attention.top(5, by="weight", index=again), attention.top(5, by="weight", index=memory.index("2")))
    assert not memory.verify(deep=True).damage
    with pytest.raises(pytest.fail.Exception, match="made again"):
        memory.index("2", rebuild=True)
    with pytest.raises(pytest.fail.Exception, match="made again"):
        memory.index("2", folder=tmp_path / "elsewhere")


def test_what_is_older_than_the_memory_is_refused(tmp_path):
    model, memory = trained(tmp_path / "run")
    old = memory.index("2")
    model, memory = trained(tmp_path / "run", first=20, resume=True)
    with pytest.raises(StoreError, match=r"another state .*320 patterns up to step 20, now 640 up to 40.*rebuild=True"):
        memory.index("2")
    with pytest.raises(StoreError, match="of another memory, or another state of it"):
        asked(memory, model).top(5, by="weight", index=old)
    assert memory.index("2", rebuild=True).patterns == 640
    memory.index("2")


def test_what_it_cannot_answer_is_said(tmp_path):
    model, memory = trained(tmp_path / "run")
    attention, index = asked(memory, model), memory.index("2")
    for wrong in ({"by": "contribution"}, {"by": "abs_weight"}, {"by": "weight", "largest": False}):
        with pytest.raises(DualHookError, match="an index knows the largest attention weights: ask by='weight'"):
            attention.top(5, index=index, **wrong)
    with pytest.raises(DualHookError, match="step 10: an index holds the patterns of all 20 steps"):
        asked(memory, model, step=10).top(5, by="weight", index=index)
    both = memory.attend(model, torch.randn(2, 6))
    assert set(both.top(5, by="weight", index=index)["layer"]) == {"2"}
    with pytest.raises(LayerError, match="an index of '2' knows nothing of '0'"):
        both.top(5, by="weight", layers="0", index=index)
    with pytest.raises(LayerError, match="was not asked"):
        memory.attend(model, torch.randn(2, 6), layers="0").top(5, by="weight", index=index)
    with pytest.raises(LayerError, match="records no layer"):
        memory.index("3")
    with pytest.raises(DualHookError, match="a query of '2' holds NaN or infinity"):
        memory.attend(model, torch.full((1, 6), torch.nan), layers="2").top(5, by="weight", index=index)
    index.probes = 0
    with pytest.raises(DualHookError, match="probes=0: expected 1 to"):
        attention.top(5, by="weight", index=index)


def test_other_maps_are_refused(tmp_path):
    _, memory = trained(
        tmp_path / "conv",
        make=lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, O)),
        layers=["1", "3"],
    )
    with pytest.raises(LayerError, match=r"'1' cannot be indexed: expected a linear layer with a weight of its own"):
        memory.index("1")
    assert memory.index("3").patterns == 20 * BATCH


def test_an_index_beside_what_tells_of_another_is_refused(tmp_path):
    _, memory = trained(tmp_path / "run")
    memory.index("2")
    _, other = trained(tmp_path / "other", steps=40)
    other.index("2")
    (memory.path / "answers/2.index").write_bytes((other.path / "answers/2.index").read_bytes())
    with pytest.raises(StoreError, match="is damaged: make it anew"):
        memory.index("2")


@pytest.mark.parametrize("name", ["2.json", "2.index"])
def test_damage_is_named(tmp_path, name):
    _, memory = trained(tmp_path / "run")
    memory.index("2")
    path = memory.path / "answers" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(StoreError, match=r"is damaged: make it anew with memory.index\('2', rebuild=True\)"):
        memory.index("2")
    assert memory.index("2", rebuild=True).recall > 0
    json.loads((memory.path / "answers" / "2.json").read_text())


def test_without_faiss_the_extra_is_named(tmp_path, monkeypatch):
    _, memory = trained(tmp_path / "run", steps=1)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DualHookError, match=r"needs FAISS: pip install 'dualhook\[faiss\]'"):
        memory.index("2")


def test_a_memory_that_cannot_be_written_to_needs_a_folder(tmp_path):
    pytest.importorskip("fsspec")
    model, memory = trained(tmp_path / "run")
    remote = dualhook.load(f"file://{memory.path}")
    with pytest.raises(StoreError, match="cannot be written to: name a folder="):
        remote.index("2")
    index = remote.index("2", folder=tmp_path / "here")
    index.probes = index.lists
    same(asked(remote, model).top(5, by="weight", index=index), asked(memory, model).top(5, by="weight"))
