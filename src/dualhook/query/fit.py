"""What training has left of a layer's gradients, fitted from some rows of every stretch of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dualhook.query.curvature import Metric, Moments, moments_of
from dualhook.query.decay import decayed
from dualhook.query.influence import Decay, Stretch
from dualhook.query.metric import LEAST, columns_of, looked_at
from dualhook.query.parts import ReplayShare
from dualhook.records import LayerSpec, Rows, RowSource

__all__ = ["fit_decay"]

GRID = 2048  # curvatures whose decay is worked out, evenly on a logarithmic scale; between them it is interpolated
FLATTEST = 1e-9  # of the largest curvature: what is less does not decay
RANKS = 6  # pairs that stand for what a stretch has left, at most
NEGLIGIBLE = 1e-2  # of the first pair: what is less is left out


def fit_decay(
    source: RowSource,
    spec: LayerSpec,
    shares: Sequence[ReplayShare],
    counts: Tensor,
    weighted: Callable[[Rows], Tensor],
    *,
    pulled: Tensor,
) -> Decay:
    """What later steps have left of a layer's gradients, up to the horizon of its ``shares``.

    ``counts`` and ``weighted`` as :func:`~dualhook.query.metric.some_rows` takes them; ``pulled`` [t + 1] is how many
    times as strongly as the layer alone all layers pull, 1 where it is the only one.

    Raises:
        RuleError: what the optimiser does is made of more than its state.
    """
    share, columns = shares[0], columns_of(spec)
    stretches, some, metrics = zip(*looked_at(source, spec, shares, counts, weighted), strict=True)
    mean = Metric(
        torch.stack([metric.row for metric in metrics]).mean(0), torch.stack([m.column for m in metrics]).mean(0)
    ).positive()
    moments = Moments.none(spec.out_features, spec.slots, columns)
    for own in some:
        if own is not None:
            moments.add(mean.measured(own.weighted))
    basis = moments.basis()
    curvatures = [
        None if own is None else moments_of(basis.along(metric.measured(own.weighted)), spec.slots, columns) / own.steps
        for own, metric in zip(some, metrics, strict=True)
    ]
    seen = [own for own in curvatures if own is not None] or [torch.zeros(spec.out_features, spec.slots * columns)]
    curvature = torch.stack(seen).mean(0)
    scale = pulled.clone()
    for (begin, end), values in zip(stretches, curvatures, strict=True):
        if values is not None:
            scale[begin + 1 : end + 1] *= float(values.sum() / curvature.sum().clamp(min=LEAST))
    return Decay(mean, basis, list(_stretches(share, stretches, metrics, curvature, scale, spec.slots)))


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
