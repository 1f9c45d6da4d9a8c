"""Which rows become patterns: exactly those in the gradient that an optimiser step used.

The oracle of every case is the trained weight itself: the memory must rebuild it.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dualhook

B, I, O = 6, 5, 3


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(I, 7), nn.ReLU(inplace=True), nn.Linear(7, O)).double()


def loss_of(model: nn.Module, size: int = B) -> Tensor:
    return F.cross_entropy(model(torch.randn(size, I, dtype=torch.float64)), torch.randint(0, O, (size,)))


def sgd(model: nn.Module, **settings: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})


def recorded(model: nn.Module) -> dualhook.Recorder:
    return dualhook.instrument(model, verbose=False)


def assert_exact(recorder: dualhook.Recorder, patterns: int | None = None) -> dualhook.DualMemory:
    """``patterns`` counts what the last layer keeps: its output gradients are never exactly zero."""
    memory = recorder.close()
    assert memory.layers
    assert memory.verify().max_error < 1e-12
    assert memory.verify()["exact"].all()
    if patterns is not None:
        assert memory.patterns(memory.layers[-1]) == patterns
    return memory


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def test_a_plain_step(model):
    recorder, optimizer = recorded(model), sgd(model)
    for _ in range(3):
        step(model, optimizer)
    assert assert_exact(recorder, 3 * B).steps == 3


def test_evaluation_no_grad_and_unused_forwards_leave_nothing(model):
    recorder, optimizer = recorded(model), sgd(model)
    for _ in range(2):
        step(model, optimizer)
        loss_of(model)  # forward without backward
        with torch.no_grad():
            loss_of(model)
        with torch.inference_mode():
            loss_of(model)
        model.eval()
        loss_of(model)
        model.train()
    assert_exact(recorder, 2 * B)


def test_autograd_grad_leaves_nothing(model):
    recorder, optimizer = recorded(model), sgd(model)
    for _ in range(2):
        torch.autograd.grad(loss_of(model), list(model.parameters()))
        optimizer.zero_grad()
        loss_of(model).backward()
        torch.autograd.grad(loss_of(model), list(model.parameters()))  # between backward and step
        x = torch.randn(B, I, dtype=torch.float64, requires_grad=True)
        torch.autograd.grad(model(x).sum(), x)
        optimizer.step()
    assert_exact(recorder, 2 * B)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_micro_batches_dropped_by_zero_grad_leave_nothing(model, set_to_none):
    recorder, optimizer = recorded(model), sgd(model)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model).backward()
        loss_of(model).backward()
        optimizer.zero_grad(set_to_none=set_to_none)  # for instance after a loss that was too large
        loss_of(model).backward()
        optimizer.step()
    assert_exact(recorder, 3 * B)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_between_backward_and_step(model, set_to_none):
    recorder, optimizer = recorded(model), sgd(model, weight_decay=0.1)
    step(model, optimizer)
    loss_of(model).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.step()  # with zeros torch still decays and keeps the momentum going, with None it skips
    step(model, optimizer)
    assert_exact(recorder, 2 * B)


def test_gradient_accumulation(model):
    recorder, optimizer = recorded(model), sgd(model)
    for _ in range(3):
        optimizer.zero_grad()
        for size in (1, 4, 2):
            (loss_of(model, size) / 3).backward()
        optimizer.step()
    memory = assert_exact(recorder, 3 * 7)
    assert memory.steps == 3


def test_module_called_several_times_and_one_call_unused(model):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(I, I).double(), nn.Linear(I, O).double()

        def forward(self, x):
            first = self.layer(x).relu_()
            self.layer(x * 2)  # this call's result is not used
            return self.head(self.layer(first).relu_())

    net = Twice()
    recorder, optimizer = recorded(net), sgd(net)
    for _ in range(3):
        step(net, optimizer)
    memory = recorder.close()
    assert memory.verify().max_error < 1e-12
    assert memory.patterns("layer") <= 2 * 3 * B
    assert memory.patterns("head") == 3 * B


def test_two_backward_passes_through_one_graph(model):
    recorder, optimizer = recorded(model), sgd(model)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert_exact(recorder, 2 * B)


def test_backward_into_chosen_parameters(model):
    recorder, optimizer = recorded(model), sgd(model)
    loss_of(model).backward(inputs=[model[0].weight])
    optimizer.step()
    assert_exact(recorder)


def test_two_optimisers_for_two_halves(model):
    recorder = recorded(model)
    first, second = sgd(model[0]), sgd(model[2], lr=0.01, momentum=0.0)
    for _ in range(3):
        first.zero_grad()
        second.zero_grad()
        loss_of(model).backward()
        first.step()
        second.step()
    assert assert_exact(recorder, 3 * B).steps == 3  # both step on the same backward pass


def test_optimisers_that_alternate(model):
    recorder = recorded(model)
    first, second = sgd(model[0]), sgd(model[2])
    for k in range(6):
        optimizer = (first, second)[k % 2]
        model.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    memory = assert_exact(recorder)
    assert memory.steps == 6
    assert {memory.patterns(layer) for layer in memory.layers} == {3 * B}


def test_optimisers_that_step_at_different_paces(model):
    recorder = recorded(model)
    first, second = sgd(model[0]), sgd(model[2])
    for k in range(1, 9):
        first.zero_grad()
        loss_of(model).backward()
        first.step()
        if k % 4 == 0:  # the second half accumulates four backward passes
            second.step()
            second.zero_grad()
    assert_exact(recorder, 8 * B)


def test_weight_and_bias_in_two_optimisers(model):
    recorder = recorded(model)
    weights = torch.optim.SGD([model[0].weight, model[2].weight], lr=0.1, momentum=0.9)
    biases = torch.optim.SGD([model[0].bias, model[2].bias], lr=0.02)
    for _ in range(3):
        model.zero_grad()
        loss_of(model).backward()
        weights.step()
        biases.step()
    assert assert_exact(recorder, 3 * B).steps == 3


def test_groups_with_different_hyper_parameters(model):
    recorder = recorded(model)
    groups = [{"params": [model[0].weight], "momentum": 0.5}, {"params": [model[0].bias], "weight_decay": 0.1},
              {"params": model[2].parameters(), "lr": 0.01, "nesterov": True}]  # fmt: skip
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for _ in range(4):
        step(model, optimizer)
    assert_exact(recorder, 4 * B)


def test_optimiser_created_before_and_in_the_middle_of_its_run(model):
    optimizer = sgd(model, nesterov=True)
    for _ in range(4):
        step(model, optimizer)  # momentum buffers exist when recording begins
    recorder = recorded(model)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        step(model, optimizer)
    memory = assert_exact(recorder)
    assert all(torch.equal(value, before[name]) for name, value in memory.state_dict(step=0).items())


def test_a_new_optimiser_for_every_task(model):
    recorder = recorded(model)
    for lr in (0.1, 0.01):
        optimizer = sgd(model, lr=lr)
        for _ in range(3):
            step(model, optimizer)
    assert_exact(recorder, 6 * B)


def test_layers_frozen_and_unfrozen(model):
    recorder, optimizer = recorded(model), sgd(model)
    model[0].requires_grad_(False)
    for k in range(6):
        if k == 2:
            model[0].requires_grad_(True)
        if k == 4:
            model[2].weight.requires_grad_(False)
        step(model, optimizer)
    memory = assert_exact(recorder)
    assert memory.patterns("0") == 4 * B
    assert memory.patterns("2") == 6 * B  # its bias went on training


def test_only_biases_train(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    recorder, optimizer = recorded(model), torch.optim.SGD([model[0].bias, model[2].bias], lr=0.1)
    for _ in range(3):
        step(model, optimizer)
    memory = assert_exact(recorder, 3 * B)
    assert torch.equal(memory.weight("0"), model[0].weight)


def test_backbone_with_gradients_that_no_optimiser_steps(model, monkeypatch):
    monkeypatch.setattr("dualhook.recorder.pending.WAITING_BYTES", 0)
    recorder, optimizer = recorded(model), torch.optim.SGD(model[2].parameters(), lr=0.1)
    for _ in range(40):
        step(model, optimizer)  # nobody zeroes the first layer's gradients
    held = recorder._book.writer.builder.layers["0"]
    assert held.filled - held.committed <= 17 * B  # its rows do not pile up
    assert assert_exact(recorder, 40 * B).layers == ["2"]


def test_backward_passes_that_no_optimiser_ever_uses(model, monkeypatch):
    monkeypatch.setattr("dualhook.recorder.pending.PENDING_BYTES", 10_000)
    recorder, optimizer = recorded(model), sgd(model)
    step(model, optimizer)
    with pytest.warns(UserWarning, match="dropped .* rows without an optimiser step"):
        for _ in range(100):
            loss_of(model).backward()
    assert recorder._book.writer.builder.pending_bytes < 12_000
    with pytest.warns(dualhook.InexactWarning, match="step 2: "):
        optimizer.step()
    assert not recorder.close().verify()["exact"].any()


def test_an_optimiser_that_steps_rarely(model):
    recorder = recorded(model)
    first, second = sgd(model[0]), sgd(model[2])
    for k in range(1, 41):
        first.zero_grad()
        loss_of(model).backward()
        first.step()
        if k % 20 == 0:
            second.step()
            second.zero_grad()
    assert_exact(recorder, 40 * B)


def test_micro_batch_dropped_where_only_the_weights_are_in_the_optimiser(model):
    recorder = recorded(model)
    optimizer = torch.optim.SGD([model[0].weight, model[2].weight], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.zero_grad()  # the biases' gradients stay
        loss_of(model).backward()
        optimizer.step()
    assert_exact(recorder, 3 * B)


def test_a_weight_whose_gradient_is_zero_beside_a_bias_whose_is_not():
    layer = nn.Linear(I, O).double()
    recorder, optimizer = recorded(layer), sgd(layer)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(torch.zeros(B, I, dtype=torch.float64)) + 1).square().mean().backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 0.1)  # touches the gradients
        optimizer.step()
    assert_exact(recorder, 3 * B)


def test_micro_batch_dropped_by_a_new_gradient(model):
    recorder, optimizer = recorded(model), sgd(model)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        loss_of(model).backward()
        optimizer.step()
    assert_exact(recorder, 3 * B)


def test_hooks_of_the_users_that_change_the_output_gradient(model):
    model[0].register_forward_hook(
        lambda module, inputs, output: output.register_hook(lambda d: d.clamp(-0.01, 0.01)) and None
    )
    recorder, optimizer = recorded(model), sgd(model)
    for _ in range(3):
        step(model, optimizer)
    assert_exact(recorder, 3 * B)


def test_layers_in_turn_over_several_segments(model):
    """A layer that is stepped without rows: two heads in turn, gradients zeroed in place."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(I, O), nn.Linear(I, O)])
            self.turn = 0

        def forward(self, x):
            return self.heads[self.turn](x)

    net = Heads().double()
    recorder, optimizer = recorded(net), sgd(net)
    recorder._writer.segment_bytes = 1
    for k in range(12):
        net.turn = k // 3 % 2
        optimizer.zero_grad(set_to_none=False)
        loss_of(net).backward()
        optimizer.step()
    assert_exact(recorder, 6 * B)


def test_a_parameter_taken_away_in_the_middle(model):
    recorder, optimizer = recorded(model), sgd(model)
    step(model, optimizer)
    model[2].bias = None
    step(model, optimizer)
    with pytest.warns(UserWarning, match="'2.bias' was changed after the last recorded step"):
        memory = recorder.close()
    assert memory.steps == 2
    assert torch.allclose(memory.weight("2"), model[2].weight, atol=1e-12)


def test_closure(model):
    recorder, optimizer = recorded(model), sgd(model)

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss.item()

    for _ in range(3):
        optimizer.step(closure)
    assert_exact(recorder, 3 * B)


def test_optimisers_that_step_inside_the_backward_pass(model):
    optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}

    def apply(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(apply)
    recorder = recorded(model)
    for _ in range(3):
        loss_of(model).backward()
    assert_exact(recorder)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model, reentrant):
    recorder, optimizer = recorded(model), sgd(model)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(B, I, dtype=torch.float64, requires_grad=True)
        checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
        optimizer.step()
    assert_exact(recorder, 3 * B)


def test_layer_used_inside_and_outside_a_reentrant_checkpoint():
    layer = nn.Linear(I, I).double()
    recorder, optimizer = recorded(layer), sgd(layer)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(B, I, dtype=torch.float64, requires_grad=True)
        layer(checkpoint(layer, layer(x), use_reentrant=True)).square().mean().backward()
        optimizer.step()
    memory = recorder.close()
    assert memory.verify().max_error < 1e-12
    assert memory.patterns("(model)") == 3 * 3 * B


def test_exception_in_a_backward_pass(model):
    recorder, optimizer = recorded(model), sgd(model)
    step(model, optimizer)

    def fail(gradient: Tensor) -> None:
        raise RuntimeError("user code")

    hidden = model[0](torch.randn(B, I, dtype=torch.float64))
    hidden.register_hook(fail)
    with pytest.raises(RuntimeError, match="user code"):
        model[2](hidden.relu()).sum().backward()
    step(model, optimizer)
    assert assert_exact(recorder, 2 * B).steps == 2


def test_exception_in_a_step_is_marked_since_the_step_may_be_half_done(model):
    recorder, optimizer = recorded(model), sgd(model)
    step(model, optimizer)
    loss_of(model).backward()
    optimizer.param_groups[0]["lr"] = "broken"
    with pytest.raises((TypeError, RuntimeError)):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.warns(dualhook.InexactWarning, match=r"step 2: .*exception in step"):
        step(model, optimizer)
    memory = recorder.close()
    assert memory.steps == 2
    assert not memory.verify()["exact"].any()


def test_subclass_that_calls_the_step_of_sgd():
    class Shrinking(torch.optim.SGD):
        """Decoupled weight decay, as a user would add it."""

        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.mul_(1 - group["lr"] * group["shrink"])
            return super().step(closure)

    dualhook.optimizers.register(Shrinking, ShrinkingRule())
    for own_hook in (False, True):
        layer = nn.Linear(I, O).double()
        recorder = recorded(layer)
        optimizer = Shrinking(layer.parameters(), lr=0.1, momentum=0.9)
        optimizer.param_groups[0]["shrink"] = 0.2
        if own_hook:
            optimizer.register_step_pre_hook(lambda *_: None)
        for _ in range(4):
            step(layer, optimizer)
        assert len(optimizer._optimizer_step_pre_hooks) == own_hook
        memory = assert_exact(recorder, 4 * B)
        assert memory.steps == 4


class ShrinkingRule(dualhook.optimizers.SGDRule):
    def transitions(self, history):
        plain = super().transitions(history)
        plain.ww.sub_(history.column("lr") * history.column("shrink"))
        return plain


def test_subclass_that_only_changes_the_constructor():
    class Mine(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters, lr=0.1, momentum=0.9)

    layer = nn.Linear(I, O).double()
    recorder, optimizer = recorded(layer), Mine(layer.parameters())
    step(layer, optimizer)
    assert assert_exact(recorder, B).info()["rule"][0] == "sgd"


@pytest.mark.parametrize("fused", [True, False])
def test_implementations_of_sgd(model, fused):
    recorder = recorded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    for _ in range(3):
        step(model, optimizer)
    assert_exact(recorder, 3 * B)


def test_tensor_learning_rate(model):
    recorder = recorded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1, dtype=torch.float64), momentum=0.9)
    for _ in range(3):
        step(model, optimizer)
        optimizer.param_groups[0]["lr"].mul_(0.5)
    assert_exact(recorder, 3 * B)


def test_two_modules_with_one_weight():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(I, I, bias=False), nn.Linear(I, I, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).relu())

    net = Tied().double()
    recorder, optimizer = recorded(net), sgd(net)
    for _ in range(3):
        step(net, optimizer)
    memory = recorder.close()
    assert memory.verify().max_error < 1e-12
    assert memory.layers == ["first"]
    x = torch.randn(4, I, dtype=torch.float64)
    assert torch.allclose(memory.dual(net)(x), net(x), atol=1e-12)
    assert (memory.attend(net, x).explained["explained"] > 1 - 1e-10).all()


def test_any_number_of_batch_dimensions():
    layer = nn.Linear(I, O).double()
    recorder, optimizer = recorded(layer), sgd(layer)
    for shape in ((I,), (4, I), (4, 3, I), (2, 3, 2, I)):
        optimizer.zero_grad()
        with recorder.batch(samples=range(shape[0] if len(shape) > 1 else 1)):
            layer(torch.randn(shape, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    memory = recorder.close()
    assert memory.verify().max_error < 1e-12
    assert memory.patterns("(model)") == 1 + 4 + 12 + 12
    assert memory.samples.tolist() == [0, 1, 2, 3]


def test_in_place_activation_behind_a_layer_on_three_dimensions():
    """Where torch gives a view there, the view's own hooks are lost."""
    for bias in (True, False):
        model = nn.Sequential(
            nn.Linear(I, 7, bias=bias), nn.ReLU(inplace=True), nn.Linear(7, O), nn.ELU(inplace=True)
        ).double()
        recorder, optimizer = recorded(model), sgd(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(B, 4, I, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
        memory = recorder.close()
        assert memory.verify()["exact"].all()
        assert memory.verify().max_error < 1e-12
        x = torch.randn(2, 4, I, dtype=torch.float64)
        twin = nn.Sequential(model[0], nn.ReLU(), model[2], nn.ELU())  # the same function, nothing in place
        found, true = (
            memory.attend(network, x, target=lambda output: output.sum((1, 2))).sum_by("step")
            for network in (model, twin)
        )
        assert (true["abs_contribution"] > 0).any()
        assert np.allclose(found["contribution"], true["contribution"], rtol=1e-12)


def test_input_as_keyword_and_expanded_input():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(I, O)

        def forward(self, x):
            return self.layer(input=x[:1].expand(B, -1))

    net = Odd().double()
    recorder, optimizer = recorded(net), sgd(net)
    step(net, optimizer)
    assert_exact(recorder, B)
