"""The probe measures any uniform scale and catches what rows do not explain."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.capture import Use
from dualhook.capture.measurement import Measurement, fit_scales
from dualhook.capture.precision import is_reduced, operation_of
from dualhook.capture.probe import LayerProbe, looked
from dualhook.capture.uses import signed_sums
from dualhook.packing import pack_softmax
from dualhook.records import LayerSpec, Mark, Rows

B, I, O = 16, 20, 4


def network(dtype=torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(I, 30), nn.ReLU(), nn.Linear(30, O)).to(dtype)


def batch(dtype=torch.float64):
    return torch.randn(B, I, dtype=dtype), torch.randint(0, O, (B,))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, dtype=torch.float64) -> None:
    optimizer.zero_grad()
    x, y = batch(dtype)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def measured(probe: LayerProbe, *args, **kwargs) -> dict[str, Measurement]:
    (found,) = looked([probe.measure(*args, **kwargs)])
    return found


def scales(memory: dualhook.DualMemory, parameter: str = "0.weight") -> list[float]:
    return memory._store.histories[parameter].scale.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clipping_is_measured(dtype):
    model = network(dtype)
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    true = []
    for k in range(6):
        optimizer.zero_grad()
        x, y = batch(dtype)
        F.cross_entropy(model(x) * (k + 1), y).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        true.append(min(1.0, 0.5 / (float(norm) + 1e-6)))
        optimizer.step()
    memory = recorder.close()
    eps = torch.finfo(dtype).eps
    assert min(true) < 0.9  # the clipping did something
    assert np.allclose(scales(memory), true, rtol=20 * eps)
    assert memory.verify().max_error < 1e-5


def test_no_clipping_is_exactly_one():
    model = network(torch.float32)
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        step(model, optimizer, torch.float32)
    memory = recorder.close()
    assert scales(memory) == [1.0] * 5
    assert scales(memory, "2.bias") == [1.0] * 5


def test_a_scale_per_parameter_and_a_scaled_loss():
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        x, y = batch()
        (F.cross_entropy(model(x), y) * 1024).backward()  # as a loss scaler does
        for factor, parameter in zip((0.5, 2.0, -1.0, 0.25), model.parameters(), strict=True):
            parameter.grad.mul_(factor / 1024)
        optimizer.step()
    memory = recorder.close()
    assert memory.verify().max_error < 1e-12
    assert np.allclose(scales(memory), 0.5 / 1024)
    assert np.allclose(scales(memory, "2.weight"), -1.0 / 1024)


def l2_penalty(model, loss):
    return loss + 1e-3 * sum(parameter.square().sum() for parameter in model.parameters())


def gradient_penalty(model, loss):
    (gradient,) = torch.autograd.grad(loss, model[0].weight, create_graph=True)
    return loss + gradient.square().sum()


@pytest.mark.parametrize(
    ("spoil", "clip", "layer"),
    [
        (l2_penalty, None, "0"),
        (gradient_penalty, None, "2"),  # the first layer's output sees all of the penalty: its rows explain it
        (None, 1e-3, "0"),
    ],
)
def test_what_rows_do_not_explain_is_warned_about_once_marked_and_shown(spoil, clip, layer):
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", dualhook.InexactWarning)
        for k in range(5):
            optimizer.zero_grad()
            x, y = batch()
            loss = F.cross_entropy(model(x), y)
            spoiled = k in (2, 4)
            (spoil(model, loss) if spoil and spoiled else loss).backward()
            if clip and spoiled:
                nn.utils.clip_grad_value_(model.parameters(), clip)
            optimizer.step()
    found = [str(w.message) for w in caught if issubclass(w.category, dualhook.InexactWarning)]
    assert len(found) == 1, found
    assert found[0].startswith("step 3: ")
    memory = recorder.close()
    report = memory.verify().where(layer=layer)
    assert report["error"][0] > 1e-8
    assert not report["exact"][0]
    assert report["inexact_steps"].tolist() == [2]
    ledger = memory._store.histories[f"{layer}.weight"]
    assert ledger.step[ledger.marked(Mark.UNEXPLAINED)].tolist() == [3, 5]
    assert (ledger.residual[ledger.marked(Mark.UNEXPLAINED)] > 1e-4).all()
    assert memory.verify(step=2, model=_at(memory, model, 2))["exact"].all()  # up to then it is exact


def _at(memory, model, step):
    twin = copy.deepcopy(model)
    twin.load_state_dict(memory.state_dict(step=step))
    return twin


def test_pausing_between_backward_passes_costs_nothing():
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        x, y = batch()
        F.cross_entropy(model(x), y).backward()
        recorder.pause()
        optimizer.step()
        recorder.resume()
    assert recorder.close().verify()["exact"].all()


def test_steps_while_paused_are_marked_missing():
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(dualhook.InexactWarning, match="step 2: .*paused"):
        for k in range(3):
            (recorder.pause if k == 1 else recorder.resume)()
            step(model, optimizer)
    memory = recorder.close()
    assert memory.verify().max_error > 1e-8
    assert memory.verify()["inexact_steps"].tolist() == [1, 1]


def test_weights_changed_by_something_else_are_marked():
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = copy.deepcopy(model.state_dict())
    with pytest.warns(dualhook.InexactWarning, match="step 2: .*load_state_dict"):
        for _ in range(2):
            step(model, optimizer)
            model.load_state_dict(start)
    with pytest.warns(UserWarning, match="after the last recorded step 2"):
        memory = recorder.close()
    assert np.isnan(memory.verify().max_error)  # there is nothing left to compare with
    assert memory.verify()["inexact_steps"].tolist() == [1, 1]


def test_swapping_weights_in_and_out_for_an_evaluation_is_no_change():
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        step(model, optimizer)
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict({name: torch.zeros_like(value) for name, value in kept.items()})
        model.load_state_dict(kept)
    memory = recorder.close()
    assert memory.verify()["exact"].all()
    assert memory.verify().max_error < 1e-12


def load_other_momentum(optimizer, parameter):
    state = optimizer.state_dict()
    state["state"][0]["momentum_buffer"] = torch.ones_like(parameter)
    optimizer.load_state_dict(state)  # torch keeps the tensors of the other parameters


def write_other_momentum(optimizer, parameter):
    optimizer.state[parameter]["momentum_buffer"].zero_()


@pytest.mark.parametrize("spoil", [load_other_momentum, write_other_momentum])
def test_optimiser_state_changed_in_the_middle_is_marked(spoil):
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        step(model, optimizer)
    spoil(optimizer, model[0].weight)
    with pytest.warns(dualhook.InexactWarning, match="step 3: "):
        step(model, optimizer)
    report = recorder.close().verify()
    assert report["inexact_steps"].tolist() == [1, 0]
    assert report["exact"].tolist() == [False, True]


def test_weights_changed_through_data_are_marked():
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(dualhook.InexactWarning, match="step 2: "):
        for _ in range(3):
            step(model, optimizer)
            model[0].weight.data.clamp_(-0.1, 0.1)  # as a Wasserstein critic does; no version counts this
    with pytest.warns(UserWarning, match="changed after the last recorded step"):
        memory = recorder.close()
    assert memory.verify()["inexact_steps"].tolist() == [2, 0]


def test_verify_calls_nothing_exact_that_does_not_add_up():
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: model[0].weight.data.mul_(0.99))  # before ours can look
    with pytest.warns(dualhook.InexactWarning, match=r"the rule of torch\.optim\.sgd\.SGD is off by"):
        step(model, optimizer)
    report = recorder.close().verify()
    assert report["error"][0] > 1e-3
    assert report["exact"].tolist() == [False, True]


def test_clipping_in_the_optimisers_own_hook_is_measured():
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 0.1) and None)
    for _ in range(3):
        step(model, optimizer)
        assert list(optimizer._optimizer_step_pre_hooks) == [handle.id]
    memory = recorder.close()
    assert max(scales(memory)) < 0.9
    assert memory.verify().max_error < 1e-12


def test_nan_loss_is_recorded_as_it_is_and_said_once():
    model = network()
    recorder = dualhook.instrument(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(4):
            optimizer.zero_grad()
            x, y = batch()
            loss = F.cross_entropy(model(x), y)
            (loss * float("nan") if k >= 2 else loss).backward()
            optimizer.step()
    assert [str(w.message)[:13] for w in caught] == ["step 3: NaN o"]
    memory = recorder.close()
    assert memory.weight("0").isnan().all()
    assert model[0].weight.isnan().all()
    assert memory.patterns("0") == 4 * B
    assert np.isnan(memory.verify().max_error)
    assert not memory.weight("0", step=2).isnan().any()


def test_fit_uses_the_shared_scale_where_rows_cancel():
    generator = np.random.default_rng(0)
    rebuilt = generator.normal(size=64)
    clear = Measurement(0.25 * rebuilt, rebuilt, abs(rebuilt) * 10, torch.float32)
    noise = Measurement(1e-9 * rebuilt[::-1], 1e-9 * rebuilt, abs(rebuilt), torch.float32)
    fits = fit_scales([clear, noise])
    assert fits[0].scale == pytest.approx(0.25, rel=1e-12)
    assert fits[1].scale == pytest.approx(0.25, rel=1e-12)
    assert fits[0].explained
    assert fits[1].explained


def test_a_dead_corner_of_the_grid_is_left_for_the_largest_entries():
    spec = LayerSpec("layer", 4000, 3000, "layer.weight", None)
    probe = LayerProbe(spec)
    key, output_grad = torch.zeros(5, 4000), torch.zeros(5, 3000)
    alive_in = next(k for k in range(4000) if k not in set(probe._inputs.tolist()))
    alive_out = next(k for k in range(3000) if k not in set(probe._outputs.tolist()))
    key[:, alive_in], output_grad[:, alive_out] = 1.0, 2.0
    rows = Rows(key, output_grad, *(torch.zeros(5, dtype=torch.int64) for _ in range(3)))
    gradient = 0.5 * output_grad.T @ key
    (fit,) = fit_scales(list(measured(probe, {"layer.weight": gradient}, [Use(spec, spec, rows)]).values()))
    assert fit.scale == pytest.approx(0.5)
    (fit,) = fit_scales(list(measured(probe, {"layer.weight": gradient + 1}, [Use(spec, spec, rows)]).values()))
    assert not fit.explained


@pytest.mark.parametrize("counts", [[1], [1024], [1025], [3000], [2, 2500, 1, 0, 700], [8, 8, 8]])
def test_steps_of_many_rows_are_rebuilt_from_all_of_them(counts):
    spec = LayerSpec("layer", 40, 50, "layer.weight", "layer.bias")
    probe, count = LayerProbe(spec), sum(counts)
    rows = Rows(torch.randn(count, 40), torch.randn(count, 50), *(torch.zeros(count, dtype=torch.int64),) * 3)
    seen, bounds, start = [], [], 0
    for size in counts:
        bounds.append((start, start := start + size))
        d, x = rows.output_grad[slice(*bounds[-1])].double(), rows.key[slice(*bounds[-1])].double()
        gradients = {"layer.weight": 0.5 * (d.T @ x), "layer.bias": 0.5 * d.sum(0)}
        seen.append(probe.glance({name: own.float() for name, own in gradients.items()}))
    told = [(one, within) for one, within in zip(seen, bounds, strict=True) if one is not None]
    assert len(told) == sum(size > 0 for size in counts)
    for found in probe.later([one for one, _ in told], rows, [within for _, within in told]):
        for name, one in found.items():
            np.testing.assert_allclose(0.5 * one.rebuilt, one.gradient, rtol=1e-5, atol=1e-5, err_msg=name)
            assert (one.absolute >= abs(one.rebuilt) * (1 - 1e-5)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("parameter", ["layer.weight", "layer.bias"])
def test_the_whole_gradient_is_looked_at(dtype, parameter):
    """One entry off the grid, clipped."""
    spec = LayerSpec("layer", 200, 300, "layer.weight", "layer.bias")
    probe = LayerProbe(spec)
    key, output_grad = torch.randn(32, 200, dtype=dtype), torch.randn(32, 300, dtype=dtype)
    rows = Rows(key, output_grad, *(torch.zeros(32, dtype=torch.int64) for _ in range(3)))
    gradients = {"layer.weight": output_grad.T @ key, "layer.bias": output_grad.sum(0)}
    fits = fit_scales(list(measured(probe, gradients, [Use(spec, spec, rows)], whole=True).values()))
    assert all(fit.explained for fit in fits)
    off = next(o for o in range(300) if o not in set(probe._outputs.tolist()))
    if parameter == "layer.weight":
        gradients[parameter][off, 7] *= 0.9
    else:
        gradients[parameter][off] *= 0.9
    for whole, explained in ((False, True), (True, False)):
        found = measured(probe, gradients, [Use(spec, spec, rows)], whole=whole)
        (fit,) = fit_scales([found[parameter]])
        assert fit.explained is explained


@pytest.mark.parametrize("parameter", ["layer.weight", "layer.bias"])
def test_many_outputs_are_looked_at_in_turn(monkeypatch, parameter):
    """One entry off the grid is in the last of 5 parts."""
    monkeypatch.setattr("dualhook.capture.probe.MANY", 299)
    monkeypatch.setattr("dualhook.capture.probe.SEEN", 64)
    spec = LayerSpec("layer", 200, 300, "layer.weight", "layer.bias")
    probe = LayerProbe(spec)
    key, output_grad = torch.randn(32, 200).double(), torch.randn(32, 300).double()
    rows = Rows(key, output_grad, *(torch.zeros(32, dtype=torch.int64) for _ in range(3)))
    gradients = {"layer.weight": output_grad.T @ key, "layer.bias": output_grad.sum(0)}
    off = next(o for o in range(256, 300) if o not in set(probe._outputs.tolist()))
    gradients[parameter][(off, 177) if parameter == "layer.weight" else off] *= 0.9
    looks = [measured(probe, gradients, [Use(spec, spec, rows)], whole=True) for _ in range(10)]
    explained = [all(fit.explained for fit in fit_scales(list(found.values()))) for found in looks]
    assert explained == 2 * [True, True, True, True, False]


def test_many_outputs_are_looked_at_in_turn_where_the_usual_entries_are_zero(monkeypatch):
    """That another corner is looked at then does not skip a turn."""
    monkeypatch.setattr("dualhook.capture.probe.MANY", 255)
    monkeypatch.setattr("dualhook.capture.probe.SEEN", 64)
    spec = LayerSpec("layer", 200, 256, "weight", None)
    probe = LayerProbe(spec)
    key, output_grad = torch.randn(32, 200).double(), torch.randn(32, 256).double()
    key[:, probe.usual(0).inputs] = 0
    rows = Rows(key, output_grad, *(torch.zeros(32, dtype=torch.int64) for _ in range(3)))
    gradient = output_grad.T @ key
    column = int(key[0].nonzero()[0])
    gradient[[0, 64, 128, 192], column] *= 0.9  # in each of the 4 parts
    parts = set()
    for _ in range(4):
        found = measured(probe, {"weight": gradient}, [Use(spec, spec, rows)], whole=True)["weight"].whole
        assert (abs(found.gradient - found.rebuilt) > 1e-9).tolist() == [True] + 63 * [False]
        parts.add(tuple(found.rebuilt))
    assert len(parts) == 4


@pytest.mark.parametrize(
    ("spec", "shape", "bias"),
    [
        (LayerSpec("layer", 40, 50, "weight", "bias"), (50, 40), (50,)),
        (LayerSpec("layer", 40, 50, "weight", "bias", "transposed"), (40, 50), (50,)),
        (LayerSpec("layer", 30, 50, "weight", None, "embedding", 30), (30, 50), None),
        (LayerSpec("layer", 4 * 40, 50, "weight", "bias", "experts", 4), (4, 50, 40), (4, 50)),
        (LayerSpec("layer", 4 * 40, 50, "weight", "bias", "transposed_experts", 4), (4, 40, 50), (4, 50)),
        (LayerSpec("layer", 5 * 8, 50, "weight", "bias", "bilinear", options={"widths": (5, 8)}), (50, 5, 8), (50,)),
    ],
    ids=lambda value: value.kind if isinstance(value, LayerSpec) else "",
)
def test_the_probed_entries_of_a_device_are_those_of_the_matrix(spec, shape, bias):
    probe = LayerProbe(spec)
    gradients = {"weight": torch.randn(shape)} | ({} if bias is None else {"bias": torch.randn(bias)})
    for name, own in gradients.items():
        expected = probe._seen(probe.usual(0), name, own).flatten()
        assert len(expected) > 30
        assert torch.equal(torch.take(own, probe._entries_of(name, own)), expected)


@pytest.mark.parametrize(
    "module",
    [nn.Conv1d(6, 64, 5), nn.Conv2d(6, 64, 3, groups=2), nn.ConvTranspose2d(6, 64, 3, groups=2)],
    ids=lambda module: type(module).__name__,
)
def test_the_probed_entries_of_a_convolution_on_a_device_are_those_of_the_matrix(module):
    model = nn.Sequential(module)
    recorder = dualhook.instrument(model, layers="all", verbose=False)
    (probe,) = recorder._book.layers.probes()
    for name, parameter in model.named_parameters():
        own = torch.randn(parameter.shape)
        expected = probe._seen(probe.usual(0), name, own).flatten()
        assert len(expected) > 10
        assert torch.equal(torch.take(own, probe._entries_of(name, own)), expected)
    recorder.discard()


HEAD = LayerSpec("head", 24, 50, "weight", None)
LOOKUP = LayerSpec("lookup", 50, 24, "weight", None, kind="embedding", slots=50)


@pytest.mark.parametrize("asked", [HEAD, LOOKUP], ids=["head", "lookup"])
@pytest.mark.parametrize("own", ["whole head", "computed head", "lookup"])
@pytest.mark.parametrize("outputs", [None, torch.arange(16, 24)], ids=["all", "some"])
def test_signed_sums_of_a_shared_weight(asked, own, outputs):
    n, nothing = 70, torch.zeros(70, dtype=torch.int64)
    key, weight, target = torch.randn(n, 24).double(), torch.randn(50, 24).double(), torch.randint(0, 50, (n,))
    if own == "lookup":
        spec, values = LOOKUP, torch.randn(n, 24).double()
        rows = Rows(torch.ones(n, 1).double(), values, nothing, nothing, nothing, slot=target.int())
        single = F.one_hot(target, 50).double()[:, :, None] * values[:, None]
    else:
        spec, grads = HEAD, (key @ weight.T).softmax(1) - F.one_hot(target, 50)
        rows = Rows(key, grads, nothing, nothing, nothing)
        single = grads[:, :, None] * key[:, None]
        if own == "computed head":
            packed = pack_softmax(key, grads, weight, 0)
            assert packed is not None
            rows = dataclasses.replace(rows, output_grad=grads[:, :0], packed=packed)
    if asked is LOOKUP:
        single = single.transpose(1, 2)
    signs = torch.randn(asked.in_features).sign()
    chosen = slice(None) if outputs is None else outputs
    expected = (single.sum(0) * signs).sum(1)[chosen]
    size = single.abs().sum((0, 2))[chosen]
    found = signed_sums(asked, [Use(asked, spec, rows)], signs, 1, outputs)
    assert found.weight.shape == (len(expected), 1)
    torch.testing.assert_close(found.weight[:, 0], expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.size[:, 0], size, rtol=1e-9, atol=1e-11)


PRECISIONS = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="torch has one setting of all products before 2.9"
)


@pytest.fixture
def settings():
    """Sets how many digits products of float32 have, for the length of a test."""
    before = []

    def set_to(library: str, operation: str, precision: str) -> None:
        place = getattr(getattr(torch.backends, library), operation)
        before.append((place, place.fp32_precision))
        place.fp32_precision = precision

    yield set_to
    for place, precision in reversed(before):
        place.fp32_precision = precision


@PRECISIONS
@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_products_of_fewer_digits_by_the_settings_of_one_library(settings, precision):
    """torch refuses to sum them up: ``get_float32_matmul_precision`` raises."""
    spec = LayerSpec("layer", 20, 30, "layer.weight", None)
    key, output_grad = torch.randn(8, 20), torch.randn(8, 30)
    rows = Rows(key, output_grad, *(torch.zeros(8, dtype=torch.int64) for _ in range(3)))
    settings("mkldnn", "matmul", precision)
    gradient = (output_grad.bfloat16().T @ key.bfloat16()).float()
    (fit,) = fit_scales(list(measured(LayerProbe(spec), {"layer.weight": gradient}, [Use(spec, spec, rows)]).values()))
    assert fit.explained == (precision == "bf16")
    model = network(torch.float32)
    with dualhook.instrument(model, on_error="raise", verbose=False) as recorder:
        step(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.float32)
    assert recorder.close().verify(model).max_error < 1e-2


@PRECISIONS
def test_every_operation_has_its_own_setting(settings):
    cuda = torch.device("cuda")
    assert [is_reduced(own, cuda) for own in ("matmul", "conv", "rnn")] == [False, True, True]  # torch's defaults
    settings("cudnn", "conv", "ieee")
    settings("cuda", "matmul", "tf32")
    assert [is_reduced(own, cuda) for own in ("matmul", "conv", "rnn")] == [True, False, True]
    assert not is_reduced("matmul", torch.device("cpu"))
    made_by = {"linear": nn.Linear(1, 1), "conv": nn.Conv1d(1, 1, 1), "conv_transpose": nn.ConvTranspose2d(1, 1, 1)}
    assert [operation_of(kind, made_by[kind]) for kind in made_by] == ["matmul", "conv", "conv"]
    assert operation_of("linear", nn.LSTM(1, 1)) == "rnn"
    assert operation_of("linear", nn.LSTMCell(1, 1)) == "matmul"


def test_gradient_without_rows_is_unexplained_unless_zero():
    probe = LayerProbe(LayerSpec("layer", 3, 2, "layer.weight", None))
    for gradient, explained in ((torch.zeros(2, 3), True), (torch.full((2, 3), 1e-9), False)):
        (fit,) = fit_scales(list(measured(probe, {"layer.weight": gradient}, []).values()))
        assert fit.explained is explained
