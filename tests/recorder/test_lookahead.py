"""Optimisers that hold another one; Lookahead, recognised in the weights. The oracle is the run itself."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from third_party import Lookahead, PlainLookahead
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dualhook

STEPS = 21
WRAPPERS = pytest.mark.parametrize("wrap", [Lookahead, PlainLookahead])
INNER = pytest.mark.parametrize(
    ("make", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.Adam, {"lr": 0.01}),
        (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
        (torch.optim.Adafactor, {"lr": 0.01}),
    ],
)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def backward(model: nn.Module) -> torch.Tensor:
    loss = F.cross_entropy(model(torch.randn(4, 6).double()), torch.randint(0, 3, (4,)))
    loss.backward()
    return loss


class Run:
    """A recorded run with the weights after every step, the untrained ones first."""

    def __init__(self, path, make, settings, wrap, *, steps=STEPS, each=lambda step, run: None, **wrapped) -> None:
        options = {name: wrapped.pop(name) for name in ("max_bytes",) if name in wrapped}
        self.model = network()
        self.optimizer = wrap(make(self.model.parameters(), **settings), **wrapped)
        self.weights = [self.now()]
        self.recorder = dualhook.instrument(self.model, path, verbose=False, **options)
        for step in range(1, steps + 1):
            self.optimizer.zero_grad()
            backward(self.model)
            self.optimizer.step()
            self.weights.append(self.now())
            each(step, self)
        self.coverage = self.recorder.coverage
        self.memory = self.recorder.close()

    def now(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def assert_exact(self) -> None:
        report = self.memory.verify()
        assert report["exact"].all()
        assert report.max_error < 1e-12
        for step in range(self.memory._store.first_step, len(self.weights)):
            for name, value in self.memory.state_dict(step=step).items():
                assert torch.allclose(value, self.weights[step][name], rtol=1e-9, atol=1e-12), (step, name)


@WRAPPERS
@INNER
@pytest.mark.parametrize("k", [1, 2, 5])
def test_every_weight_at_every_step(tmp_path, make, settings, wrap, k):
    run = Run(tmp_path / "run", make, settings, wrap, k=k, alpha=0.3)
    run.assert_exact()
    alpha = run.memory._store.histories["0.weight"]
    seen = alpha.hyper["alpha"][torch.tensor([name == "lookahead" for name in alpha.optimizer])]
    assert set(seen.tolist()) == {0.3}
    assert len(seen) == (STEPS // k if wrap is Lookahead else (STEPS - 1) // k)
    x = torch.randn(3, 6).double()
    assert (run.memory.attend(run.model, x).explained["explained"] > 1 - 1e-9).all()


@WRAPPERS
@INNER
def test_contributions_are_the_weights_without_a_sample(tmp_path, make, settings, wrap):
    def name_samples(step, run):
        run.recorder.batch(torch.arange(4) + 4 * (step % 5))

    run = Run(tmp_path / "run", make, settings, wrap, k=5, each=name_samples)
    x = torch.randn(1, 6).double()
    attention = run.memory.attend(run.model, x, target=0, layers="2")
    hidden = run.model[1](run.model[0](x)).detach()
    whole = run.memory.state_dict()
    for row in attention.sum_by("sample").where(query=0):
        if row["sample"] < 0:
            continue
        without = run.memory.without(int(row["sample"]))
        weight, bias = (whole[f"2.{name}"] - without[f"2.{name}"] for name in ("weight", "bias"))
        assert row["contribution"] == pytest.approx(float(hidden @ weight[0] + bias[0]), rel=1e-8, abs=1e-12)
    assert torch.allclose(run.memory.dual(run.model)(x), run.model(x), rtol=1e-9)


@WRAPPERS
@INNER
def test_an_average_on_top(tmp_path, make, settings, wrap):
    average = []

    def update(step, run):
        average[:] = average or [AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.8))]
        average[0].update_parameters(run.model)

    run = Run(tmp_path / "run", make, settings, wrap, k=3, each=update)
    for name, value in run.memory.averaged("ema", decay=0.8).state_dict().items():
        assert torch.allclose(value, average[0].module.state_dict()[name], rtol=1e-9)


def write_at_once(step, run):
    run.recorder._writer._sealed.join()  # let the writing thread come to its budget


@WRAPPERS
@INNER
@pytest.mark.parametrize("k", [2, 5, 9])
def test_folding_keeps_the_slow_weights(tmp_path, make, settings, wrap, k):
    run = Run(tmp_path / "run", make, settings, wrap, steps=60, k=k, max_bytes=25_000, each=write_at_once)
    assert run.memory._store.first_step > 2 * k
    run.assert_exact()
    assert (run.memory.attend(run.model, torch.randn(3, 6).double()).explained["explained"] > 1 - 1e-9).all()


@WRAPPERS
def test_slow_weights_that_were_folded_away_before_the_first_synchronisation_are_told(tmp_path, wrap):
    with pytest.warns(dualhook.InexactWarning, match=r"step 3\d: '0.weight'"):
        run = Run(
            tmp_path / "run", torch.optim.SGD, {"lr": 0.1}, wrap,
            steps=100, k=30, max_bytes=6_000, each=write_at_once,
        )  # fmt: skip
    assert (run.memory.verify()["inexact_steps"] > 0).all()


@WRAPPERS
@INNER
def test_a_flush_after_every_step(tmp_path, make, settings, wrap):
    run = Run(tmp_path / "run", make, settings, wrap, k=2, each=lambda step, run: run.recorder.flush())
    run.assert_exact()


@WRAPPERS
@INNER
@pytest.mark.parametrize("steps", [2, 10, 11])
def test_a_synchronisation_after_the_last_step(tmp_path, make, settings, wrap, steps):
    Run(tmp_path / "run", make, settings, wrap, k=2, steps=steps).assert_exact()


@WRAPPERS
@INNER
def test_layers_that_rest(tmp_path, make, settings, wrap):
    def freeze(step, run):
        run.model[0].requires_grad_(not 4 <= step < 13)

    run = Run(tmp_path / "run", make, settings, wrap, k=5, alpha=0.7, each=freeze)
    run.assert_exact()


@WRAPPERS
def test_a_closure(tmp_path, wrap):
    model = network()
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), k=2)
    with dualhook.instrument(model, tmp_path / "run", verbose=False) as recorder:
        for _ in range(7):

            def closure():
                optimizer.zero_grad()
                return backward(model)

            optimizer.step(closure)
    assert recorder.close().verify()["exact"].all()


def test_several_optimisers_each_in_a_wrapper(tmp_path):
    model = network()
    inner = [torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.Adam(model[2].parameters(), lr=0.01)]
    wrapped = [Lookahead(inner[0], k=2), PlainLookahead(inner[1], k=3, alpha=0.8)]
    with dualhook.instrument(model, tmp_path / "run", verbose=False) as recorder:
        for step in range(13):
            backward(model)
            for optimizer in wrapped if step % 3 else reversed(wrapped):
                optimizer.step()
                optimizer.zero_grad()
    memory = recorder.close()
    assert memory.verify()["exact"].all()
    assert memory.info()["rule"].tolist() == ["sgd, lookahead", "adam, lookahead"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_is_what_was_typed_and_nothing_is_said(tmp_path, dtype):
    for number, (wrap, alpha, lr) in enumerate(
        itertools.product([Lookahead, PlainLookahead], [0.05, 0.3, 0.5, 0.8, 0.95], [0.1, 1e-3])
    ):
        model = nn.Linear(40, 20).to(dtype)
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=lr), k=4, alpha=alpha)
        recorder = dualhook.instrument(model, tmp_path / str(number), verbose=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(10):
                optimizer.zero_grad()
                F.cross_entropy(model(torch.randn(8, 40, dtype=dtype)), torch.randint(0, 20, (8,))).backward()
                optimizer.step()
        memory = recorder.close()
        history = memory._store.histories["weight"]
        seen = history.hyper["alpha"]
        assert set(seen[~seen.isnan()].tolist()) == {alpha}
        assert memory.verify()["exact"].all()


def test_recording_that_begins_between_two_synchronisations_is_told_once(tmp_path):
    model = network()
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1), k=5)

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()

    steps(3)
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False)
    with pytest.warns(dualhook.InexactWarning, match="step 3: '0.weight'"):  # the slow weights are older
        steps(14)
    assert recorder.close().verify()["inexact_steps"].tolist() == [1, 1]


def scaled(parameter):
    parameter.mul_(0.99)


def clamped(parameter):
    parameter.clamp_(-0.05, 0.05)


def noisy(parameter):
    parameter.add_(torch.randn_like(parameter), alpha=1e-9)


def half_way_back(parameter):
    parameter[:1].mul_(0.5)


@pytest.mark.parametrize("change", [scaled, clamped, noisy, half_way_back])
@pytest.mark.parametrize("wrap", [None, Lookahead, PlainLookahead])
def test_any_other_change_is_still_one(tmp_path, change, wrap):
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = inner if wrap is None else wrap(inner, k=5)
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False)
    with pytest.warns(dualhook.InexactWarning, match="step 8: '0.weight'"):
        for step in range(12):
            optimizer.zero_grad()
            backward(model)
            optimizer.step()
            if step == 6:
                with torch.no_grad():
                    change(model[0].weight)
    assert recorder.close().verify()["inexact_steps"].tolist() == [1, 0]


class Wrapped(torch.optim.Optimizer):
    """Holds another optimiser under some name and steps it; SAM's way where it is called ``base_optimizer``."""

    def __init__(self, params, name, inner):
        super().__init__(params, {})
        setattr(self, name, inner)

    def step(self, closure=None):
        for name in ("optimizer", "base_optimizer", "_optimizer"):
            if hasattr(self, name):
                getattr(self, name).step(closure)


@pytest.mark.parametrize("name", ["optimizer", "base_optimizer", "_optimizer"])
def test_the_steps_of_a_wrapper_are_those_of_what_it_holds(tmp_path, name):
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outer = Wrapped(model.parameters(), "optimizer", Wrapped(model.parameters(), name, inner))
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False, optimizer=outer)
    assert recorder.coverage["rule"].tolist() == ["sgd (exact)"] * 4
    for _ in range(4):
        outer.zero_grad()
        backward(model)
        outer.step()
    memory = recorder.close()
    assert memory.steps == 4
    assert memory.info()["optimizer"].tolist() == ["SGD", "SGD"]
    assert memory.verify()["exact"].all()


def test_an_optimiser_that_holds_one_of_other_parameters_is_no_wrapper(tmp_path):
    class Both(torch.optim.SGD):
        """Steps on its own parameters; the one it holds trains something else."""

    model, other = network(), nn.Linear(2, 2).double()
    optimizer = Both(model.parameters(), lr=0.1)
    optimizer.optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with dualhook.instrument(model, tmp_path / "run", verbose=False) as recorder:
        backward(model)
        optimizer.step()
    assert recorder.close().steps == 1


def test_sharpness_aware_minimisation(tmp_path):
    """Foret et al. 2021: the gradient is that of the second backward pass, at perturbed weights."""
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outer = Wrapped(model.parameters(), "base_optimizer", inner)
    with dualhook.instrument(model, tmp_path / "run", verbose=False) as recorder:
        for _ in range(6):
            x, y = torch.randn(4, 6).double(), torch.randint(0, 3, (4,))
            outer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            kept = [p.detach().clone() for p in model.parameters()]
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(p.grad, alpha=0.05)
            outer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for p, value in zip(model.parameters(), kept, strict=True):
                    p.copy_(value)
            outer.step()
    memory = recorder.close()
    assert memory.patterns("0") == 6 * 4
    assert memory.verify()["exact"].all()


@WRAPPERS
@INNER
def test_training_is_bit_identical(tmp_path, make, settings, wrap):
    ends = []
    for record in (True, False):
        torch.manual_seed(0)
        model = network().float()
        optimizer = wrap(make(model.parameters(), **settings), k=3, alpha=0.3)
        recorder = dualhook.instrument(model, tmp_path / "run", verbose=False) if record else None
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(4, 6)), torch.randint(0, 3, (4,))).backward()
            optimizer.step()
        ends.append(model.state_dict())
        if recorder is not None:
            assert recorder.close().verify()["exact"].all()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
