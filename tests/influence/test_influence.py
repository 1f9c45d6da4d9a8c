"""Influence against closed forms: linear models whose training is differentiated through, and naive sums of cosines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import dualhook
from dualhook.errors import DualHookError, LayerError, RuleError

SAMPLES, INPUTS, STEPS = 9, 4, 8


def sgd_effects(x, target, queries, weight, settings, rates, *, steps, mean, decoupled=False):
    """The derivative of each query's output by every sample's weight in the loss [q, s]: autograd through training."""
    share = torch.ones(len(x), dtype=x.dtype, requires_grad=True)
    w, buffer = weight.clone().requires_grad_(), None
    for step in range(steps):
        error = (x @ w - target).square() * share
        loss = error.mean() if mean else error.sum()
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        g = g + settings.get("weight_decay", 0.0) * w
        momentum = settings.get("momentum", 0.0)
        if momentum:
            buffer = g if buffer is None else momentum * buffer + (1 - settings.get("dampening", 0.0)) * g
            g = g + momentum * buffer if settings.get("nesterov") else buffer
        w = w - rates[step] * g
    return torch.stack([torch.autograd.grad(q @ w, share, retain_graph=True)[0] for q in queries])


@st.composite
def regressions(draw):
    momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
    settings = {"momentum": momentum, "weight_decay": draw(st.sampled_from([0.0, 0.1]))}
    if momentum:
        settings |= draw(st.sampled_from([{}, {"nesterov": True}, {"dampening": 0.3}]))
    rates = [draw(st.floats(0.005, 0.05)) for _ in range(STEPS)]
    return settings, rates, draw(st.integers(0, 10**6)), draw(st.booleans())


@given(regressions())
def test_decayed_is_the_true_effect_where_the_loss_is_quadratic(tmp_path_factory, run):
    settings, rates, seed, mean = run
    torch.manual_seed(seed)
    x, target = torch.randn(SAMPLES, INPUTS).double(), torch.randn(SAMPLES).double()
    queries = torch.randn(3, INPUTS).double()
    model = nn.Linear(INPUTS, 1, bias=False).double()
    begin = model.weight.detach()[0].clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, **settings)
    if not mean:
        rates = [rate / SAMPLES for rate in rates]
    recorder = dualhook.instrument(model, tmp_path_factory.mktemp("run") / "memory", verbose=False)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        recorder.batch(samples=torch.arange(SAMPLES))
        optimizer.zero_grad()
        F.mse_loss(model(x)[:, 0], target, reduction="mean" if mean else "sum").backward()
        optimizer.step()
    found = recorder.close().influence(model, queries, of="logit", cache=False)
    expected = sgd_effects(x, target, queries, begin, settings, rates, steps=STEPS, mean=mean)
    assert found.note == ""
    torch.testing.assert_close(found.scores, expected, rtol=2e-4, atol=2e-5 * float(expected.abs().max()))


class Two(nn.Module):
    """The sum of two linear maps of the same inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(INPUTS, 1, bias=False).double() for _ in range(2))

    def forward(self, x):
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}])
def test_layers_that_answer_for_each_other_take_back_together(tmp_path, monkeypatch, settings):
    monkeypatch.setattr("dualhook.loss.Loss._slope", lambda *_: 2.0)  # the outputs are more than the last layer's
    torch.manual_seed(2)
    x, target, queries = torch.randn(SAMPLES, INPUTS).double(), torch.randn(SAMPLES).double(), torch.randn(3, INPUTS)
    model, rates, steps = Two(), (0.02, 0.005), 12  # a stretch each
    weights = [layer.weight.detach()[0].clone() for layer in (model.first, model.second)]
    groups = [{"params": own.parameters(), "lr": rate} for own, rate in zip(model.children(), rates, strict=True)]
    optimizer = torch.optim.SGD(groups, **settings)
    recorder = dualhook.instrument(model, tmp_path / "memory", layers="all", verbose=False)
    for _ in range(steps):
        recorder.batch(samples=torch.arange(SAMPLES))
        optimizer.zero_grad()
        F.mse_loss(model(x)[:, 0], target).backward()
        optimizer.step()
    memory = recorder.close()
    found = memory.influence(model, queries.double(), of="logit")

    # both move along the same gradients, in proportion to their rates: one map of the summed weight and rate
    together = sum(weights), settings, [sum(rates)] * steps
    expected = sgd_effects(x, target, queries.double(), *together, steps=steps, mean=True)
    torch.testing.assert_close(found.scores, expected, rtol=2e-3, atol=1e-3 * float(expected.abs().max()))
    for layer, rate in zip(("first", "second"), rates, strict=True):
        part = expected * rate / sum(rates)
        torch.testing.assert_close(found.of_layer(layer), part, rtol=2e-3, atol=1e-3 * float(part.abs().max()))
        alone = memory.influence(model, queries.double(), of="logit", layers=layer)
        assert torch.equal(alone.scores, found.of_layer(layer))


class Words(nn.Module):
    """Tokens through a table that is also the head, attention and a square layer between them."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        return self.head(torch.tanh(self.inner(x + self.attention(x, x, x)[0])))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), (5,)),
    "positions": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), (3, 5)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 3)
        ),
        (2, 4, 4),
    ),
    "words": (Words, None),
}


def trained(name, path, steps=6, optimizer=torch.optim.SGD, **settings):
    """A model and its memory, trained on twelve samples, four a step."""
    torch.manual_seed(3)
    make, shape = MODELS[name]
    model = make().double()
    x = torch.randint(0, 7, (12, 4)) if shape is None else torch.randn(12, *shape).double()
    y = torch.randint(0, 7, (12, 4)) if shape is None else torch.randint(0, 3, (12,))
    optimizer = optimizer(model.parameters(), **(settings or {"lr": 0.1, "momentum": 0.5}))
    recorder = dualhook.instrument(model, path, layers="all", verbose=False)
    for step in range(steps):
        batch = torch.arange(12).roll(-4 * step)[:4]
        recorder.batch(samples=batch)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]).flatten(0, -2), y[batch].flatten()).backward()
        optimizer.step()
    return model, recorder.close(), x, y


@pytest.mark.parametrize("name", MODELS)
def test_without_curvature_nothing_decays(tmp_path, monkeypatch, name):
    model, memory, x, _ = trained(name, tmp_path / "memory")
    exact = memory.influence(model, x[:3], method="contribution")
    monkeypatch.setattr("dualhook.loss.Loss.curvature_weights", lambda self, rows: torch.zeros(len(rows)).double())
    found = memory.influence(model, x[:3], cache=False)
    for layer in exact.layers:
        own = exact.of_layer(layer)
        torch.testing.assert_close(found.of_layer(layer), own, rtol=1e-4, atol=1e-5 * float(own.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_with_curvature_early_gradients_have_decayed(tmp_path, name):
    model, memory, x, _ = trained(name, tmp_path / "memory", steps=60, lr=0.3)
    exact = memory.influence(model, x[:3], of="logit", method="contribution")
    found = memory.influence(model, x[:3], of="logit", cache=False)
    assert found.note == ""
    assert float(found.scores.norm()) < 0.7 * float(exact.scores.norm())


@pytest.mark.parametrize("name", MODELS)
def test_cosines_are_those_of_autograd(tmp_path, name):
    model, memory, x, y = trained(name, tmp_path / "memory", steps=3, lr=1e-9)  # it stays where it is
    found = memory.influence(model, x[:2], of="loss", target=y[:2, -1] if y.ndim == 2 else y[:2], method="cosine")
    parameters = list(model.parameters())

    def flat(value):
        grads = torch.autograd.grad(value, parameters, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])

    def loss(number, last):
        logits = model(x[number : number + 1]).flatten(0, -2)
        targets = y[number : number + 1].flatten()
        return F.cross_entropy(logits[-1:], targets[-1:]) if last else F.cross_entropy(logits, targets)

    for q in range(2):
        asked = flat(loss(q, last=True))
        for s in range(12):
            own = flat(loss(s, last=False))
            assert float(found.scores[q, s]) == pytest.approx(-float(asked @ own / own.norm() / asked.norm()), rel=1e-4)


def test_adam_weighs_entries_as_its_preconditioner_does(tmp_path, monkeypatch):
    hardly = lambda self, rows: torch.full((len(rows),), 1e-9).double()  # noqa: E731
    monkeypatch.setattr("dualhook.loss.Loss.curvature_weights", hardly)
    model, memory, x, _ = trained("mlp", tmp_path / "memory", steps=12, optimizer=torch.optim.AdamW, lr=0.01)
    exact = memory.influence(model, x, method="contribution").scores
    raw = memory.influence(model, x, method="cosine").scores
    found = memory.influence(model, x, cache=False).scores

    def alike(scores):
        return float(np.corrcoef(scores.flatten(), exact.flatten())[0, 1])

    assert alike(found) > alike(raw) + 0.2  # not the same: momentum takes a gradient to later preconditioners


@pytest.mark.parametrize(
    ("optimizer", "told"), [(torch.optim.Adam, True), (torch.optim.AdamW, False), (torch.optim.SGD, False)]
)
def test_weight_decay_that_is_not_followed_is_told(tmp_path, optimizer, told):
    model, memory, x, _ = trained("mlp", tmp_path / "memory", optimizer=optimizer, lr=0.01, weight_decay=0.1)
    note = memory.influence(model, x[:1]).note
    assert ("weight decay within the preconditioned gradient of 0, 2 is not followed" in note) == told


def test_rare_gradients_do_not_have_the_factor_of_none(tmp_path, monkeypatch):
    hardly = lambda self, rows: torch.full((len(rows),), 1e-9).double()  # noqa: E731
    monkeypatch.setattr("dualhook.loss.Loss.curvature_weights", hardly)
    torch.manual_seed(0)
    x, y = torch.randn(8, 5), torch.arange(8) % 3
    x[:, 4] = 0
    x[7, 4] = 1  # only the last sample has this input, and it comes every twentieth step
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    recorder = dualhook.instrument(model, tmp_path / "memory", layers="all", verbose=False)
    for step in range(1, 121):
        batch = torch.tensor([step % 7, (step + 3) % 7, 7 if step % 20 == 0 else (step + 5) % 7])
        recorder.batch(samples=batch)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    memory = recorder.close()
    exact = memory.influence(model, x, method="contribution").scores[:, 7].abs().max()
    assert memory.influence(model, x, cache=False).scores[:, 7].abs().max() < 3 * exact


def test_random_numbers_stay_as_they_were(tmp_path):
    model, memory, x, _ = trained("mlp", tmp_path / "memory")
    before = torch.get_rng_state()
    scores = [memory.influence(model, x[:3], cache=False).scores for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*scores)


def test_what_was_fitted_is_kept(tmp_path, monkeypatch):
    model, memory, x, _ = trained("mlp", tmp_path / "memory")
    first = memory.influence(model, x[:3])
    monkeypatch.setattr("dualhook.estimates.fit_decay", None)
    again = dualhook.load(tmp_path / "memory").influence(model, x[:3])
    torch.testing.assert_close(first.scores, again.scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(first.scores, sum(first.of_layer(layer) for layer in first.layers))


def test_the_answer_as_tables(tmp_path):
    model, memory, x, y = trained("mlp", tmp_path / "memory")
    memory.add_column("label", y)
    found = memory.influence(model, x[:2])
    top, scores = found.top(3), found.scores.numpy()
    assert top.columns == ["query", "rank", "sample", "influence"]
    assert top.where(query=1)["sample"].tolist() == (-scores[1]).argsort(kind="stable")[:3].tolist()
    assert found.bottom(1)["influence"].tolist() == scores.min(1).tolist()
    by_label = found.sum_by("label")
    for row in by_label:
        assert row["influence"] == pytest.approx(scores[row["query"]][y.numpy() == row["label"]].sum())
    assert len(found.to_pandas()) == 24
    assert "estimate" in repr(found)


def test_queries_ask_what_they_say(tmp_path):
    model, memory, x, y = trained("mlp", tmp_path / "memory")
    own = model(x[:2]).detach()
    logit = own[range(2), y[:2]]
    others = [own[q, [c for c in range(3) if c != y[q]]].logsumexp(0) for q in range(2)]
    expected = {"logit": logit, "loss": own.logsumexp(1) - logit, "margin": logit - torch.stack(others)}
    for of, values in expected.items():
        asked = memory.influence(model, x[:2], target=y[:2], of=of, method="cosine").queries["score"]
        np.testing.assert_allclose(asked, values.numpy(), rtol=1e-12)


def test_bad_questions(tmp_path):
    model, memory, x, _ = trained("mlp", tmp_path / "memory")
    with pytest.raises(DualHookError, match="method='trak': expected one of decayed, cosine, contribution"):
        memory.influence(model, x, method="trak")
    with pytest.raises(DualHookError, match="of='weight': expected one of margin, logit, loss"):
        memory.influence(model, x, of="weight")
    with pytest.raises(LayerError, match="one class from 0 to 2"):
        memory.influence(model, x, target=3)
    with pytest.raises(LayerError, match="expected the recorded"):
        memory.influence(nn.Linear(5, 3), x)
    with pytest.raises(RuleError, match="average"):
        memory.averaged("ema").influence(model, x)
    with pytest.raises(DualHookError, match="k=0"):
        memory.influence(model, x, method="cosine").top(0)
    with pytest.raises(DualHookError, match="no column 'label' of the samples"):
        memory.influence(model, x, method="cosine").sum_by("label")


def test_a_run_that_named_no_samples(tmp_path):
    model = nn.Linear(3, 2)
    recorder = dualhook.instrument(model, tmp_path / "memory", verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    with pytest.raises(DualHookError, match="recorder.track"):
        recorder.close().influence(model, torch.randn(1, 3))


def test_optimisers_whose_steps_are_more_than_their_state(tmp_path):
    model, memory, x, _ = trained("mlp", tmp_path / "memory", optimizer=torch.optim.Rprop, lr=0.01)
    with pytest.raises(RuleError, match="method='cosine'"):
        memory.influence(model, x)
    assert len(memory.influence(model, x, method="cosine")) == 12


def test_other_losses_are_said_to_be_taken_for_a_mean(tmp_path):
    model = nn.Linear(3, 2)
    recorder = dualhook.instrument(model, tmp_path / "memory", verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        recorder.batch(samples=torch.arange(4))
        optimizer.zero_grad()
        model(torch.randn(4, 3)).abs().mean().backward()
        optimizer.step()
    found = recorder.close().influence(model, torch.randn(2, 3))
    assert "the loss is taken for a mean" in found.note
    assert "the loss is taken for a mean" in found.top(2).footer


# ---- by token -------------------------------------------------------------------------------------------------------

METHODS = ("decayed", "cosine", "contribution")
READS = {"words": None, "convolutions": ["0", "2"], "positions": ["0"]}  # layers that go through samples place by place


def by_pattern(memory, model, x, layers):
    """Contributions summed by (sample, position), from the list of all patterns: per query and layer."""
    attention, found = memory.attend(model, x, layers=layers), {}
    for row in attention.top(10**6):
        place = row["query"], row["layer"], row["sample"], row["position"]
        found[place] = found.get(place, 0.0) + row["contribution"]
    return found


@pytest.mark.parametrize("name", READS)
def test_contributions_of_tokens_are_sums_over_patterns(tmp_path, name):
    model, memory, x, _ = trained(name, tmp_path / "memory")
    found = memory.influence(model, x[:2], of="logit", method="contribution", per="token", layers=READS[name])
    expected = by_pattern(memory, model, x[:2], READS[name])
    tokens = list(zip(found.samples.tolist(), found.positions.tolist(), strict=True))
    assert tokens == sorted({place[2:] for place in expected})
    for layer in found.layers:
        for q in range(2):
            own = [expected.get((q, layer, *token), 0.0) for token in tokens]
            np.testing.assert_allclose(found.of_layer(layer)[q].numpy(), own, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", READS)
def test_tokens_sum_to_their_samples(tmp_path, name, method):
    model, memory, x, _ = trained(name, tmp_path / "memory", steps=20)
    asked = {"method": method, "layers": READS[name]}
    whole, found = (memory.influence(model, x[:2], per=per, **asked) for per in ("sample", "token"))
    assert (whole.per, found.per) == ("sample", "token")
    for layer in whole.layers:
        summed = torch.zeros(2, 12, dtype=torch.float64)
        summed.index_add_(1, torch.from_numpy(found.samples), found.of_layer(layer))
        scale = float(whole.of_layer(layer).abs().max())
        torch.testing.assert_close(summed, whole.of_layer(layer), rtol=1e-5, atol=1e-6 * scale)
    assert found.sum_by("sample")["influence"] == pytest.approx(whole.scores.flatten().numpy(), abs=1e-6, rel=1e-4)


def test_a_token_s_cosine_is_its_part_of_the_sample_s(tmp_path):
    """By hand: the gradient that one position leaves in a layer, over the norm of the whole sample's."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    x, y = torch.randn(5, 6, 4).double(), torch.randint(0, 3, (5, 6))
    recorder = dualhook.instrument(model, tmp_path / "memory", verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    recorder.batch(samples=torch.arange(5))
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    optimizer.step()
    found = recorder.close().influence(model, x[:1], positions=2, of="logit", target=1, method="cosine", per="token")
    out = model(x).softmax(-1) - F.one_hot(y, 3)
    gradient = torch.einsum("spo,spi->spoi", out, x)  # by token, but for the mean's factor
    asked = torch.zeros(3, 4).double()
    asked[1] = x[0, 2]
    expected = -torch.einsum("spoi,oi->sp", gradient, asked / asked.norm())
    expected /= gradient.sum(1).flatten(1).norm(dim=1)[:, None]
    assert found.positions.tolist() == list(range(6)) * 5
    torch.testing.assert_close(found.scores[0], expected.flatten().detach(), rtol=1e-5, atol=1e-6)


def test_tokens_as_tables(tmp_path):
    model, memory, x, y = trained("words", tmp_path / "memory")
    memory.add_column("label", y[:, 0])
    found = memory.influence(model, x[:2], per="token")
    top, scores = found.top(3), found.scores.numpy()
    assert top.columns == ["query", "rank", "sample", "position", "influence"]
    order = (-scores[1]).argsort(kind="stable")[:3]
    assert top.where(query=1)["sample"].tolist() == found.samples[order].tolist()
    assert top.where(query=1)["position"].tolist() == found.positions[order].tolist()
    assert found.bottom(1)["influence"].tolist() == scores.min(1).tolist()
    assert found.to_pandas().columns.tolist() == ["query", "sample", "position", "influence"]
    for row in found.sum_by("label"):
        own = y[found.samples, 0].numpy() == row["label"]
        assert row["influence"] == pytest.approx(scores[row["query"]][own].sum())
    for row in found.sum_by("position"):
        assert row["influence"] == pytest.approx(scores[row["query"]][found.positions == row["position"]].sum())
    assert "48 tokens" in repr(found)


def test_what_has_no_tokens_is_said(tmp_path):
    model, memory, x, _ = trained("convolutions", tmp_path / "memory")
    with pytest.raises(LayerError, match=r"the rows of '4' know no position.* layers=\['0', '2'\]"):
        memory.influence(model, x, method="cosine", per="token")
    with pytest.raises(LayerError, match="ask per='sample'"):
        memory.influence(model, x, method="cosine", per="token", layers="4")
    with pytest.raises(DualHookError, match="per='word': expected one of sample, token"):
        memory.influence(model, x, per="word")


def test_more_than_finds_room_is_refused_before_it_is_worked_out(tmp_path, monkeypatch):
    model, memory, x, _ = trained("words", tmp_path / "memory")
    monkeypatch.setattr("dualhook.influence.MOST_BYTES", 4000)
    monkeypatch.setattr("dualhook.memory.by_cosine", None)
    layers = len(memory.influence(model, x[:1], method="contribution").layers)
    message = f"influence of 48 tokens on 4 queries through {layers} layers takes {8 * 48 * 4 * layers:,} bytes"
    with pytest.raises(DualHookError, match=f"{message}: expected at most 4,000; .*per='sample'"):
        memory.influence(model, x[:4], method="cosine", per="token")
