"""One check for every model of the sweep: clipped momentum-SGD, recorded with ``layers="all"`` and held to the run.

The oracle is the run itself: torch's gradients as they were before clipping, the weights it left, and a second run
without the recorder.
"""

from __future__ import annotations

import copy
import fnmatch
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from elsewhere import placed
from torch import Tensor, nn

import dualhook
from dualhook.maps import gradient, map_of
from dualhook.query import slots
from dualhook.table import Table

STEPS = 3
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A model, its loss on a batch drawn from torch's random state, and the parameters that no memory holds.

    ``uncovered`` names them by the type of the module that owns them, or by globs over their own names.
    """

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module], Tensor]
    uncovered: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """What a run leaves: the losses, and per step the gradients before clipping."""

    losses: list[float]
    gradients: list[dict[str, Tensor]]

    @property
    def trained(self) -> set[str]:
        """The parameters that got a gradient."""
        return {name for found in self.gradients for name, gradient in found.items() if gradient.any()}


def check(case: Case) -> None:
    """Record the case's training and hold coverage, gradients, weights and the training itself to it."""
    with placed():
        model = built(case)
        bare, again = copy.deepcopy(model), copy.deepcopy(model)
        recorder = dualhook.instrument(model, layers="all", verbose=False)
        run = train(model, case.loss)
        coverage, memory = recorder.coverage, recorder.close()
        idle = {name for name, p in model.named_parameters() if p.requires_grad} - run.trained
        assert not idle, f"a case that proves nothing about {sorted(idle)}"
        other = train(bare, case.loss)
        # of some operations CUDA sums the gradients in any order: then no two runs are the same, recorded or not
        if os.environ.get("DUALHOOK_DEVICE") != "cuda" or are_same(bare, other, again, train(again, case.loss)):
            assert are_same(model, run, bare, other)
    assert_uncovered(model, coverage, case.uncovered)
    assert_truthful(model, run, coverage, memory)


def built(case: Case) -> nn.Module:
    """The case's model, without parameters that start at zero: behind a zero head every first gradient is zero."""
    torch.manual_seed(1)
    model = case.build()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def train(model: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int = STEPS) -> Trained:
    """Clipped momentum-SGD, in place."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    run = Trained([], [])
    torch.manual_seed(2)  # the batches, and what the model itself draws
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        run.losses.append(float(value.detach()))
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        run.gradients.append(found)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return run


def are_same(model: nn.Module, run: Trained, bare: nn.Module, other: Trained) -> bool:
    """Whether two trainings are the same, bit for bit."""
    pairs = zip(model.state_dict().values(), bare.state_dict().values(), strict=True)
    return run.losses == other.losses and all(torch.equal(one, two) for one, two in pairs)


def assert_uncovered(model: nn.Module, coverage: Table, expected: Iterable[str]) -> None:
    """The parameters without a layer are those that are expected, no fewer and no more."""
    uncovered = {row["parameter"] for row in coverage if row["layer"] is None}
    owners = {
        f"{name}.{attribute}" if name else attribute: type(module).__name__
        for name, module in model.named_modules()
        for attribute in module._parameters
    }
    matched: set[str] = set()
    for pattern in expected:
        hits = {name for name, kind in owners.items() if kind == pattern or fnmatch.fnmatchcase(name, pattern)}
        assert hits, f"{pattern!r} matches no parameter"
        matched |= hits
    assert not uncovered - matched, f"not covered: {sorted(uncovered - matched)}"
    assert not matched - uncovered, f"covered, and not expected to be: {sorted(matched - uncovered)}"


def assert_truthful(model: nn.Module, run: Trained, coverage: Table, memory: dualhook.DualMemory) -> None:
    """What the table calls recorded is rebuilt, gradients and weights; what it does not is given a reason."""
    rebuilt: set[str] = set()
    for layer in memory.layers:
        for step, found in rebuilt_gradients(memory, layer):
            for name, (rebuilt_one, size) in found.items():
                assert_gradient(name, step, rebuilt_one, size, run.gradients[step - 1][name])
                rebuilt.add(name)
    for row in coverage:
        name = row["parameter"]
        if row["layer"] is None:
            assert row["note"], f"{name}: no reason given"
        elif name in run.trained:
            assert name in rebuilt, f"{name}: called recorded, but has no rows"
    report = memory.verify()
    assert report["exact"].all(), report
    assert report.max_error <= TOLERANCE, report
    assert_weights(model, coverage, memory)


def assert_gradient(name: str, step: int, found: Tensor, size: Tensor, true: Tensor) -> None:
    """Entry by entry within 1e-5 of the sum of absolute contributions; a near-null |gradient| is no yardstick."""
    excess = (found - true.cpu().double()).abs() - TOLERANCE * size
    assert float(excess.max()) <= 0, f"{name}, step {step}: off by {float(excess.max()):.3g} beyond rounding"


def assert_weights(model: nn.Module, coverage: Table, memory: dualhook.DualMemory) -> None:
    """``|Ŵ - W| <= 1e-5 |W|`` per layer, weight and bias together."""
    actual, found = dict(model.named_parameters()), memory.state_dict()
    assert found, "nothing recorded"
    layers: dict[str, list[str]] = {}
    for row in coverage:
        if row["parameter"] in found:
            layers.setdefault(row["layer"], []).append(row["parameter"])
    assert sum(map(len, layers.values())) == len(found), "a rebuilt parameter that the table does not list"
    for layer, names in layers.items():
        left = torch.cat([(found[name].double() - actual[name].detach().cpu().double()).flatten() for name in names])
        size = torch.cat([actual[name].detach().cpu().double().flatten() for name in names])
        assert left.norm() <= TOLERANCE * size.norm(), f"{layer}: {float(left.norm() / size.norm()):.3g}"


def rebuilt_gradients(
    memory: dualhook.DualMemory, layer: str
) -> Iterator[tuple[int, dict[str, tuple[Tensor, Tensor]]]]:
    """Per step and parameter: the gradient that the layer's rows add up to, and their absolute contributions' sum."""
    spec = memory._spec(layer)
    own = map_of(spec)
    shapes = {name: memory._store.origin(name).tensors["value"].shape for name in spec.parameters}
    for step in range(1, memory.steps + 1):
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for rows in memory._store.blocks(layer, first_step=step, last_step=step, block_rows=2**16):
            key, d = rows.key.double(), rows.output_grad.double()
            signed, absolute = (
                gradient(*both, rows.slot, spec.in_features) for both in ((d, key), (d.abs(), key.abs()))
            )
            parts = {spec.weight: [signed, absolute]}
            if spec.bias is not None:
                parts[spec.bias] = [slots.bias_gradient(values, rows, spec.slots) for values in (d, d.abs())]
            for name, pair in parts.items():
                value, size = (own.natural(name, part, shapes[name]) for part in pair)
                before = found.get(name, (0.0, 0.0))
                found[name] = before[0] + value, before[1] + size
        yield step, found
