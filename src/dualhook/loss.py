"""What the rows of the last layer say of the loss: how it weighs samples, and how it is curved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dualhook.maps import map_of
from dualhook.records import NO_SAMPLE, LayerSpec, Rows, places_among
from dualhook.store import Store

__all__ = ["Fit", "Loss"]

AGREE = 1e-3  # how far rows may miss what is true of them exactly
LOOKED_AT = 4096  # rows that show how the loss was reduced
NUMBERS = 2**24  # of the last layer's output gradients at a time
LATER = 3  # steps that are compared with the first one
STRAIGHT = 0.99  # of the changes of output gradients that a slope explains, for a squared error
TINY = 1e-12  # the least probability of a target that a row can tell
USE = "use"  # the column that tells the uses of a weight apart
NO_LABEL = -1

Weights = Callable[[LayerSpec, int], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Fit:
    """How well training has fitted samples, each [s]: what was wrong with them, and where that can be read.

    ``mean`` and ``last`` are a loss or a gradient's norm (NaN where the last layer has no rows), ``rows`` how many the
    mean is of, ``newest`` the last step that a sample was part of. ``label`` is its class under a softmax head; -1:
    none is known, or its rows (tokens) have several.
    """

    mean: Tensor
    last: Tensor
    rows: Tensor
    newest: Tensor
    label: Tensor


class Loss:
    """How a sample's gradient weighs in the curvature, as the rows ``d`` [o] of the last layer show it.

    The curvature of the loss along the layer's output is a matrix whose trace is known: ``w (1 - |p|^2)`` for softmax
    cross-entropy, where ``d = w (p - y)``, and ``w o`` for a squared error, where ``d = w (y - target)``. A gradient's
    outer product then counts ``trace / |d|^2`` times: a fitted sample has hardly a gradient, and its full curvature.

    - softmax cross-entropy is told by rows that sum to zero with one negative entry; ``w`` is one over the number of a
      step's rows (a mean) or 1 (a sum), whichever no entry contradicts
    - a squared error by output gradients that change in proportion to the outputs, with ``w`` as the slope
    - another loss is taken for a mean, and the outer product as it is for the curvature (the empirical Fisher)

    ``weights(layer, step)`` gives a layer's weight and bias after a step.
    """

    def __init__(self, store: Store, weights: Weights) -> None:
        self._store = store
        self.spec = next(spec for spec in reversed(store.trained_uses) if store.count(spec.name))
        """The last layer."""
        self.reduced_over = store.count_by_step(self.spec.name, own=True).clamp(min=1).double()
        """By step [t + 1] how many rows its loss is a mean of; 1 where it is a sum."""
        self.kind = "other"
        self.note = ""
        """What is assumed; empty where the rows say it."""
        rows = self._first_rows()
        if _is_softmax(rows.output_grad.double()):
            self.kind = "cross-entropy"
            lowest, number = -rows.output_grad.double().min(1).values, self.reduced_over[rows.step]
            fits_mean, fits_sum = (bool((lowest * n <= 1 + AGREE).all()) for n in (number, torch.ones_like(number)))
            if fits_sum and not fits_mean:
                self.reduced_over = torch.ones_like(self.reduced_over)
            elif not fits_mean:
                self.note = "single samples weigh more in the loss than in a mean or a sum: it is taken for a mean"
        elif slope := self._slope(rows, weights):
            self.kind = "squared error"
            self._slope_by_mean = slope
        else:
            self.note = f"the loss is taken for a mean over a step's rows of {self.spec.name!r}"

    def curvature_weights(self, rows: Rows) -> Tensor:
        """What the outer product of each row's gradient weighs in its step's curvature [n], float64."""
        if self.kind == "other":
            return self.reduced_over[rows.step]
        samples, place = torch.unique(torch.stack([rows.step, rows.sample]), dim=1, return_inverse=True)
        width = int(rows.sample.max()) + 2
        known = samples[0] * width + samples[1]
        squares, traces = torch.zeros(2, len(known), dtype=torch.float64)
        for head in self.rows(int(rows.step.min()), int(rows.step.max())):
            number = head.step * width + head.sample
            at = places_among(known, number)
            own = (at < len(known)) & (head.sample < width - 1)
            d = head.output_grad.double()
            squares.index_add_(0, at[own], d.square().sum(1)[own])
            traces.index_add_(0, at[own], self._traces(d, head.step)[own])
        return torch.where(squares > 0, traces / squares, 0.0).clamp(min=0)[place]

    def of_samples(self, samples: Tensor) -> Fit:
        """How well training has fitted every sample [s] (dataset rows, ascending).

        What was wrong with it is its cross-entropy where the loss is one; of others the norm of its output gradient,
        times the number of rows that the loss is a mean of.
        """
        total, last, seen = torch.zeros(3, len(samples), dtype=torch.float64)
        newest = torch.zeros(len(samples), dtype=torch.int64)
        lowest, highest = torch.full((len(samples),), self.spec.out_features), torch.full((len(samples),), NO_LABEL)
        for rows in self.rows(1, self._store.last_step):
            place = places_among(samples, rows.sample)
            own = (place < len(samples)).nonzero().squeeze(1)
            place, step = place[own], rows.step[own]
            d = rows.output_grad[own].double() * self.reduced_over[step][:, None]
            least = d.min(1)
            wrong = -(1 + least.values).clamp(min=TINY).log() if self.kind == "cross-entropy" else d.norm(dim=1)
            total.index_add_(0, place, wrong)
            seen.index_add_(0, place, torch.ones_like(wrong))
            newest.scatter_reduce_(0, place, step, "amax")
            final = step == newest[place]  # rows come in the order of their steps
            sums, count = torch.zeros(2, len(samples), dtype=torch.float64)
            sums.index_add_(0, place[final], wrong[final])
            count.index_add_(0, place[final], torch.ones_like(wrong[final]))
            last = torch.where(count > 0, sums / count.clamp(min=1), last)
            told = least.values < 0  # a sample that is fitted to rounding has no gradient at all
            lowest.scatter_reduce_(0, place[told], least.indices[told], "amin")
            highest.scatter_reduce_(0, place[told], least.indices[told], "amax")
        there = seen > 0
        label = torch.where((lowest == highest) & torch.tensor(self.kind == "cross-entropy"), lowest, NO_LABEL)
        mean, last = torch.where(there, total / seen, torch.nan), torch.where(there, last, torch.nan)
        return Fit(mean, last, seen.long(), newest, label)

    def rows(self, first: int, last: int, most: int | None = None) -> Iterator[Rows]:
        """The last layer's own rows of some steps, at most ``most`` at a time; not those of its weight's other uses."""
        head, uses = self.spec.name, [spec.name for spec in self._store.uses(self.spec.name)]
        most = most or max(1, NUMBERS // self.spec.out_features)
        for rows in self._store.blocks(head, first_step=first, last_step=last, block_rows=most):
            if len(uses) > 1:
                rows = rows.where(rows.columns[USE] == uses.index(head))
            if len(rows):
                yield rows

    def _traces(self, d: Tensor, step: Tensor) -> Tensor:
        """The trace of the loss's curvature along the outputs of rows [n, o]: [n]."""
        if self.kind == "squared error":
            return self._slope_by_mean * d.shape[1] / self.reduced_over[step]
        # with d = (p - y) / n: 1 - |p|^2 = 2 |d_y| n - |d|^2 n^2
        return 2 * -d.min(1).values - d.square().sum(1) * self.reduced_over[step]

    def _slope(self, rows: Rows, weights: Weights) -> float:
        """By how much output gradients, times their number, rise with the output; 0 if not in proportion to it."""
        if self.spec.slots > 1 or map_of(self.spec).stores_maps:
            return 0.0
        step = int(rows.step[0])
        first = rows.where((rows.step == step) & (rows.sample != NO_SAMPLE))
        changes, moves = [], []
        for later in self._meeting_again(first):
            places = {int(sample): k for k, sample in enumerate(first.sample)}
            both = [(places[int(sample)], k) for k, sample in enumerate(later.sample) if int(sample) in places]
            one, other = (torch.tensor(list(side)) for side in zip(*both, strict=True))
            gradients = (later.output_grad.double() * self.reduced_over[later.step][:, None])[other]
            changes.append(gradients - (first.output_grad.double() * self.reduced_over[step])[one])
            moves.append(self._outputs(later, weights)[other] - self._outputs(first, weights)[one])
        if not changes:
            return 0.0
        change, move = torch.cat(changes), torch.cat(moves)
        slope = float((change * move).sum() / move.square().sum().clamp(min=1e-300))
        left = float((change - slope * move).square().sum() / change.square().sum().clamp(min=1e-300))
        return slope if slope > 0 and left <= 1 - STRAIGHT else 0.0

    def _outputs(self, rows: Rows, weights: Weights) -> Tensor:
        """The last layer's outputs [n, o] at rows of one step, float64."""
        weight, bias = weights(self.spec, int(rows.step[0]) - 1)
        found = rows.key.double() @ weight.double().T
        return found if bias is None else found + bias.double()

    def _meeting_again(self, first: Rows) -> Iterator[Rows]:
        """Rows of single later steps that hold samples of the first one."""
        begin, end = int(first.step[0]) + 1, self._store.last_step
        found = 0
        for rows in self.rows(begin, end):
            for step in torch.unique(rows.step).tolist():
                own = rows.where((rows.step == step) & torch.isin(rows.sample, first.sample))
                if len(own) and found < LATER:
                    found += 1
                    yield own
            if found >= LATER:
                return

    def _first_rows(self) -> Rows:
        """The first of the head's own rows."""
        return next(iter(self.rows(1, self._store.last_step, LOOKED_AT)))


def _is_softmax(d: Tensor) -> bool:
    """Whether rows [n, o] are probabilities less a 1 for the target, but for a factor."""
    size = d.abs().sum(1)
    there = size > 0
    return (
        bool(there.any()) and bool((d.sum(1).abs() <= AGREE * size).all()) and bool(((d < 0).sum(1)[there] == 1).all())
    )
