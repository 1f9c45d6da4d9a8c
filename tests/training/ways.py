"""One small training run in many ways: recorded and not, and against the plain run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from elsewhere import generator, placed
from torch import Tensor, nn
from torch.nn import functional as F

import dualhook
from dualhook.records import Rows
from dualhook.store import Store

SAMPLES, BATCH, POSITIONS, WIDTH, CLASSES = 12, 4, 3, 5, 3
LIMIT = {torch.float64: 1e-9, torch.float32: 1e-5}
EPOCHS, STEPS, PATTERNS = 2, 6, 2 * SAMPLES * POSITIONS  # of the plain run

Loop = Callable[[nn.Module, Callable[[Any], Any]], None]
"""``loop(model, track)`` trains in place; ``track`` is the recorder's, or does nothing."""


class Net(nn.Module):
    """An in-place activation between two linear maps, on inputs with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.activation, self.head = nn.Linear(WIDTH, 7), nn.ReLU(inplace=True), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.first(x)))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


class Data(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """``SAMPLES`` inputs [positions, width]; the row a pattern belongs to can be told from its key's last entry."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        drawn = generator(1)
        self.x = torch.randn(SAMPLES, POSITIONS, WIDTH, generator=drawn).to(dtype)
        self.x[:, :, -1] = torch.arange(SAMPLES).unsqueeze(1) / 16  # exact in every dtype
        self.y = torch.randint(0, CLASSES, (SAMPLES, POSITIONS), generator=drawn)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def loader(dtype: torch.dtype = torch.float32, batch_size: int = BATCH) -> Any:
    """Shuffled, the same in every run."""
    return torch.utils.data.DataLoader(Data(dtype), batch_size, shuffle=True, generator=generator(2))


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().reshape(-1, CLASSES), y.reshape(-1))


def sgd(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})


def plain(model: nn.Module, track: Callable[[Any], Any], *, dtype: torch.dtype = torch.float32) -> None:
    """The loop that the ways are measured against."""
    optimizer = sgd(model)
    data = loader(dtype)
    for _ in range(EPOCHS):
        for x, y in track(data):
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()


@dataclass
class Outcome:
    """The weights that training left, and the memory of it."""

    model: nn.Module
    memory: dualhook.DualMemory


def trained(
    loop: Loop, *, make: Callable[[], nn.Module] = net, wrap: Callable[[nn.Module], nn.Module] = lambda model: model
) -> Outcome:
    """Train with and without the recorder; both end at the same bits, and nothing was inexact."""
    with placed(), warnings.catch_warnings():
        warnings.simplefilter("error", dualhook.InexactWarning)
        bare = make()
        torch.manual_seed(3)
        loop(wrap(bare), lambda data: data)
        model = make()
        recorder = dualhook.instrument(model, verbose=False)
        torch.manual_seed(3)
        loop(wrap(model), recorder.track)
        memory = recorder.close()
        assert same(model, bare)
    return Outcome(model, memory)


def close(one: nn.Module, other: nn.Module, limit: float) -> bool:
    """Whether two models have the same weights within rounding."""
    pairs = ((a.cpu(), b.cpu()) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    return all(float((a - b).detach().norm() / b.detach().norm()) < limit for a, b in pairs)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same weights, bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def assert_exact(outcome: Outcome, *, patterns: int, steps: int, dtype: torch.dtype = torch.float32) -> None:
    """The memory rebuilds the weights, and every pattern of the first layer has the sample that its key tells.

    ``patterns`` counts the head's: its output gradients are never exactly zero.
    """
    memory = outcome.memory
    report = memory.verify(outcome.model)
    assert report.max_error < LIMIT[dtype]
    assert report["exact"].all()
    assert not any(report["inexact_steps"])
    assert memory.steps == steps
    first, head = memory.layers
    assert memory.patterns(head) == patterns
    rows = rows_of(memory, first)
    assert torch.equal(rows.sample.double(), rows.key[:, -1].double() * 16)


def rows_of(memory: dualhook.DualMemory, layer: str) -> Rows:
    """All rows of one layer, of a memory of one segment."""
    (rows,) = Store(memory.path).blocks(layer, last_step=memory.steps, block_rows=10_000)
    return rows
