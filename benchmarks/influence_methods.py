"""Scores of influence [query, sample]: dualhook's, its peers', and simple neighbours.

The peers are the published packages, which only benchmarks/influence.py's own environment has.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from influence_settings import MEASURES, Loss, Setting, cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import dualhook

__all__ = ["METHODS", "OF_IMAGES", "Run"]

CHECKPOINTS = 5  # of TracIn, evenly over the training
PROJECTED = 512  # TRAK's dimensions
CHUNK = 256  # gradients held at once


@dataclass
class Run:
    """One training of all samples, recorded, with what the methods take from it."""

    setting: Setting
    seed: int
    checkpoints: list[dict[str, Tensor]] = field(default_factory=list)

    @cached_property
    def model(self) -> nn.Module:
        total = sum(1 for _ in self.setting.batches(self.seed))
        kept = {round(total * (number + 1) / CHECKPOINTS) - 1 for number in range(CHECKPOINTS)}
        recorders: list[Any] = []

        def start(model: nn.Module) -> None:
            recorders.append(dualhook.instrument(model, layers="all", verbose=False))

        def step(model: nn.Module, number: int, samples: np.ndarray) -> Any:
            if number - 1 in kept:
                self.checkpoints.append(copy.deepcopy(model.state_dict()))
            return recorders[0].batch(samples=torch.from_numpy(samples))

        model = self.setting.trained(self.seed, start=start, step=step)
        self.memory = recorders[0].close()
        self.checkpoints.append(copy.deepcopy(model.state_dict()))
        return model

    def loaders(self) -> tuple[DataLoader, DataLoader]:
        """The training samples and the queries, in order."""
        data = self.setting.data()
        train, queries = (data.inputs, data.targets), (data.queries, data.query_targets)
        return tuple(DataLoader(TensorDataset(*both), CHUNK, shuffle=False) for both in (train, queries))


def dual(method: str) -> Callable[[Run], Tensor]:
    """Dualhook's own, from the memory that the run has left."""

    def scores(run: Run) -> Tensor:
        data, model, of = run.setting.data(), run.model, run.setting.of
        target: Any = data.query_targets
        if of == "loss":  # of all tokens of a passage
            target = partial(cross_entropy, targets=data.query_targets)
        influence = run.memory.influence(model, data.queries, target=target, of=of, method=method)
        if not np.array_equal(influence.samples, run.setting.samples):
            raise ValueError("the memory knows other samples than the setting has")
        return influence.scores

    return scores


def random(run: Run) -> Tensor:
    data = run.setting.data()
    return torch.randn(len(data.queries), len(data.inputs), generator=torch.Generator().manual_seed(run.seed))


def neighbours(*, penultimate: bool, signed: bool) -> Callable[[Run], Tensor]:
    """Cosines of pixels or of the last layer's inputs; signed: negative where the labels differ."""

    def scores(run: Run) -> Tensor:
        data = run.setting.data()
        train, queries = data.inputs, data.queries
        if penultimate:
            train, queries = (features(run.model, inputs) for inputs in (train, queries))
        cosines = F.normalize(queries.flatten(1).float()) @ F.normalize(train.flatten(1).float()).T
        if run.setting.of == "loss":  # which those that are like it have lowered
            cosines = -cosines
        alike = data.query_targets[:, None] == data.targets[None]
        return torch.where(alike, cosines, -cosines) if signed else cosines

    return scores


def features(model: nn.Module, inputs: Tensor) -> Tensor:
    """What the last linear layer reads, the mean over tokens where there are several [b, i]."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    read: list[Tensor] = []
    with last.register_forward_pre_hook(lambda module, given: read.append(given[0])), torch.no_grad():
        model(inputs)
    return read[0] if read[0].dim() == 2 else read[0].mean(1)


def attribution_task(model: nn.Module, checkpoints: list[dict[str, Tensor]], trained: Loss, measured: Loss) -> Any:
    """Dattri's task: what gradients of a training sample and of a query are taken of."""
    from dattri.task import AttributionTask

    model = copy.deepcopy(model)
    return AttributionTask(one(model, trained), model, checkpoints, target_func=one(model, measured))


def one(model: nn.Module, quantity: Loss) -> Callable[[Any, Any], Tensor]:
    """A quantity of a single sample, as a function of the parameters."""

    def of(parameters: Any, data: Any) -> Tensor:
        inputs, targets = data
        return quantity(torch.func.functional_call(model, parameters, inputs[None]), targets[None]).sum()

    return of


def log_odds(outputs: Tensor, targets: Tensor) -> Tensor:
    """The log odds of a sample's likelihood [b], TRAK's quantity: the margin where a sample has one target."""
    losses = cross_entropy(outputs, targets)
    return -losses - torch.log(-torch.expm1(-losses))


def tracin(run: Run) -> Tensor:
    """TracIn of whole gradients at checkpoints of one rate."""
    from dattri.algorithm.tracin import TracInAttributor

    task = attribution_task(run.model, run.checkpoints, cross_entropy, MEASURES[run.setting.of])
    attributor = TracInAttributor(task, torch.ones(len(run.checkpoints)), normalized_grad=False)
    attributor.projector_kwargs = None  # which it would set by itself
    return -attributor.attribute(*run.loaders()).T


def trak(models: int) -> Callable[[Run], Tensor]:
    """TRAK of so many trainings, the run's own first."""

    def scores(run: Run) -> Tensor:
        from dattri.algorithm.trak import TRAKAttributor

        others = [run.setting.trained(1000 * (run.seed + 1) + number) for number in range(1, models)]
        states = [model.state_dict() for model in [run.model, *others]]
        task = attribution_task(run.model, states, log_odds, log_odds)
        loss = one(run.model, cross_entropy)
        attributor = TRAKAttributor(
            task, lambda *given: torch.exp(-loss(*given)), {"proj_dim": PROJECTED, "proj_max_batch_size": 32}
        )
        train, queries = run.loaders()
        attributor.cache(train)
        raised = attributor.attribute(queries).T
        return -raised if run.setting.of == "loss" else raised

    return scores


def with_linear(model: nn.Module) -> nn.Module:
    """The model with ``nn.Linear`` in the place of transformers' ``Conv1D``, which Kronfluence does not know."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "Conv1D":
                linear = nn.Linear(*child.weight.shape)
                linear.weight = nn.Parameter(child.weight.detach().T.contiguous())
                linear.bias = nn.Parameter(child.bias.detach().clone())
                setattr(parent, name, linear)
    return model


def ekfac(run: Run) -> Tensor:
    """Kronfluence's EK-FAC with its heuristic damping."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    measured = MEASURES[run.setting.of]

    class Measured(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            inputs, targets = batch
            outputs = model(inputs)
            if sample:
                with torch.no_grad():
                    targets = torch.distributions.Categorical(logits=outputs).sample()
            return cross_entropy(outputs, targets).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            inputs, targets = batch
            return measured(model(inputs), targets).sum()

    task, data = Measured(), run.setting.data()
    model = prepare_model(with_linear(copy.deepcopy(run.model)), task)
    train: Dataset = TensorDataset(data.inputs, data.targets)
    queries: Dataset = TensorDataset(data.queries, data.query_targets)
    with tempfile.TemporaryDirectory(prefix="dualhook-ekfac-") as folder:
        analyzer = Analyzer("run", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.fit_all_factors("factors", train, CHUNK, factor_args=FactorArguments(strategy="ekfac"))
        analyzer.compute_pairwise_scores(
            "scores", "factors", queries, train, CHUNK, CHUNK, score_args=ScoreArguments(damping_factor=None)
        )
        # gradient of the measurement, inverse curvature, gradient of the loss; training goes down the latter
        return -analyzer.load_pairwise_scores("scores")["all_modules"].double()


METHODS: dict[str, Callable[[Run], Tensor]] = {
    "random": random,
    "pixels": neighbours(penultimate=False, signed=False),
    "pixels, sign by label": neighbours(penultimate=False, signed=True),
    "penultimate": neighbours(penultimate=True, signed=False),
    "penultimate, sign by label": neighbours(penultimate=True, signed=True),
    "TracIn (dattri)": tracin,
    "TRAK, 1 model (dattri)": trak(1),
    "TRAK, 5 models (dattri)": trak(5),
    "EK-FAC (kronfluence)": ekfac,
    "contribution": dual("contribution"),
    "cosine": dual("cosine"),
    "decayed": dual("decayed"),
}

OF_IMAGES = ("pixels", "pixels, sign by label", "penultimate, sign by label")
"""Those that want images with one label each."""
