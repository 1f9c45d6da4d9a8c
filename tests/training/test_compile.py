"""``torch.compile``: whole graphs, instrumented before or after; code that is compiled already misses no rows."""

from __future__ import annotations

import copy
import gc
import json
import pickle

import pytest
import torch
from capture.test_kinds import CASES, OPTIMIZERS, network, train
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training.ways import PATTERNS, STEPS, assert_exact, close, loader, loss_of, net, plain, rows_of, sgd, trained

import dualhook
from dualhook.store.mapped import glanced


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, *, backend="aot_eager", fullgraph=True):
    return torch.compile(model, backend=backend, fullgraph=fullgraph)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_plain_run(fullgraph, dtype):
    def loop(model, track):
        plain(model, track, dtype=dtype)

    outcome = trained(loop, make=lambda: net(dtype), wrap=lambda model: compiled(model, fullgraph=fullgraph))
    assert_exact(outcome, patterns=PATTERNS, steps=STEPS, dtype=dtype)
    assert close(outcome.model, trained(loop, make=lambda: net(dtype)).model, 1e-5)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # which are no matter here
def test_inductor():
    outcome = trained(plain, wrap=lambda model: compiled(model, backend="inductor"))
    assert_exact(outcome, patterns=PATTERNS, steps=STEPS)


def test_code_that_is_compiled_before_the_recorder_comes():
    model = net()
    fast = compiled(model)
    plain(fast, lambda data: data)
    recorder = dualhook.instrument(fast, verbose=False)
    plain(fast, recorder.track)
    memory = recorder.close()
    assert memory.layers == ["first", "head"]  # named as in the user's model
    assert memory.patterns("head") == PATTERNS
    assert memory.verify(model).max_error < 1e-5


def test_compiled_code_outlives_the_recorder_and_meets_the_next_one():
    model = net()
    recorder = dualhook.instrument(model, verbose=False)
    fast = compiled(model)
    plain(fast, recorder.track)
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        plain(duplicate, lambda data: data)
    memory = recorder.close()
    assert memory.verify(model).max_error < 1e-5
    plain(fast, lambda data: data)
    assert memory.patterns("head") == PATTERNS
    recorder = dualhook.instrument(model, verbose=False)
    plain(fast, recorder.track)
    memory = recorder.close()
    assert memory.patterns("head") == PATTERNS
    assert memory.verify(model).max_error < 1e-5


def test_rows_count_only_where_a_step_uses_them():
    model = net()
    recorder, optimizer, fast = dualhook.instrument(model, verbose=False), sgd(model), compiled(model)
    for x, y in recorder.track(loader()):
        torch.autograd.grad(loss_of(fast(x), y), list(model.parameters()))
        with torch.no_grad():
            fast(x)
        loss_of(fast(x), y).backward()
        optimizer.zero_grad()
        fast(x)  # a forward pass without a backward pass
        loss_of(fast(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    memory = recorder.close()
    assert memory.patterns("head") == PATTERNS // 2
    assert memory.verify().max_error < 1e-5


def test_a_backward_pass_after_the_next_forward_pass_keeps_the_samples():
    def loop(model, track):
        optimizer = sgd(model)
        losses = [loss_of(model(x), y) for x, y in track(loader())]
        for loss in losses:
            loss.backward()
        optimizer.step()

    assert_exact(trained(loop, wrap=compiled), patterns=PATTERNS // 2, steps=1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_checkpointing(reentrant):
    class Checkpointed(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    def loop(model, track):
        optimizer = sgd(model)
        for x, y in track(loader()):
            optimizer.zero_grad()
            loss_of(model(x.requires_grad_()), y).backward()
            optimizer.step()

    outcome = trained(loop, wrap=lambda model: compiled(Checkpointed(model), fullgraph=False))
    assert_exact(outcome, patterns=PATTERNS // 2, steps=STEPS // 2)


def test_autocast():
    model = net()
    recorder, optimizer, fast = dualhook.instrument(model, verbose=False), sgd(model), compiled(model, fullgraph=False)
    for x, y in recorder.track(loader()):
        optimizer.zero_grad()
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            loss = loss_of(fast(x), y)
        loss.backward()
        optimizer.step()
    memory = recorder.close()
    assert not any(memory.verify()["inexact_steps"])
    rows = rows_of(memory, "first")
    assert rows.key.dtype == torch.bfloat16
    assert torch.equal(rows.sample.double(), rows.key[:, -1].double() * 16)


def test_a_twin_of_the_same_class_is_compiled_apart():
    bare, model = net(), net()
    recorder = dualhook.instrument(model, verbose=False)
    for each in (bare, model):
        optimizer, compiled = sgd(each), torch.compile(each, backend="aot_eager")
        for x, y in loader():
            optimizer.zero_grad()
            loss_of(compiled(x), y).backward()
            optimizer.step()
    memory = recorder.close()
    assert memory.verify()["exact"].all()


WHOLE = {case for case in CASES if not case.startswith(("lstm", "gru", "rnn"))}
"""What torch compiles as a whole graph; its recurrent layers break it."""
SOME = ("linear", "conv2d", "embedding", "attention", "functional", "experts", "tied in a function")
"""Whole graphs that are compiled as if they might break too: one of every operator that tells of rows."""
UNROLLED = {"lstm cell", "gru cell"}
"""What it takes apart in compiled code, where nothing can be told of it."""


@pytest.mark.parametrize(
    ("case", "fullgraph"), [(case, case in WHOLE) for case in CASES] + [(case, False) for case in SOME]
)
def test_every_kind_of_linear_map(case, fullgraph):
    bare, model = network(case), network(case)
    make, inputs = OPTIMIZERS["sgd"], CASES[case][1]
    expected = train(compiled(bare, fullgraph=fullgraph), inputs, make(bare.parameters()))
    torch._dynamo.reset()
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    fast = compiled(model, fullgraph=fullgraph)
    found = train(fast, inputs, make(model.parameters()), recorder)
    notes = dict(zip(recorder.coverage["parameter"], recorder.coverage["note"], strict=True))
    memory = recorder.close()
    for own, other in zip(found, expected, strict=True):
        assert all(
            torch.equal(own[f"_orig_mod.{name}"], other[f"_orig_mod.{name}"]) for name, _ in bare.named_parameters()
        )
    for one, other in zip(model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(one, other)
    report = memory.verify()
    if case in UNROLLED:
        assert memory.layers == ["head"]
        assert notes["core.weight_ih"] == "used where no tap sees it, perhaps in compiled code"
    assert report.max_error < 1e-9
    assert report["exact"].all()
    for layer in memory.layers:
        for rows in memory._store.blocks(layer, last_step=4, block_rows=10**6):
            told = rows.sample >= 0
            assert torch.equal(rows.sample[told] // 10 + 1, rows.step[told]), layer
            assert told.all() or case == "experts", layer


@pytest.mark.parametrize("case", ["attention", "functional", "tied in a function"])
def test_inductor_and_functions_on_parameters(case):
    model = network(case)
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    fast = compiled(model, backend="inductor")
    train(fast, CASES[case][1], OPTIMIZERS["adam"](model.parameters()), recorder)
    assert recorder.close().verify()["exact"].all()


def test_functions_are_put_back_and_compiled_code_goes_on_without_the_recorder():
    before, model = F.linear, network("attention")
    optimizer, inputs = OPTIMIZERS["sgd"](model.parameters()), CASES["attention"][1]
    fast = compiled(model)
    for _ in range(2):
        recorder = dualhook.instrument(model, layers="all", verbose=False)
        train(fast, inputs, optimizer, recorder)
        assert F.linear is not before
        memory = recorder.close()
        assert F.linear is before
        assert memory.verify()["exact"].all()
        train(fast, inputs, optimizer)
    assert memory.steps == 4


def test_a_recorder_that_nobody_holds_lets_go_of_the_functions():
    before, model = F.linear, network("attention")
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    train(compiled(model), CASES["attention"][1], OPTIMIZERS["sgd"](model.parameters()), recorder)
    del recorder, model
    torch._dynamo.reset()
    gc.collect()
    assert F.linear is before


def test_eager_calls_between_compiled_ones_are_recorded_too():
    model = network("functional")
    recorder, fast = dualhook.instrument(model, layers="all", verbose=False), compiled(model)
    optimizer, inputs = OPTIMIZERS["sgd"](model.parameters()), CASES["functional"][1]
    for _ in range(3):
        optimizer.zero_grad()
        (fast(inputs()).square().mean() + model(inputs()).square().mean()).backward()
        optimizer.step()
    assert recorder.close().verify()["exact"].all()


class Mixed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.head = torch.nn.Embedding(7, 4), torch.nn.Conv1d(4, 4, 3), torch.nn.Linear(4, 2)

    def forward(self, ids):
        return self.head(self.conv(self.embed(ids).transpose(1, 2)).mean(2))


def test_other_kinds_of_modules_are_recorded_in_whole_graphs_too():
    model = Mixed()
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    optimizer = sgd(model)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(model)(torch.randint(0, 7, (5, 6))).square().sum().backward()
        optimizer.step()
    memory = recorder.close()
    assert memory.layers == ["embed", "conv", "head"]
    assert memory.verify()["exact"].all()


class Bag(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = torch.nn.EmbeddingBag(7, 4, mode="sum"), torch.nn.Linear(4, 2)

    def forward(self, ids, offsets):
        return self.head(self.bag(ids, offsets))


def test_what_compiled_code_cannot_tell_is_left_out_and_training_goes_on():
    model = Bag()
    recorder, optimizer, fast = dualhook.instrument(model, layers="all", verbose=False), sgd(model), compiled(model)
    for _ in range(2):
        optimizer.zero_grad()
        fast(torch.randint(0, 7, (6,)), torch.tensor([0, 2, 3])).square().sum().backward()
        optimizer.step()
    coverage = recorder.coverage
    memory = recorder.close()
    assert memory.layers == ["head"]
    assert memory.verify()["exact"].all()
    assert "no tap sees it" in coverage["note"][coverage["parameter"].tolist().index("bag.weight")]


def used(model, fast, steps: int = 2) -> None:
    """Train a model of the kind "functional", which uses its children's weights in ``F.linear``."""
    optimizer = sgd(model)
    for _ in range(steps):
        optimizer.zero_grad()
        fast(CASES["functional"][1]()).square().mean().backward()
        optimizer.step()


def test_a_second_recorder_does_not_cut_the_first_off():
    model = network("functional")
    recorder = dualhook.instrument(model, verbose=False)
    other = dualhook.instrument(torch.nn.Linear(2, 2), verbose=False)
    used(model, compiled(model))
    other.discard()
    assert recorder.close().verify()["exact"].all()


def test_parameters_that_share_one_storage_are_told_apart():
    model = network("functional")
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters()
    )
    recorder = dualhook.instrument(model, verbose=False)
    used(model, compiled(model))
    assert recorder.close().verify()["exact"].all()


@pytest.mark.parametrize("puts_back", [False, True])
def test_a_function_that_somebody_wraps_meanwhile_stays_usable(puts_back):
    before, model = F.linear, network("functional")
    recorder = dualhook.instrument(model, verbose=False)
    used(model, compiled(model))
    ours = F.linear
    F.linear = lambda *args, **kwargs: ours(*args, **kwargs)  # a profiler
    try:
        recorder.close()
        if puts_back:
            F.linear = ours
        recorder = dualhook.instrument(model, verbose=False)
        used(model, model)
        assert recorder.close().verify()["exact"].all()
    finally:
        F.linear = before


@pytest.mark.parametrize("fullgraph", [False, True])
def test_keys_of_a_raw_input_and_of_no_other_are_stored_once(tmp_path, fullgraph):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5))
    data, recorder = torch.randn(12, 64), dualhook.instrument(model, tmp_path / "run", verbose=False)
    fast, optimizer = compiled(model, fullgraph=fullgraph), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        for batch in torch.randperm(12).split(4):
            recorder.batch(samples=batch)
            optimizer.zero_grad()
            F.cross_entropy(fast(data[batch]), batch % 5).backward()
            optimizer.step()
        recorder.flush()
    memory = recorder.close()
    (path,) = memory._store.layout.key_files()
    header = json.loads(glanced(path)[0]["dualhook"])
    assert {layer: own["count"] for layer, own in header["rows"].items()} == {"0": 12}
    rows = next(memory._store.blocks("0", last_step=9, block_rows=100))
    assert torch.equal(rows.key, data[rows.sample])
