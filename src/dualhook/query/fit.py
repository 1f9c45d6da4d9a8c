"""What training has left of a layer's gradients, fitted from some rows of every stretch of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from dualhook.maps import gradient
from dualhook.query.curvature import Metric, Moments, extended, moments_of
from dualhook.query.decay import decayed
from dualhook.query.influence import Decay, Stretch
from dualhook.query.parts import ReplayShare
from dualhook.query.preview import close_to, middle_factor
from dualhook.records import NO_SAMPLE, LayerSpec, Rows, RowSource

__all__ = ["edges", "fit_decay", "metric_of", "some_rows"]

STRETCHES = 12
ROWS = 2**18  # looked at for the curvature, in all …
BYTES = 2**28  # … or fewer, where they are wide
GRID = 2048  # curvatures whose decay is worked out, evenly on a logarithmic scale; between them it is interpolated
FLATTEST = 1e-9  # of the largest curvature: what is less does not decay
RANKS = 12  # pairs that stand for what a stretch has left, at most
LEAST = 1e-30  # what stands for no curvature at all
NEGLIGIBLE = 1e-3  # of the first pair: what is less is left out


@dataclass(frozen=True)
class Some:
    """Some rows of a stretch, weighted so that their outer products sum to the curvature of so many ``steps``."""

    rows: Rows
    steps: float


def fit_decay(
    source: RowSource,
    spec: LayerSpec,
    shares: Sequence[ReplayShare],
    counts: Tensor,
    weighted: Callable[[Rows], Tensor],
) -> Decay:
    """What later steps have left of a layer's gradients, up to the horizon of its ``shares``.

    ``counts`` [t + 1] are the layer's rows in each step, ``weighted`` gives every row [n] of known sample the weight of
    its outer product in the curvature.

    Raises:
        RuleError: what the optimiser does is made of more than its state.
    """
    share, stretches = shares[0], list(pairwise(edges(shares[0])))
    columns = spec.in_features // spec.slots + (spec.bias is not None)
    some = [some_rows(source, spec, begin, end, counts, weighted) for begin, end in stretches]
    metrics = [metric_of(spec, shares, stretch, own, columns) for stretch, own in zip(stretches, some, strict=True)]
    mean = Metric(
        torch.stack([metric.row for metric in metrics]).mean(0), torch.stack([m.column for m in metrics]).mean(0)
    ).positive()
    moments = Moments.none(spec.out_features, spec.slots, columns)
    for own in some:
        if own is not None:
            moments.add(mean.measured(own.rows))
    basis = moments.basis()
    curvatures = [
        None if own is None else moments_of(basis.along(metric.measured(own.rows)), spec.slots, columns) / own.steps
        for own, metric in zip(some, metrics, strict=True)
    ]
    seen = [own for own in curvatures if own is not None] or [torch.zeros(spec.out_features, spec.slots * columns)]
    curvature = torch.stack(seen).mean(0)
    scale = torch.ones(share.horizon + 1, dtype=torch.float64)
    for (begin, end), values in zip(stretches, curvatures, strict=True):
        if values is not None:
            scale[begin + 1 : end + 1] = float(values.sum() / curvature.sum().clamp(min=LEAST))
    return Decay(mean, basis, list(_stretches(share, stretches, metrics, curvature, scale, spec.slots)))


def edges(share: ReplayShare) -> list[int]:
    """The steps between which the stretches lie."""
    steps = share.horizon - share.begins
    count = min(STRETCHES, max(1, steps))
    return [share.begins + steps * k // count for k in range(count + 1)]


def some_rows(
    source: RowSource, spec: LayerSpec, begin: int, end: int, counts: Tensor, weighted: Callable[[Rows], Tensor]
) -> Some | None:
    """Rows from the middle of a stretch, as many as may be looked at; None where there are none."""
    columns = spec.in_features // spec.slots + spec.out_features
    most = max(1, min(ROWS, BYTES // (4 * columns)) // STRETCHES)
    before = counts.cumsum(0)
    spared = max(0, int(before[end] - before[begin]) - most) // 2
    first = min(end, int(torch.searchsorted(before, before[begin] + spared, right=True)))
    parts, length = list[Rows](), 0
    for rows in source.blocks(spec.name, first_step=first, last_step=end, block_rows=most):
        parts.append(rows)
        length += len(rows)
        if length >= most:
            break
    if not parts:
        return None
    rows = parts[0].joined(*parts[1:])
    rows = rows.where(rows.sample != NO_SAMPLE)
    if length >= most and bool((rows.sample != rows.sample[-1:]).any()):
        rows = rows.where((rows.sample != rows.sample[-1]) | (rows.step != rows.step[-1]))  # it may have more rows
    if not len(rows):
        return None
    weight = weighted(rows).float().sqrt()[:, None]
    rows = replace(rows, key=rows.key.float(), output_grad=rows.output_grad.float() * weight)
    return Some(extended(spec, rows), float((1 / counts[rows.step].double()).sum()))


def metric_of(
    spec: LayerSpec, shares: Sequence[ReplayShare], stretch: tuple[int, int], some: Some | None, columns: int
) -> Metric:
    """How far the stretch's steps move each entry."""
    whole = Metric(torch.ones(spec.out_features), torch.ones(spec.slots, columns))
    if some is None or not shares[0].snapshots:
        return whole
    parts = [middle_factor(share, *stretch, torch.float32) for share in shares]
    matrix = parts[0].reshape(spec.out_features, spec.slots, -1)
    if len(parts) > 1:
        matrix = torch.cat([matrix, parts[1].reshape(spec.out_features, spec.slots, 1)], 2)
    d, key = some.rows.output_grad.square(), some.rows.key.square()
    energy = gradient(d, key, some.rows.slot, matrix[0].numel())
    matrix = matrix.flatten(1)
    known = torch.where(matrix > 0, matrix.square().reciprocal(), 0.0)  # what the optimiser has seen of it
    energy = torch.minimum(energy / energy.sum().clamp(min=LEAST), known / known.sum().clamp(min=LEAST))
    row, column = close_to(matrix, energy)
    size = column[column > 0].mean() if bool((column > 0).any()) else 1.0
    return Metric(row * size, (column / size).reshape(whole.column.shape))


def _stretches(
    share: ReplayShare,
    stretches: Sequence[tuple[int, int]],
    metrics: Sequence[Metric],
    curvature: Tensor,
    scale: Tensor,
    slots: int,
) -> Iterator[Stretch]:
    """What each stretch has left, oldest first."""
    largest = max(float(curvature.max()), LEAST)
    grid = torch.cat([torch.zeros(1), torch.logspace(0, 1, GRID - 1, base=FLATTEST).flip(0) * largest]).double()
    left = list(decayed(share, grid, scale, stretches))[::-1]
    place = torch.searchsorted(grid, curvature.double(), right=True).clamp(1, GRID - 1)
    part = ((curvature.double() - grid[place - 1]) / (grid[place] - grid[place - 1])).clamp(0, 1)
    # of entries with much energy more is at stake
    outputs, inputs = (curvature.mean(side).sqrt() for side in (1, 0))
    outputs, inputs = (side.clamp(min=max(1e-4 * float(side.max()), LEAST)).double() for side in (outputs, inputs))
    for (begin, end), values, metric in zip(stretches, left, metrics, strict=True):
        factors = torch.lerp(values[place - 1], values[place], part) * outputs[:, None] * inputs
        with torch.random.fork_rng(devices=[]):  # the same every time, and the user's random numbers as they were
            torch.manual_seed(0)
            row, size, column = torch.svd_lowrank(factors, q=min(RANKS, *factors.shape), niter=4)
        kept = size > NEGLIGIBLE * size[0]
        root = size[kept].sqrt()
        yield Stretch(
            begin + 1,
            end,
            (row[:, kept] * root / outputs[:, None]).T.float(),
            (column[:, kept] * root / inputs[:, None]).T.reshape(len(root), slots, -1).float(),
            metric,
        )
