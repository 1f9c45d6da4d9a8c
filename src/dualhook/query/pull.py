"""How strongly each layer's steps take back what has changed in the network, beside all the others'.

Layers answer for each other: what one of them adds to the outputs, the steps of all take back. Were every layer's part
in this alike, direction by direction, a gradient on one layer would decay by the layer's own curvature times what all
layers pull over what it pulls itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dualhook.query.curvature import norms_of
from dualhook.query.decay import gains
from dualhook.query.metric import looked_at
from dualhook.query.parts import ReplayShare
from dualhook.records import LayerSpec, Rows, RowSource

__all__ = ["pull_of"]


def pull_of(
    source: RowSource,
    spec: LayerSpec,
    shares: Sequence[ReplayShare],
    counts: Tensor,
    weighted: Callable[[Rows], Tensor],
) -> Tensor:
    """The trace of the curvature along a layer's weights, times how far a step goes [t + 1], float64.

    ``counts`` and ``weighted`` as :func:`~dualhook.query.metric.some_rows` takes them.

    Raises:
        RuleError: what the optimiser does is made of more than its state.
    """
    found = gains(shares[0])
    for (begin, end), some, metric in looked_at(source, spec, shares, counts, weighted):
        trace = 0.0 if some is None else float(norms_of(metric.measured(some.weighted))[0].sum()) / some.steps
        found[begin + 1 : end + 1] *= trace
    return found
