"""Optimisers with unusual settings, and what happens to them in the middle of a run: exact, or told by step."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.errors import RuleError

MAKERS = [
    torch.optim.SGD,
    torch.optim.ASGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adafactor,
    torch.optim.Rprop,
]
EVERY = pytest.mark.parametrize("make", MAKERS)
FUSED = pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
LIKELY = pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])


def momentum(make):
    return {"momentum": 0.9} if make in (torch.optim.SGD, torch.optim.RMSprop) else {}


def backward(model, scale=1.0):
    loss = F.cross_entropy(model(torch.randn(4, 6).double()), torch.randint(0, 3, (4,))) * scale
    loss.backward()
    return loss


class Recorded:
    """A model under a recorder, with its weights after every step, the untrained ones first."""

    def __init__(self, path, **options):
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.recorder = dualhook.instrument(self.model, path / "run", verbose=False, **options)
        self.weights = [copy.deepcopy(self.model.state_dict())]

    def steps(self, optimizer, count, *, schedule=None, zero=True):
        for _ in range(count):
            if zero:
                optimizer.zero_grad()
            backward(self.model)
            optimizer.step()
            self.stepped()
            if schedule is not None:
                schedule.step()

    def stepped(self):
        self.weights.append(copy.deepcopy(self.model.state_dict()))

    def close(self):
        memory = self.recorder.close()
        assert memory.steps == len(self.weights) - 1
        return memory

    def assert_exact(self, until=None):
        """Every weight up to a step; without one the whole run, by the memory's own word as well."""
        memory = self.close()
        if until is None:
            assert memory.verify()["exact"].all()
            assert memory.verify().max_error < 1e-10
        for step in range(len(self.weights) if until is None else until + 1):
            for name, value in memory.state_dict(step=step).items():
                assert torch.allclose(value, self.weights[step][name], rtol=1e-8, atol=1e-11), (step, name)
        return memory


# ---- settings ----------------------------------------------------------------------------------------------------


@EVERY
def test_a_learning_rate_that_is_a_tensor_and_changes_in_place(tmp_path, make):
    run = Recorded(tmp_path)
    rate = torch.tensor(0.01, dtype=torch.float64)
    # torch's foreach forms refuse a tensor without capturable
    optimizer = make(run.model.parameters(), lr=rate, foreach=False, **momentum(make))
    rates = []
    for factor in (1.0, 0.5, 3.0, 0.0, 2.0):
        rate.mul_(factor)
        rates.append(float(rate))
        run.steps(optimizer, 1)
    memory = run.assert_exact()
    assert memory._store.histories["0.weight"].hyper["lr"].tolist() == rates


@EVERY
@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}])
def test_foreach(tmp_path, make, options):
    run = Recorded(tmp_path)
    run.steps(make(run.model.parameters(), **options, **momentum(make)), 6)
    run.assert_exact()


@FUSED
def test_fused(tmp_path, make):
    run = Recorded(tmp_path)
    run.steps(make(run.model.parameters(), lr=0.01, fused=True, **momentum(make)), 6)
    run.assert_exact()


@FUSED
@pytest.mark.parametrize("fused", [True, False])
def test_loss_scaling_also_where_the_step_itself_undoes_it(tmp_path, make, fused):
    """A fused step divides the gradients by the scale, and skips on infinity, past torch's hooks."""
    run = Recorded(tmp_path)
    optimizer = make(run.model.parameters(), lr=0.01, fused=fused, **momentum(make))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    # torch 2.14's fused SGD leaves the momentum uninitialised where it skips its very first step
    skipped = (1, 4) if fused and make is torch.optim.SGD else (0, 4)
    for k in range(9):
        optimizer.zero_grad()
        backward(run.model, scaler.scale(torch.tensor(math.inf if k in skipped else 1.0)))
        scaler.step(optimizer)
        scaler.update()
        if k not in skipped:
            run.stepped()
    run.assert_exact()


@LIKELY
def test_groups_of_their_own_settings(tmp_path, make):
    run = Recorded(tmp_path)
    groups = [
        {"params": list(run.model[0].parameters()), "lr": 0.02, "weight_decay": 0.1},
        {"params": [run.model[2].weight], "lr": 0.001},
        {"params": [run.model[2].bias], "lr": 0.0},
    ]
    run.steps(make(groups, lr=0.01), 8)
    run.assert_exact()


@pytest.mark.parametrize(("make", "cycled"), [(torch.optim.Adam, "betas.0"), (torch.optim.SGD, "momentum")])
def test_a_schedule_of_the_momentum(tmp_path, make, cycled):
    run = Recorded(tmp_path)
    optimizer = make(run.model.parameters(), lr=0.01, **momentum(make))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12)
    run.steps(optimizer, 11, schedule=schedule)
    memory = run.assert_exact()
    assert len(set(memory._store.histories["0.weight"].hyper[cycled].tolist())) > 5


@LIKELY
def test_a_learning_rate_of_zero(tmp_path, make):
    run = Recorded(tmp_path)
    run.steps(make(run.model.parameters(), lr=0.0, **momentum(make)), 4)
    memory = run.assert_exact()
    assert (memory.attend(run.model, torch.randn(2, 6).double()).explained["explained"] == 1).all()


@LIKELY
def test_accumulation_and_clipping(tmp_path, make):
    run = Recorded(tmp_path)
    optimizer = make(run.model.parameters(), lr=0.01, **momentum(make))
    for _ in range(6):
        optimizer.zero_grad()
        for _ in range(3):
            backward(run.model)
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
        optimizer.step()
        run.stepped()
    memory = run.assert_exact()
    assert memory.patterns("0") == 6 * 3 * 4


@LIKELY
def test_steps_that_a_loop_skips(tmp_path, make):
    run = Recorded(tmp_path)
    optimizer = make(run.model.parameters(), lr=0.01, **momentum(make))
    for k in range(9):
        optimizer.zero_grad()
        backward(run.model)
        if k % 3:  # as a scaler does that has found infinities
            optimizer.step()
            run.stepped()
    memory = run.assert_exact()
    assert memory.patterns("0") == 6 * 4


@LIKELY
def test_closures(tmp_path, make):
    run = Recorded(tmp_path)
    optimizer = make(run.model.parameters(), lr=0.01, **momentum(make))

    def closure():
        optimizer.zero_grad()
        return backward(run.model)

    for _ in range(5):
        optimizer.step(closure)
        run.stepped()
    run.assert_exact()


@LIKELY
def test_gradients_below_the_smallest_normal_number(tmp_path, make):
    """A network that has fitted its batch: float32 gradients around 1e-42 have three digits at most."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    recorder = dualhook.instrument(model, tmp_path / "run", verbose=False)
    optimizer = make(model.parameters(), lr=0.01, **momentum(make))
    for _ in range(9):
        optimizer.zero_grad()
        (F.cross_entropy(model(torch.randn(4, 6)), torch.randint(0, 3, (4,))) * 1e-42).backward()
        optimizer.step()
    assert recorder.close().verify()["exact"].all()


# ---- in the middle of a run --------------------------------------------------------------------------------------


@EVERY
def test_parameters_added_later(tmp_path, make):
    run = Recorded(tmp_path)
    optimizer = make(run.model[0].parameters(), **momentum(make))
    run.steps(optimizer, 3)
    run.model.zero_grad()  # the layer that nobody stepped on has been gathering gradients
    optimizer.add_param_group({"params": list(run.model[2].parameters()), "lr": 0.02})
    try:
        run.steps(optimizer, 4)
    except KeyError:
        if make is not torch.optim.Adagrad:
            raise
        pytest.skip("this torch's Adagrad, before 2.12, cannot step on parameters that are added later")
    run.assert_exact()


@EVERY
def test_another_optimiser_of_the_same_class(tmp_path, make):
    run = Recorded(tmp_path)
    for lr in (0.01, 0.02, 0.01):
        run.steps(make(run.model.parameters(), lr=lr, **momentum(make)), 4)
    run.assert_exact()


@EVERY
def test_another_optimiser_of_another_class(tmp_path, make):
    run = Recorded(tmp_path)
    for other in (torch.optim.Adam, make, torch.optim.SGD, make):
        run.steps(other(run.model.parameters(), lr=0.01, **momentum(other)), 3)
    run.assert_exact()


@LIKELY
def test_two_of_one_class_in_turn_are_told(tmp_path, make):
    run = Recorded(tmp_path)
    pair = [make(run.model.parameters(), lr=lr, **({"momentum": 0.9} if momentum(make) else {})) for lr in (0.01, 0.02)]
    run.steps(pair[0], 2)
    run.steps(pair[1], 2)
    with pytest.warns(dualhook.InexactWarning, match=r"step 5: '0\.weight' or its optimiser state"):
        run.steps(pair[0], 2)  # with the state it had before the other one's steps
    run.assert_exact(until=4)


@LIKELY
def test_the_optimisers_own_state_loaded_again(tmp_path, make):
    run = Recorded(tmp_path)
    optimizer = make(run.model.parameters(), lr=0.01, **momentum(make))
    run.steps(optimizer, 3)
    optimizer.load_state_dict(optimizer.state_dict())
    run.steps(optimizer, 3)
    run.assert_exact()


@LIKELY
def test_an_older_state_loaded(tmp_path, make):
    run = Recorded(tmp_path)
    optimizer = make(run.model.parameters(), lr=0.01, **momentum(make))
    run.steps(optimizer, 2)
    snapshot = copy.deepcopy(optimizer.state_dict())
    run.steps(optimizer, 3)
    optimizer.load_state_dict(snapshot)
    with pytest.warns(dualhook.InexactWarning, match=r"step 6: '0\.weight' or its optimiser state") as told:
        run.steps(optimizer, 3)
    assert len(told) == 1
    memory = run.assert_exact(until=5)
    assert memory.verify()["inexact_steps"].tolist() == [1, 1]
    assert not memory.verify()["exact"].any()


@LIKELY
def test_weights_loaded(tmp_path, make):
    run = Recorded(tmp_path)
    optimizer = make(run.model.parameters(), lr=0.01, **momentum(make))
    run.steps(optimizer, 4)
    run.model.load_state_dict({name: torch.randn_like(value) for name, value in run.weights[2].items()})
    with pytest.warns(dualhook.InexactWarning, match=r"step 5: '0\.weight'") as told:
        run.steps(optimizer, 3)
    assert len(told) == 1
    memory = run.assert_exact(until=4)
    assert memory.verify()["inexact_steps"].tolist() == [1, 1]


@LIKELY
@pytest.mark.parametrize("where", ["gradient", "state"])
def test_not_a_number(tmp_path, make, where):
    run = Recorded(tmp_path)
    optimizer = make(run.model.parameters(), lr=0.01, **momentum(make))
    run.steps(optimizer, 4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for k in range(3):
            optimizer.zero_grad()
            backward(run.model, math.nan if where == "gradient" and k == 0 else 1.0)
            if where == "state" and k == 0:
                held = optimizer.state[run.model[0].weight]
                next(value for value in held.values() if isinstance(value, torch.Tensor) and value.ndim).fill_(math.nan)
            optimizer.step()
            run.stepped()
    messages = [str(one.message) for one in told]
    assert messages[0].startswith("step 5: ")
    # NaN in the state is a change of the state, and NaN in the next gradients: two things, each said once
    assert len(messages) == (1 if where == "gradient" else 2)
    memory = run.assert_exact(until=4)
    run.model.load_state_dict(run.weights[4])
    assert memory.verify(run.model, step=4)["exact"].all()


@LIKELY
def test_two_steps_on_one_gradient_are_told(tmp_path, make):
    run = Recorded(tmp_path)
    optimizer = make(run.model.parameters(), lr=0.01, **momentum(make))
    run.steps(optimizer, 3)
    with pytest.warns(dualhook.InexactWarning, match=r"step 4: the recorded rows leave .* open"):
        optimizer.step()
    run.stepped()
    run.steps(optimizer, 2)
    memory = run.assert_exact(until=3)
    assert not memory.verify()["exact"].any()


# ---- what cannot be recorded -------------------------------------------------------------------------------------


def test_lbfgs_is_refused_before_its_first_step(tmp_path):
    run = Recorded(tmp_path)
    run.steps(torch.optim.SGD(run.model.parameters(), lr=0.1), 2)
    optimizer = torch.optim.LBFGS(run.model.parameters())
    asked = []
    for _ in range(2):
        with pytest.raises(RuleError, match=r"LBFGS runs several backward passes.* layers="):
            optimizer.step(lambda: asked.append(backward(run.model)))
    assert not asked
    run.steps(torch.optim.SGD(run.model.parameters(), lr=0.1), 2)
    run.assert_exact()


def test_lbfgs_is_refused_by_instrument_and_leaves_nothing(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(RuleError, match="LBFGS runs several backward passes"):
        dualhook.instrument(model, tmp_path / "run", optimizer=torch.optim.LBFGS(model.parameters()))
    assert not (tmp_path / "run").exists()
    dualhook.instrument(model, tmp_path / "run", verbose=False).close()


def test_lbfgs_beside_the_recorded_layers_is_none_of_our_business(tmp_path):
    run = Recorded(tmp_path, layers=["0"])
    first = torch.optim.SGD(run.model[0].parameters(), lr=0.1)
    last = torch.optim.LBFGS(run.model[2].parameters(), max_iter=3)

    def closure():
        last.zero_grad()
        return backward(run.model)

    for _ in range(3):
        last.step(closure)
        first.zero_grad()
        backward(run.model)
        first.step()
    memory = run.recorder.close()
    assert memory.patterns("0") == 3 * 4
    assert memory.verify()["exact"].all()
