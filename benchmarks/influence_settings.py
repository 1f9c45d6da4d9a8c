"""The trainings that benchmarks/influence.py judges by: models, data, and one loop for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dualhook.data import load_fashion_mnist_subset, load_king_james_subset
from dualhook.demo import network

__all__ = ["MEASURES", "SETTINGS", "Data", "Loss", "Setting", "cross_entropy", "margin"]

Loss = Callable[[Tensor, Tensor], Tensor]

CONTEXT = 32  # tokens of a passage


@dataclass(frozen=True)
class Data:
    """Training samples and queries with their targets, one row each."""

    inputs: Tensor
    targets: Tensor
    queries: Tensor
    query_targets: Tensor


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """The target's logit minus logsumexp of the others [b]: the log odds of the target."""
    own = outputs.gather(-1, targets[..., None])
    others = outputs.scatter(-1, targets[..., None], -torch.inf)
    return own[..., 0] - others.logsumexp(-1)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of every sample [b], over its tokens where it has several."""
    losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(len(targets), -1).mean(1)


MEASURES: dict[str, Loss] = {"margin": margin, "loss": cross_entropy}


@dataclass(frozen=True)
class Setting:
    """A training: what is trained, on what, and what of the result is measured."""

    model: Callable[[], nn.Module]
    data: Callable[[], Data]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    of: str = "margin"
    """What is measured of every query: the margin of its target, or its loss."""
    epochs: int = 15
    batch: int = 64

    @property
    def samples(self) -> np.ndarray:
        return np.arange(len(self.data().inputs))

    def built(self, seed: int, perturbation: float = 0.0) -> nn.Module:
        """The model before training, every weight moved by a random share of it where that is asked for."""
        torch.manual_seed(seed)
        model = self.model()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if perturbation:
                    parameter.mul_(1 + perturbation * torch.randn(parameter.shape, generator=generator))
        return model

    def batches(self, seed: int) -> Iterator[np.ndarray]:
        """The samples of every step; what is left of an epoch makes no step."""
        generator = np.random.default_rng(seed)
        for _ in range(self.epochs):
            order = generator.permutation(len(self.samples))
            yield from order[: len(order) // self.batch * self.batch].reshape(-1, self.batch)

    def trained(
        self,
        seed: int,
        samples: np.ndarray | None = None,
        *,
        perturbation: float = 0.0,
        step: Callable[[nn.Module, int, np.ndarray], Any] = lambda *_: nullcontext(),
        start: Callable[[nn.Module], None] = lambda _: None,
    ) -> nn.Module:
        """One training; without some samples it is the same one, these left out of the loss of their batches.

        ``start(model)`` is called before, and every step is taken within ``step(model, number, samples)``.
        """
        data, model = self.data(), self.built(seed, perturbation)
        start(model)
        optimizer = self.optimizer(model.parameters())
        kept = np.ones(len(self.samples), dtype=bool) if samples is None else np.isin(self.samples, samples)
        for number, batch in enumerate(self.batches(seed)):
            chosen = torch.from_numpy(batch[kept[batch]])
            with step(model, number, batch):
                optimizer.zero_grad()
                losses = cross_entropy(model(data.inputs[chosen]), data.targets[chosen])
                (losses.sum() / self.batch).backward()
                optimizer.step()
        return model.eval()

    def measured(self, model: nn.Module) -> np.ndarray:
        """The margins or losses [query] of the trained model."""
        data = self.data()
        with torch.no_grad():
            return MEASURES[self.of](model(data.queries), data.query_targets).double().numpy()

    def train(self, samples: np.ndarray, seed: int, perturbation: float = 0.0) -> np.ndarray:
        """What :mod:`dualhook.evaluate` asks for."""
        return self.measured(self.trained(seed, samples, perturbation=perturbation))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class Language(nn.Module):
    """A GPT-2-style model of bytes: takes tokens [b, t], returns logits [b, t, 128]."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        size = GPT2Config(
            vocab_size=128, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4, tie_word_embeddings=False
        )
        size.resid_pdrop = size.embd_pdrop = size.attn_pdrop = 0.0
        self.gpt2 = GPT2LMHeadModel(size)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.gpt2(tokens).logits
        return logits


@cache
def images(samples: int = 2048, queries: int = 200) -> Data:
    """Fashion-MNIST images, of all classes alike."""
    data, generator = load_fashion_mnist_subset(), np.random.default_rng(0)
    train = torch.from_numpy(generator.permutation(len(data.train_labels))[:samples])
    test = torch.from_numpy(generator.permutation(len(data.test_labels))[:queries])
    return Data(data.train_images[train], data.train_labels[train], data.test_images[test], data.test_labels[test])


@cache
def passages(samples: int = 1024, queries: int = 50) -> Data:
    """Passages of the shipped verses, one a verse, and their bytes one place later; the queries are other verses."""
    verses = [verse for verse in load_king_james_subset().verses if len(verse) > CONTEXT]
    order = np.random.default_rng(0).permutation(len(verses))[: samples + queries]
    rows = torch.tensor([list(verses[row].encode("ascii")[: CONTEXT + 1]) for row in order])
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    return Data(inputs[:samples], targets[:samples], inputs[samples:], targets[samples:])


def sgd(parameters: Any, rate: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=5e-4)


_mlp = Setting(mlp, images, sgd)
_text = Setting(Language, passages, adamw, of="loss", epochs=5, batch=16)

SETTINGS = {
    "mlp-sgd": _mlp,
    "mlp-adamw": replace(_mlp, optimizer=adamw),
    "cnn-sgd": replace(_mlp, model=cnn),
    "cnn-adamw": replace(_mlp, model=cnn, optimizer=adamw),
    "paper-sgd": replace(_mlp, model=network),
    "paper-adamw": replace(_mlp, model=network, optimizer=adamw),
    "text-sgd": replace(_text, optimizer=partial(sgd, rate=0.05)),
    "text-adamw": _text,
}
"""What is trained; the first two are the small default."""
