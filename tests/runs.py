"""Training runs for the tests: drawn by Hypothesis, made of plain torch, recorded or not.

The oracle is the run itself: torch's own autograd and optimiser, with the weights copied after every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from third_party import Lion
from torch import Tensor, nn
from torch.nn import functional as F

import dualhook
from dualhook.optimizers import LionRule, register

register(Lion, LionRule())
CLASSES = 3
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


class Network(nn.Module):
    """Linear layers with activations between them; ``reuse`` calls the first hidden square layer twice."""

    def __init__(self, widths: list[int], biases: list[bool], activations: list[nn.Module], reuse: bool) -> None:
        super().__init__()
        sizes = [*widths, CLASSES]
        self.layers = nn.ModuleList(
            nn.Linear(i, o, bias=bias) for i, o, bias in zip(sizes[:-1], sizes[1:], biases, strict=True)
        )
        self.activations = nn.ModuleList(activations)
        self.reuse = reuse

    def forward(self, x: Tensor) -> Tensor:
        for layer, activation in zip(self.layers[:-1], self.activations, strict=True):
            x = activation(layer(x))
            if self.reuse and layer.in_features == layer.out_features:
                x = activation(layer(x))
        return self.layers[-1](x)


@dataclass(frozen=True)
class Run:
    """Everything that determines a training run."""

    dtype: torch.dtype
    widths: list[int]
    biases: list[bool]
    activations: list[Callable[[], nn.Module]]
    reuse: bool
    positions: int | None  # None: inputs [b, i]; else [b, positions, i]
    optimizer: Callable[..., torch.optim.Optimizer]
    settings: dict[str, Any]
    bias_settings: dict[str, Any] | None  # biases in a parameter group of their own
    schedule: Callable[[torch.optim.Optimizer], Any] | None
    clip: float | None
    batch_sizes: list[list[int]]  # per step its micro-batches
    frozen: dict[int, tuple[int, int]] = field(default_factory=dict)  # layer -> steps in which it does not train
    zero_to_none: bool = True
    seed: int = 0

    def network(self) -> Network:
        torch.manual_seed(self.seed)
        return Network(self.widths, self.biases, [make() for make in self.activations], self.reuse).to(self.dtype)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        shape = [size, self.widths[0]] if self.positions is None else [size, self.positions, self.widths[0]]
        return torch.randn(shape, dtype=self.dtype), torch.randint(0, CLASSES, shape[:-1])

    def optimizers(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.bias_settings is None:
            return self.optimizer(model.parameters(), **self.settings)
        weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
        biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
        groups = [{"params": weights}, {"params": biases, **self.bias_settings}] if biases else [{"params": weights}]
        return self.optimizer(groups, **self.settings)

    def train(self, model: Network, after_step: Callable[[int], None] = lambda step: None) -> list[float]:
        """Train in place; returns the losses."""
        optimizer = self.optimizers(model)
        schedule = self.schedule(optimizer) if self.schedule else None
        torch.manual_seed(self.seed + 1)
        losses = []
        for step, sizes in enumerate(self.batch_sizes, start=1):
            for number, (first, last) in self.frozen.items():
                for parameter in model.layers[number].parameters():
                    parameter.requires_grad_(not first <= step <= last)
            optimizer.zero_grad(set_to_none=self.zero_to_none)
            for number in self.frozen:  # set_to_none=False leaves a zero gradient, which torch would step on
                for parameter in model.layers[number].parameters():
                    if not parameter.requires_grad:
                        parameter.grad = None
            for size in sizes:
                x, y = self.batch(size)
                loss = F.cross_entropy(model(x).reshape(-1, CLASSES), y.reshape(-1)) / len(sizes)
                loss.backward()
                losses.append(loss.item())
            if self.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()
            if schedule is not None:
                schedule.step()
            after_step(step)
        return losses


@dataclass
class Outcome:
    """A run's end and everything along the way."""

    model: Network
    losses: list[float]
    weights: list[dict[str, Tensor]]  # after every step, the untrained ones first
    random_state: Tensor
    memory: dualhook.DualMemory | None = None


def outcome(run: Run, record: bool, **options: Any) -> Outcome:
    """Train, recorded or not."""
    model = run.network()
    recorder = dualhook.instrument(model, verbose=False, **options) if record else None
    weights = [copy.deepcopy(model.state_dict())]
    losses = run.train(model, lambda step: weights.append(copy.deepcopy(model.state_dict())))
    state = torch.get_rng_state()
    return Outcome(model, losses, weights, state, recorder.close() if recorder else None)


def relative_error(found: dict[str, Tensor], true: dict[str, Tensor], layer: str) -> float:
    """|found - true| / |true| over the parameters of one layer."""
    names = [name for name in found if name.rpartition(".")[0] == layer]
    wanted = {name: true[name].cpu().double() for name in names}
    left = sum((found[name].double() - wanted[name]).square().sum() for name in names)
    return float((left / sum(wanted[name].square().sum() for name in names)).sqrt())


ACTIVATIONS = (nn.ReLU, lambda: nn.ReLU(inplace=True), nn.Tanh, nn.GELU, lambda: nn.LeakyReLU(0.1, inplace=True))
SCHEDULES = (
    None,
    lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8),
    lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.3),
    lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
)


@st.composite
def sgd_settings(draw: st.DrawFn) -> dict[str, Any]:
    momentum = draw(st.sampled_from([0.0, 0.0, 0.5, 0.9]))
    nesterov = momentum > 0 and draw(st.booleans())
    return {
        "lr": draw(st.sampled_from([0.01, 0.05, 0.2])),
        "momentum": momentum,
        "nesterov": nesterov,
        "dampening": 0.0 if nesterov or not momentum else draw(st.sampled_from([0.0, 0.5])),
        "weight_decay": draw(st.sampled_from([0.0, 1e-2, 0.1])),
        "maximize": draw(st.sampled_from([False, False, True])),
        "foreach": draw(st.sampled_from([None, True, False])),
    }


@st.composite
def asgd_settings(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "lr": draw(st.sampled_from([0.01, 0.1])),
        "lambd": draw(st.sampled_from([1e-4, 1e-1])),
        "alpha": draw(st.sampled_from([0.75, 0.5])),
        "t0": draw(st.sampled_from([0, 3, 1e6])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "maximize": draw(st.booleans()),
    }


@st.composite
def adam_settings(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "lr": draw(st.sampled_from([1e-3, 1e-2])),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.5, 0.9)])),
        "eps": draw(st.sampled_from([1e-8, 1e-4])),
        "weight_decay": draw(st.sampled_from([0.0, 0.1])),
        "amsgrad": draw(st.booleans()),
        "maximize": draw(st.booleans()),
        "foreach": draw(st.sampled_from([None, True, False])),
    }


def fixed(**choices: list[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Settings drawn one by one from lists."""
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in choices.items()})


BETAS = [(0.9, 0.999), (0.5, 0.9)]
DECAYS = [0.0, 0.1]
FLAGS = [False, True]


def lion_settings() -> st.SearchStrategy[dict[str, Any]]:
    return fixed(lr=[1e-3, 1e-2], betas=BETAS, weight_decay=DECAYS)


def muon_settings() -> st.SearchStrategy[dict[str, Any]]:
    return fixed(
        lr=[1e-3, 1e-2],
        weight_decay=DECAYS,
        momentum=[0.95, 0.5],
        nesterov=FLAGS,
        adjust_lr_fn=[None, "original", "match_rms_adamw"],
        ns_steps=[5, 3],
    )


SCALAR = ((torch.optim.SGD, sgd_settings()), (torch.optim.ASGD, asgd_settings()))
REPLAYED = (
    (torch.optim.Adam, adam_settings()),
    (torch.optim.AdamW, adam_settings()),
    (
        torch.optim.NAdam,
        fixed(
            lr=[1e-3, 1e-2],
            betas=BETAS,
            weight_decay=DECAYS,
            momentum_decay=[4e-3, 0.1],
            decoupled_weight_decay=FLAGS,
            maximize=FLAGS,
        ),
    ),
    (
        torch.optim.RAdam,
        fixed(lr=[1e-3, 1e-2], betas=BETAS, weight_decay=DECAYS, decoupled_weight_decay=FLAGS, maximize=FLAGS),
    ),
    (torch.optim.Adamax, fixed(lr=[1e-3, 1e-2], betas=BETAS, weight_decay=DECAYS, maximize=FLAGS)),
    (
        torch.optim.RMSprop,
        fixed(
            lr=[1e-3, 1e-2], alpha=[0.99, 0.9], weight_decay=DECAYS, momentum=[0.0, 0.9], centered=FLAGS, maximize=FLAGS
        ),
    ),
    (
        torch.optim.Adagrad,
        fixed(
            lr=[1e-2, 0.1],
            lr_decay=[0.0, 0.1],
            weight_decay=DECAYS,
            initial_accumulator_value=[0.0, 0.1],
            maximize=FLAGS,
        ),
    ),
    (torch.optim.Adadelta, fixed(lr=[1.0, 0.1], rho=[0.9, 0.99], weight_decay=DECAYS, maximize=FLAGS)),
    (torch.optim.Adafactor, fixed(lr=[1e-2, 1e-1], d=[1.0, 2.0], weight_decay=DECAYS, maximize=FLAGS)),
    (torch.optim.Rprop, fixed(lr=[1e-3, 1e-2], etas=[(0.5, 1.2), (0.9, 1.05)], maximize=FLAGS)),
    (Lion, lion_settings()),
)


@st.composite
def runs(draw: st.DrawFn, *, max_steps: int = 10) -> Run:
    depth = draw(st.integers(1, 4))
    hidden = draw(st.integers(1, 12))
    widths = [draw(st.integers(1, 10)), *(hidden for _ in range(depth - 1))]
    make, settings = draw(
        st.sampled_from([*SCALAR, *REPLAYED])
        .flatmap(lambda pair: st.tuples(st.just(pair[0]), pair[1]))
    )  # fmt: skip
    steps = draw(st.integers(1, max_steps))
    first = draw(st.integers(1, steps))
    frozen = {draw(st.integers(0, depth - 1)): (first, draw(st.integers(first, steps)))} if draw(st.booleans()) else {}
    return Run(
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
        widths=widths,
        biases=[draw(st.booleans()) for _ in range(depth)],
        activations=[draw(st.sampled_from(ACTIVATIONS)) for _ in range(depth - 1)],
        reuse=draw(st.booleans()),
        positions=draw(st.sampled_from([None, None, 1, 4])),
        optimizer=make,
        settings=settings,
        bias_settings=draw(st.sampled_from([None, {"weight_decay": 0.0, "lr": 0.03}])),
        schedule=draw(st.sampled_from(SCHEDULES)),
        clip=draw(st.sampled_from([None, 0.05, 1.0])),
        batch_sizes=[
            [draw(st.integers(1, 9)) for _ in range(draw(st.sampled_from([1, 1, 3])))] for _ in range(steps)
        ],
        frozen=frozen if depth > 1 else {},
        zero_to_none=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )  # fmt: skip


def recorded_shortly(path: Path, optimizer: Callable[..., torch.optim.Optimizer], steps: int) -> nn.Module:
    """A small network after some recorded steps on samples that move on by one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    trained_by = optimizer(model.parameters())
    with dualhook.instrument(model, path, optimizer=trained_by, verbose=False) as recorder:
        for step in range(steps):
            with recorder.batch(samples=torch.arange(4) + step):
                model(torch.randn(4, 5)).square().mean().backward()
                trained_by.step()
                trained_by.zero_grad()
    return model
