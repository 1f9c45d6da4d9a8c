"""Training on a device whose numbers come to the host some steps later, beside the same training in host memory."""

from __future__ import annotations

import math
import re
import threading
import warnings
from contextlib import nullcontext
from itertools import pairwise
from pkgutil import resolve_name

import pytest
import torch
from elsewhere import DEVICE, WAITS, Late, LateCourier, elsewhere
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.capture import LayerProbe
from dualhook.errors import InexactWarning
from dualhook.recorder.front import OPEN
from dualhook.recorder.measuring import Measuring
from dualhook.records import LayerSpec, Mark
from dualhook.store.layout import Layout, open_tensors, read_header
from dualhook.store.reader import Store

STEPS = 36
LAGS = [0, 9, 1000]  # copies that begin before one ends: in a step of this training there are some six


class Plain(nn.Module):
    """Linear layers, whose gradients are compared with their rows later."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 40), nn.Linear(40, 40), nn.Linear(40, 3, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Twice(Plain):
    """One of them is called twice."""

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.second(torch.tanh(self.first(x)))))))


class Waiting(Plain):
    """Of one of them it is told at once what its rows say: the step waits for what has not come yet."""


class Mixed(Plain):
    """Between them convolutions, whole and in groups, and a bilinear map."""

    def __init__(self):
        super().__init__()
        self.second = nn.Conv1d(2, 4, 3, padding=1, groups=2)
        self.third = nn.ConvTranspose1d(4, 1, 2, stride=2)
        self.pair = nn.Bilinear(40, 40, 40)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        maps = torch.tanh(self.third(torch.tanh(self.second(h.view(-1, 2, 20)))))
        return self.last(torch.tanh(self.pair(h, maps[:, 0])))


class Spoken(nn.Module):
    """A head that is computed from keys and weights, and two lookups."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Embedding(600, 16), nn.Linear(16, 600, bias=False)
        self.place = nn.Embedding(6, 16)

    def loss(self, size):
        tokens = torch.randint(0, 600, (8 * size, 6)).to(self.place.weight.device)
        h = self.first(tokens) + self.place(torch.arange(6).to(tokens.device))
        return F.cross_entropy(self.last(torch.tanh(h)).flatten(0, 1), tokens.roll(-1, 1).flatten())


class Tied(Spoken):
    """The head has the weight of a lookup."""

    def to(self, device):
        moved = super().to(device)
        moved.last.weight = moved.first.weight
        return moved


def sgd(net):
    return [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)]


def adam(net):
    return [torch.optim.AdamW(net.parameters(), lr=0.01)]


def one_of_each_layer(net):
    layers = {layer.weight: layer for layer in net.children()}  # of two that are tied one
    return [torch.optim.SGD(layer.parameters(), lr=0.05) for layer in layers.values()]


def counting(net):
    """Counts its steps where its parameters are, as fused ones do."""

    def moved(optimizer, *_):
        for parameter, state in optimizer.state.items():
            state["step"] = state["step"].to(parameter.device)

    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    optimizer.register_step_post_hook(moved)
    return [optimizer]


def plain(net, step, optimizers):
    net.loss(6).backward()


def clipped(net, step, optimizers):
    net.loss(6).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.01 * (1 + step % 5))


def accumulated(net, step, optimizers):
    for size in (3, 5, 2)[: 1 + step % 3]:
        net.loss(size).backward()


def partly_dropped(net, step, optimizers):
    """Every first backward pass is zeroed, in place or not, and every third step leaves the last layer alone."""
    net.loss(4).backward()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    net.loss(5).backward()
    if step % 3 == 0:
        net.last.weight.grad = None


def trained(
    path, device, *, lag=0, make=sgd, backward=plain, model=Plain, segment_bytes=None, steps=STEPS,
    after_step=lambda net, step, recorder: None,
):  # fmt: skip
    """The weights after every step, and the memory."""
    with elsewhere(lag) if device == DEVICE else nullcontext():
        torch.manual_seed(0)
        net = model().double().to(device)

        def loss(size):
            x, y = torch.randn(size, 12).double(), torch.randint(0, 3, (size,))
            return F.cross_entropy(net(x.to(device)), y.to(device))

        if not isinstance(net, Spoken):
            net.loss = loss
        optimizers = make(net)
        recorder = dualhook.instrument(net, path, layers="all", verbose=False)
        if segment_bytes is not None:
            recorder._writer.segment_bytes = segment_bytes
        weights = []
        for step in range(1, steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            backward(net, step, optimizers)
            for optimizer in optimizers:
                optimizer.step()
            weights.append({name: value.detach().cpu().clone() for name, value in net.named_parameters()})
            after_step(net, step, recorder)
        return weights, recorder.close()


def rows_of(memory):
    return {
        layer: [
            (block.step, block.sample, block.key, block.grads())
            for block in Store(memory.path).blocks(layer, last_step=memory.steps, block_rows=10**6)
        ]
        for layer in memory.layers
    }


def assert_same(one, other):
    """Rows and ledgers of two memories, of gradients that were rounded the same way."""
    for (layer, rows), (_, others) in zip(rows_of(one).items(), rows_of(other).items(), strict=True):
        for first, second in zip(zip(*rows, strict=True), zip(*others, strict=True), strict=True):
            assert torch.equal(torch.cat(first), torch.cat(second)), layer
    histories, others = Store(one.path).histories, Store(other.path).histories
    assert histories.keys() == others.keys()
    for name, history in histories.items():
        assert torch.equal(history.step, others[name].step)
        assert history.optimizer == others[name].optimizer
        assert torch.equal(history.mark, others[name].mark), name
        torch.testing.assert_close(history.scale, others[name].scale, rtol=1e-9, atol=0, equal_nan=True)
        torch.testing.assert_close(history.residual, others[name].residual, rtol=0, atol=1e-9)
        assert history.state.keys() == others[name].state.keys()
        for key, values in history.state.items():
            assert torch.equal(values, others[name].state[key]), key


@pytest.mark.parametrize(
    ("model", "lag"),
    [
        *((Plain, lag) for lag in LAGS),
        (Twice, 9),
        *((model, lag) for model in (Waiting, Mixed, Spoken, Tied) for lag in (9, 1000)),
    ],
)
@pytest.mark.parametrize(
    ("make", "backward"),
    [(sgd, plain), (sgd, clipped), (sgd, accumulated), (adam, clipped), (counting, plain), (one_of_each_layer, plain)],
    ids=lambda way: way.__name__,
)
def test_a_memory_is_that_of_the_same_training_in_host_memory(tmp_path, monkeypatch, model, lag, make, backward):
    if model is Waiting:
        late = Measuring.late_probe
        monkeypatch.setattr(Measuring, "late_probe", lambda own, name: None if name == "second" else late(own, name))
    settings = {"make": make, "backward": backward, "model": model, "segment_bytes": 20_000}
    weights, here = trained(tmp_path / "here", torch.device("cpu"), **settings)
    others, there = trained(tmp_path / "there", DEVICE, lag=lag, **settings)
    assert weights[-1].keys() == others[-1].keys()
    assert all(torch.equal(value, others[-1][name]) for name, value in weights[-1].items())
    assert_same(here, there)
    assert there.verify()["exact"].all()
    layout = Layout(there.path)
    steps = [read_header(path, open_tensors(path))["steps"] for path in layout.segments(0)]
    assert len(steps) > 2 or lag == 1000
    assert all(first[1] < second[0] for first, second in pairwise(steps))  # no step is in two of them


@pytest.mark.parametrize(("model", "lag"), [*((Plain, lag) for lag in LAGS), (Mixed, 9)])
def test_gradients_that_were_zeroed_count_nothing(tmp_path, model, lag):
    settings = {"backward": partly_dropped, "make": one_of_each_layer, "model": model}
    weights, here = trained(tmp_path / "here", torch.device("cpu"), **settings)
    _, there = trained(tmp_path / "there", DEVICE, lag=lag, **settings)
    assert_same(here, there)
    for step, expected in enumerate(weights, 1):
        for name, value in there.state_dict(step=step).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-10)


def zeroed_before_the_step(net, step, optimizers):
    """In place: with no gradient at all there would be no step."""
    net.loss(4).backward()
    if step % 4 == 3:
        for parameter in net.parameters():
            parameter.grad.zero_()


@pytest.mark.parametrize(("model", "lag"), [*((Plain, lag) for lag in LAGS), (Mixed, 9), (Tied, 9)])
def test_gradients_that_were_zeroed_before_the_step_have_rows_at_the_scale_0(tmp_path, model, lag):
    settings = {"backward": zeroed_before_the_step, "model": model}
    weights, there = trained(tmp_path / "there", DEVICE, lag=lag, **settings)
    rounding = 1e-12 if model is Mixed else 0  # that of a bias of a few numbers is not told from a scale
    for history in Store(there.path).histories.values():
        assert (history.scale[2::4] == 0).all()
        assert ((history.scale[3::4] - 1).abs() <= rounding).all()
    for step, expected in enumerate(weights, 1):
        for name, value in there.state_dict(step=step).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-10)


class Lookahead:
    """Slow weights every third step, as a loop of its own writes them."""

    def __init__(self):
        self.slow = {}

    def __call__(self, net, step, recorder):
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                slow = self.slow.setdefault(name, parameter.detach().clone())
                if step % 3 == 0:
                    slow += 0.5 * (parameter - slow)
                    parameter.copy_(slow)


@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("make", [sgd, one_of_each_layer])
def test_synchronisations_are_those_of_the_same_training_in_host_memory(tmp_path, lag, make):
    _, here = trained(tmp_path / "here", torch.device("cpu"), make=make, after_step=Lookahead())
    _, there = trained(tmp_path / "there", DEVICE, make=make, lag=lag, after_step=Lookahead())
    assert "lookahead" in Store(there.path).histories["first.weight"].optimizer
    assert_same(here, there)
    assert there.verify()["exact"].all()


@pytest.mark.parametrize("lag", LAGS)
def test_what_is_amiss_is_told_with_the_number_of_its_step(tmp_path, lag):
    def disturbed(net, step, optimizers):
        if step == 7:
            net.second.weight.data *= 1.01
        net.loss(6).backward()
        if step == 11:
            net.first.weight.grad += 0.01
        if step == 13:
            net.last.weight.grad[:] = math.nan

    def after_step(net, step, recorder):
        if step == 13:  # the rest of the run is not about numbers
            torch.manual_seed(1)
            for parameter in net.parameters():
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))

    def run(path, device):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make = one_of_each_layer  # without momentum, which keeps what is no number
            _, memory = trained(path, device, lag=lag, make=make, backward=disturbed, after_step=after_step)
        return [str(one.message) for one in caught], memory

    told, memory = run(tmp_path / "there", DEVICE)
    assert len(told) == 3
    assert re.match("step 7: 'second.weight' or its optimiser state was changed", told[0])
    assert re.match("step 11: the recorded rows leave .* of the gradient of 'first.weight' open", told[1])
    assert re.match("step 13: NaN or infinity in the gradient of 'last.weight'", told[2])
    told_here, here = run(tmp_path / "here", torch.device("cpu"))
    assert sorted(told_here) == sorted(told)
    assert_same(here, memory)


@pytest.mark.parametrize("lag", LAGS)
def test_what_users_ask_for_in_between_is_whole(tmp_path, lag):
    found = []

    def after_step(net, step, recorder):
        if step in (1, 17):
            found.append((recorder.steps, recorder.rows, recorder.nbytes > 0))
        if step in (1, 6, 17, 30):
            recorder.flush()
            memory = dualhook.load(tmp_path / "run")
            assert (memory.steps, memory.patterns("first")) == (step, 6 * step)
            assert memory.verify().max_error < 1e-8

    trained(tmp_path / "run", DEVICE, lag=lag, after_step=after_step)
    assert found == [(step, 3 * 6 * step, True) for step in (1, 17)]


@pytest.mark.parametrize("model", [Plain, Mixed, Spoken, Tied])
@pytest.mark.parametrize(
    ("make", "backward"), [(sgd, plain), (sgd, clipped), (sgd, accumulated), (adam, clipped), (counting, plain)],
    ids=lambda way: way.__name__,
)  # fmt: skip
def test_no_step_waits_for_the_device(tmp_path, model, make, backward):
    """But for the first ones, to pack a head, and for a snapshot of the optimiser's state, kept ever more rarely."""
    waits = {}

    def after_step(net, step, recorder):
        at_times = ("snapshots.py", "heads.py")
        waits[step] = [own for own in WAITS if own and not any(name in place for place in own for name in at_times)]
        WAITS.clear()

    WAITS.clear()
    trained(tmp_path / "run", DEVICE, lag=9, make=make, model=model, backward=backward, after_step=after_step)
    assert waits[1]  # else nothing is counted
    assert {step: found for step, found in waits.items() if step > 1 and found} == {}


class Dark(Plain):
    """A first layer that sees nothing where its gradient is probed."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(300, 40, bias=False)
        probed = LayerProbe(LayerSpec("first", 300, 40, "first.weight", None)).usual(0).inputs.tolist()
        dark = [column for column in range(300) if column not in probed]
        self.register_buffer("spread", torch.eye(300)[dark[:12]])

    def forward(self, x):
        return super().forward(x @ self.spread)


def scaled_and_once_disturbed(net, step, optimizers):
    net.loss(6).backward()
    for parameter in net.parameters():
        parameter.grad /= step
    if step == 23:
        net.first.weight.grad += 0.01


@pytest.mark.parametrize("lag", LAGS)
def test_a_layer_whose_probed_entries_are_zero_is_told_by_sums(tmp_path, lag):
    settings = {"model": Dark, "make": one_of_each_layer, "backward": scaled_and_once_disturbed}
    with pytest.warns(InexactWarning, match=r"step 23: the recorded rows leave .* of the gradient of 'first.weight'"):
        trained(tmp_path / "there", DEVICE, lag=lag, **settings)
    history = Store(tmp_path / "there").histories["first.weight"]
    expected = 1 / torch.arange(1, STEPS).double()
    kept = torch.arange(1, STEPS) != 23
    torch.testing.assert_close(history.scale[kept], expected[kept], rtol=1e-9, atol=0)
    assert history.marked(Mark.UNEXPLAINED).tolist() == (~kept).tolist()


def test_a_lookup_is_told_by_all_of_its_tokens(tmp_path):
    def disturbed(net, step, optimizers):
        net.loss(6).backward()
        if step == 7:  # of a token that is not among the probed entries, in a step that is not looked at as a whole
            net.place.weight.grad[3] += 0.01

    with pytest.warns(InexactWarning, match=r"step 7: the recorded rows leave .* of the gradient of 'place.weight'"):
        trained(tmp_path / "there", DEVICE, lag=9, model=Spoken, backward=disturbed)


PLACES = {
    "rows": "dualhook.store.segment.LayerBuffer.append",
    "commit": "dualhook.store.segment.SegmentBuilder.commit",
    "changes": "dualhook.recorder.changes.Changes.found",
    "glance": "dualhook.capture.probe.LayerProbe.glance",
    "later": "dualhook.capture.probe.LayerProbe.later",
    "self-check": "dualhook.recorder.selfcheck.Prediction.off_by",
    "courier": "elsewhere.LateCourier.copies",
    "copies": "elsewhere.Late.synchronize",
}


@pytest.mark.parametrize("at_call", [0, 2, 5])
@pytest.mark.parametrize("lag", LAGS)
@pytest.mark.parametrize("place", PLACES)
def test_an_error_on_the_way_ends_the_memory_with_the_last_whole_step(tmp_path, monkeypatch, place, lag, at_call):
    bare, _ = trained(tmp_path / "bare", torch.device("cpu"), steps=20)
    owner, _, name = PLACES[place].rpartition(".")
    target, calls = resolve_name(owner), iter(range(10**9))
    original = getattr(target, name)

    def failing(*args, **kwargs):
        if next(calls) >= at_call:
            raise RuntimeError(place)
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, failing)
    with pytest.warns(UserWarning, match=f"recording stopped after step .*: {place}") as told:
        weights, memory = trained(tmp_path / "run", DEVICE, lag=lag, steps=20)
    monkeypatch.undo()
    assert all(torch.equal(value, bare[-1][name]) for name, value in weights[-1].items())
    (step,) = re.findall(r"stopped after step (\d+)", str([str(one.message) for one in told]))
    assert memory.steps == int(step) < 20
    for step in range(1, memory.steps + 1):
        for name, value in memory.state_dict(step=step).items():
            torch.testing.assert_close(value, weights[step - 1][name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("device", [torch.device("cpu"), DEVICE], ids=str)
def test_a_warning_that_is_an_error_loses_no_step(tmp_path, device):
    """A loop that catches it goes on; what it warned of stays the only thing."""

    def disturbed(net, step, optimizers):
        net.loss(6).backward()
        if step == 10:
            net.first.weight.grad += 0.01

    raised = []

    def patient(net):
        found = sgd(net)
        original = found[0].step

        def step():
            try:
                original()
            except InexactWarning as error:
                raised.append(error)

        found[0].step = step
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("error", InexactWarning)
        _, memory = trained(tmp_path / "run", device, lag=9, make=patient, backward=disturbed)
    assert len(raised) == 1
    for history in Store(memory.path).histories.values():
        assert history.step.tolist() == list(range(1, STEPS))
    marks = Store(memory.path).histories["first.weight"].mark
    assert (marks & int(Mark.UNEXPLAINED)).nonzero().flatten().tolist() == [9]
    assert memory.patterns("first") == 6 * (STEPS - 1)


def test_an_interrupt_while_something_is_waited_for_loses_nothing(tmp_path, monkeypatch):
    original, interrupted = Late.synchronize, []

    def synchronize(self):
        if not interrupted:
            interrupted.append(self)
            raise KeyboardInterrupt
        original(self)

    def after_step(net, step, recorder):
        if step == 20:
            monkeypatch.setattr(Late, "synchronize", synchronize)
            with pytest.raises(KeyboardInterrupt):
                recorder.flush()

    _, here = trained(tmp_path / "here", torch.device("cpu"))
    _, there = trained(tmp_path / "there", DEVICE, lag=1000, after_step=after_step)
    assert interrupted
    assert_same(here, there)


@pytest.mark.parametrize("device", [torch.device("cpu"), DEVICE], ids=str)
def test_a_synchronisation_before_a_step_that_fails_is_noted(tmp_path, device):
    lookahead = Lookahead()

    def after_step(net, step, recorder):
        lookahead(net, step, recorder)
        if step == 3:

            def closure():
                net.first.weight.data += 0.01
                raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                torch.optim.SGD(net.parameters(), lr=0.05).step(closure)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InexactWarning)  # of what the step that did not end has left
        _, memory = trained(tmp_path / "run", device, lag=9, make=one_of_each_layer, after_step=after_step)
    history = Store(memory.path).histories["first.weight"]
    entries = zip(history.step.tolist(), history.optimizer, strict=True)
    assert next(step for step, name in entries if name == "lookahead") == 3


def test_threads_of_several_devices_take_turns(tmp_path, monkeypatch):
    """Autograd has one for each device; while one brings rows the others wait."""
    original, found, inside = LateCourier.copies, [], []

    def tried():
        found.append(inside[0].acquire(blocking=False))
        if found[-1]:
            inside[0].release()

    def copies(self, values):
        if inside:
            other = threading.Thread(target=tried)
            other.start()
            other.join()
        return original(self, values)

    monkeypatch.setattr(LateCourier, "copies", copies)

    def watched(net, step, optimizers):
        loss = net.loss(6)
        inside.append(OPEN[tmp_path / "run"]._book.pending.lock)
        loss.backward()
        inside.clear()

    trained(tmp_path / "run", DEVICE, lag=9, backward=watched, steps=6)
    assert found == [False] * 3 * 5
