"""Every kind of linear map, by one suite: rows rebuild weights, questions add up, training is what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dualhook

D = torch.float64


class Flat(nn.Module):
    """A body whose output is averaged over all but batch and channels, and a head."""

    def __init__(self, body: nn.Module, width: int, first: bool = True) -> None:
        super().__init__()
        self.body, self.head, self.first = body, nn.Linear(width, 3), first

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y = y[0] if isinstance(y, tuple) else y
        return self.head(y.flatten(2).mean(2) if self.first else y.mean(1))


class Text(nn.Module):
    """Token ids through an embedding and a tied head."""

    def __init__(self, bias: bool, functional: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.mix = nn.Linear(4, 4)
        self.functional = functional
        if not functional:
            self.head = nn.Linear(4, 11, bias=bias)
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embed(ids)))
        return F.linear(h, self.embed.weight) if self.functional else self.head(h)


class Recurrent(nn.Module):
    def __init__(self, make: Callable[..., nn.Module], **settings) -> None:
        super().__init__()
        self.core = make(3, 4, **settings)
        size = 4 * (2 if settings.get("bidirectional") else 1)
        self.head = nn.Linear(settings.get("proj_size") or size, 3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.core, nn.RNNCellBase):
            h = None
            for t in range(x.shape[1]):
                h = self.core(x[:, t], h)
            return self.head(h[0] if isinstance(h, tuple) else h)
        return self.head(self.core(x)[0].mean(1))


class Attention(nn.Module):
    def __init__(self, cross: bool = False, **settings) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **settings)
        self.cross, self.other = cross, settings.get("kdim", 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        other = x if not self.cross else torch.cat([x, x], -1)[..., : self.other] * 1.5
        if not self.attention.batch_first:
            x, other = x.transpose(0, 1), other.transpose(0, 1)
        y, _ = self.attention(x, other, other.sin() if self.cross else other)
        return self.head(y.mean(1 if self.attention.batch_first else 0))


class Experts(nn.Module):
    """A routed mixture with weights in one parameter, expert by expert, sorted rows or not."""

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(3, 4))
        self.up_proj = nn.Parameter(torch.randn(3, 5, 4) / 2)
        self.down_proj = nn.Parameter(torch.randn(3, 4, 5) / 2)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.grouped = grouped

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x.flatten(0, 1))
        scores = F.linear(h, self.router).softmax(-1)
        weight, expert = scores.max(-1)
        out = torch.zeros_like(h)
        for e in range(3):
            token = (expert == e).nonzero().squeeze(1)
            inner = F.silu(F.linear(h[token], self.up_proj[e]))
            out = out.index_add(0, token, F.linear(inner, self.down_proj[e]) * weight[token, None])
        return self.head(out.reshape(x.shape).mean(1))


class Swin(nn.Module):
    """Uses the weights of modules that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(F.linear(x, self.qkv.weight, self.qkv.bias).tanh(), self.proj.weight, self.proj.bias)
        return self.head(y.mean(1))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 5)
        self.both = nn.Bilinear(3, 5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.both(self.one(x), self.two(x)).tanh().mean(1))


def images(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=D)


def conv(make: type[nn.Module], *args, **settings) -> Callable[[], nn.Module]:
    return lambda: Flat(make(*args, **settings), args[1])


MAPS1, MAPS2, MAPS3 = (partial(images, 4, 2, *size) for size in ((7,), (6, 5), (4, 3, 5)))
VECTORS = partial(images, 4, 5, 4)
STEPS = partial(images, 4, 5, 3)


def ids() -> Tensor:
    return torch.randint(0, 11, (4, 5))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: Flat(nn.Linear(4, 6), 6, first=False), VECTORS),
    "conv1d": (conv(nn.Conv1d, 2, 4, 3, stride=2, padding=1), MAPS1),
    "conv2d": (conv(nn.Conv2d, 2, 4, 3, padding=1), MAPS2),
    "conv2d grouped": (conv(nn.Conv2d, 2, 4, 3, groups=2, dilation=2, padding="same"), MAPS2),
    "conv2d depthwise": (conv(nn.Conv2d, 2, 2, (3, 2), groups=2, bias=False), MAPS2),
    "conv2d reflect": (conv(nn.Conv2d, 2, 4, 3, padding=1, padding_mode="reflect"), MAPS2),
    "conv3d": (conv(nn.Conv3d, 2, 3, (2, 1, 3), padding=(1, 0, 1)), MAPS3),
    "transposed conv1d": (conv(nn.ConvTranspose1d, 2, 4, 3, stride=2, output_padding=1), MAPS1),
    "transposed conv2d": (conv(nn.ConvTranspose2d, 2, 4, 3, stride=2, padding=1, groups=2), MAPS2),
    "embedding": (lambda: Flat(nn.Embedding(11, 4, padding_idx=2), 4, first=False), ids),
    "embedding by frequency": (lambda: Flat(nn.Embedding(11, 4, scale_grad_by_freq=True), 4, first=False), ids),
    "embedding bag": (lambda: nn.Sequential(nn.EmbeddingBag(11, 4, mode="mean", padding_idx=3), nn.Linear(4, 3)), ids),
    "embedding bag sum": (lambda: nn.Sequential(nn.EmbeddingBag(11, 4, mode="sum"), nn.Linear(4, 3)), ids),
    "bilinear": (Pair, VECTORS),
    "attention": (partial(Attention, batch_first=True), VECTORS),
    "attention sequence first": (partial(Attention, batch_first=False), VECTORS),
    "attention between": (partial(Attention, cross=True, batch_first=True), VECTORS),
    "attention without bias": (partial(Attention, bias=False, batch_first=True), VECTORS),
    "attention of other widths": (partial(Attention, True, kdim=6, vdim=6, bias=False, batch_first=True), VECTORS),
    "attention of other widths with bias": (partial(Attention, True, kdim=6, vdim=6, batch_first=True), VECTORS),
    "attention with zero key": (partial(Attention, add_zero_attn=True, batch_first=True), VECTORS),
    "transformer": (
        lambda: Flat(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), 4, first=False),
        VECTORS,
    ),
    "functional": (Swin, VECTORS),
    "experts": (partial(Experts, False), VECTORS),
    "lstm": (partial(Recurrent, nn.LSTM, batch_first=True), STEPS),
    "lstm deep": (
        partial(Recurrent, nn.LSTM, batch_first=True, num_layers=2, bidirectional=True, proj_size=0),
        STEPS,
    ),
    "lstm projected": (partial(Recurrent, nn.LSTM, batch_first=True, proj_size=2), STEPS),
    "gru": (partial(Recurrent, nn.GRU, batch_first=True, num_layers=2), STEPS),
    "rnn": (partial(Recurrent, nn.RNN, batch_first=True, bias=False), STEPS),
    "lstm cell": (partial(Recurrent, nn.LSTMCell), STEPS),
    "gru cell": (partial(Recurrent, nn.GRUCell), STEPS),
    "tied": (partial(Text, bias=False), ids),
    "tied with bias": (partial(Text, bias=True), ids),
    "tied in a function": (partial(Text, bias=False, functional=True), ids),
}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.01),
}


def network(case: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[case][0]().to(D)


def train(model: nn.Module, inputs: Callable[[], Tensor], optimizer, recorder=None, steps: int = 4) -> list[dict]:
    """A clipped run; the gradients as autograd gave them, step by step."""
    torch.manual_seed(1)
    gradients = []
    for step in range(steps):
        x = inputs()
        target = torch.randint(0, 3, (x.shape[0],))
        if recorder is not None:
            recorder.batch(samples=torch.arange(len(x)) + 10 * step)
        optimizer.zero_grad()
        y = model(x)
        F.cross_entropy(y if y.dim() == 2 else y.transpose(1, 2), target if y.dim() == 2 else x.roll(1, 1)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return gradients


@pytest.fixture(scope="module")
def runs() -> dict:
    return {}


def run(runs: dict, case: str, optimizer: str):
    """A recorded run and the same without the recorder."""
    if (case, optimizer) not in runs:
        inputs, make = CASES[case][1], OPTIMIZERS[optimizer]
        plain, model = network(case), network(case)
        first = copy.deepcopy(model.state_dict())
        train(plain, inputs, make(plain.parameters()))
        recorder = dualhook.instrument(model, layers="all", verbose=False)
        gradients = train(model, inputs, make(model.parameters()), recorder)
        coverage = recorder.coverage
        runs[case, optimizer] = plain, model, recorder.close(), gradients, coverage, first
    return runs[case, optimizer]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
class TestEveryKind:
    def test_training_is_what_it_was(self, runs, case, optimizer):
        plain, model, *_ = run(runs, case, optimizer)
        for one, other in zip(plain.state_dict().values(), model.state_dict().values(), strict=True):
            assert torch.equal(one, other)

    def test_everything_is_covered_and_rebuilt(self, runs, case, optimizer):
        _, model, memory, _, coverage, first = run(runs, case, optimizer)
        uncovered = {n for n, layer in zip(coverage["parameter"], coverage["layer"], strict=True) if layer is None}
        assert {name for name in uncovered if "norm" not in name} == set()
        report = memory.verify()
        assert report.max_error < 1e-9
        assert all(report["exact"])
        for name, value in memory.state_dict().items():
            assert not torch.equal(value, first[name]), name
            actual = dict(model.named_parameters())[name].detach()
            assert (value - actual).norm() <= 1e-9 * actual.norm(), name

    def test_a_question_adds_up(self, runs, case, optimizer):
        _, model, memory, *_ = run(runs, case, optimizer)
        torch.manual_seed(5)
        inputs = CASES[case][1]()[:2]
        model = model.requires_grad_(True)
        target = (lambda y: y[:, -1, 1]) if case.startswith("tied") else None
        attention = memory.attend(model, inputs, target=target)
        assert set(memory.layers) <= set(attention.layers)
        assert attention.receipt["explained"].min() > 1 - 1e-6
        for layer in attention.layers:
            parts = attention.parts
            rows = [k for k, name in enumerate(parts["layer"]) if name == layer]
            size = max(abs(parts["contribution"][k]) for k in rows)
            left = [abs(parts["contribution"][k]) for k in rows if parts["part"][k] == "residual"]
            assert max(left) <= 1e-8 * max(size, 1e-3), layer

    def test_samples_are_those_of_the_batches(self, runs, case, optimizer):
        _, _, memory, *_ = run(runs, case, optimizer)
        assert set(memory.samples.tolist()) == {10 * step + k for step in range(4) for k in range(4)}
        for layer in memory.layers:
            for rows in memory._store.blocks(layer, last_step=4, block_rows=10**6):
                assert torch.equal(rows.sample // 10 + 1, rows.step), layer

    def test_a_memory_in_a_small_budget_stays_exact(self, case, optimizer):
        """The oldest patterns fold into the origin; all questions still add up, and the dual model answers alike."""
        inputs, model = CASES[case][1], network(case)
        recorder = dualhook.instrument(model, layers="all", verbose=False, max_bytes=6000)
        train(model, inputs, OPTIMIZERS[optimizer](model.parameters()), recorder, steps=8)
        memory = recorder.close()
        assert memory.info().footer.startswith("steps")  # folded
        assert memory.verify().max_error < 1e-9
        x = inputs()[:2]
        target = (lambda y: y[:, -1, 1]) if case.startswith("tied") else None
        assert memory.attend(model, x, target=target).receipt["explained"].min() > 1 - 1e-6
        with torch.no_grad():
            assert torch.allclose(memory.dual(model)(x), model.eval()(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("tied")])
def test_the_uses_of_one_weight_are_told_apart(runs, case):
    _, model, memory, *_ = run(runs, case, "sgd")
    (layer,) = [layer for layer in memory.layers if len(memory.uses(layer)) > 1]
    uses = memory.uses(layer)
    assert len(uses) == 2
    attention = memory.attend(model, ids()[:1], target=lambda y: y[:, -1, 1])
    for use in uses:
        sums = attention.sum_by("use", layers=use)
        assert sums["use"].tolist() == [0, 1]
        assert (sums["abs_contribution"] > 0).all()
        parts = attention.parts
        whole = parts.where(layer=use, part="patterns")["contribution"].sum()
        assert sums["contribution"].sum() == pytest.approx(whole, abs=1e-12)
    counts = [
        sum(len(s.step) for seg in memory._store.segments for s in [seg.stored(memory._spec(use))]) for use in uses
    ]
    assert sum(counts) == memory.patterns(layer)
